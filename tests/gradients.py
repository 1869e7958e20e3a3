"""What optimizers are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def gradients_of(optimizer: Any) -> Iterator[list[Tensor]]:
    """The gradients of every step in the block, parameter by parameter, of one of Accelerate's."""
    found: list[Tensor] = []

    def keep(inner: Any, *_: object) -> None:
        found.extend(p.grad.clone() for group in inner.param_groups for p in group["params"])

    handle = optimizer.optimizer.register_step_pre_hook(keep)
    yield found
    handle.remove()
