"""A CUDA graph of an update: its hundreds of kernels started by one call.

At small batches a GPU waits for Python to start the next kernel. A captured update is replayed
instead; what changes from step to step comes through tensors that stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 11  # calls before the capture: lazy set-up of optimizers and libraries happens in them

Group = Sequence[Tensor] | None


class Replayed:
    """``work(*groups)``, captured at the call after ``WARM_UP`` and replayed from then on.

    On the CPU, where nothing can be captured, the work runs on the same unmoving inputs: results
    are those of calling it directly, which is what can be tested without a GPU.

    Args:
        work: from groups of tensors to one tensor; no waiting for the device, no draws, no
            decisions that depend on values, and the same shapes at every call.
        pool: memory shared with other graphs that are replayed in the same order; None = own.
    """

    def __init__(self, work: Callable[..., Tensor], pool: Any = None) -> None:
        self._work, self._pool = work, pool
        self._calls = 0
        self._inputs: list[Group] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.empty(0)

    def __call__(self, *groups: Group) -> Tensor:
        inputs = self._filled(groups)
        device = next(tensor.device for group in inputs if group for tensor in group)
        if device.type != "cuda":
            return self._work(*inputs)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._beside(inputs)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=self._pool):
                self._result = self._work(*inputs)
        self._graph.replay()
        return self._result.clone()

    def _filled(self, groups: Sequence[Group]) -> list[Group]:
        """The unmoving inputs, with the values of these."""
        if self._inputs is None:
            self._inputs = [g and [torch.empty_like(tensor) for tensor in g] for g in groups]
        for kept, given in zip(self._inputs, groups, strict=True):
            for there, tensor in zip(kept or (), given or (), strict=True):
                there.detach().copy_(tensor, non_blocking=True)
        return self._inputs

    def _beside(self, inputs: list[Group]) -> Tensor:
        """The work on a side stream, as a capture wants its warm-up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # Of an optimizer that is yet to be captured: "If you never intend to ...".
            warnings.filterwarnings("ignore", ".*step\\(\\) is running without CUDA graph capture")
            result = self._work(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result
