"""Measure a training run between two rows of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.runtime.ranks import mean_over_ranks


class Meter:
    """Losses since the last row, summed on the device, and the time that each kind of work took.

    Args:
        accelerator: the ranks whose losses are averaged.
        images_per_step: real images that all ranks together see in one step.
        exact: the losses are means over all ranks already (``train.exact_sum``).
    """

    def __init__(
        self, accelerator: Accelerator, images_per_step: int, *, exact: bool = False
    ) -> None:
        self._accelerator, self._images_per_step = accelerator, images_per_step
        self._exact = exact
        self.reset()

    def reset(self) -> None:
        """Begin a new row."""
        self._sums = torch.zeros(4, device=self._accelerator.device)
        self._steps, self._data_wait, self._upkeep = 0, 0.0, 0.0
        if self._accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        began = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - began

    @contextmanager
    def upkeep(self) -> Iterator[None]:
        """Count the time in this block as upkeep: grids and checkpoints, not training."""
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the kernels of the steps before count as training
        began = time.perf_counter()
        yield
        self._upkeep += time.perf_counter() - began

    def add(self, loss_G: Tensor, d_terms: Sequence[Tensor]) -> None:
        """Add one step: G's loss (scalar), and ``update_D``'s result (3,) of each update of D."""
        mean = sum(terms / len(d_terms) for terms in d_terms)
        self._sums += torch.cat([loss_G[None], mean])  # type: ignore[list-item]
        self._steps += 1

    def row(self, step: int) -> dict[str, float]:
        """Return the row of metrics and begin a new one. Waits for the device; all ranks call it.

        Losses and scores are means over steps and ranks. ``perf/images_per_sec`` and
        ``perf/data_wait`` (a share) are of the time without upkeep; ``perf/upkeep`` is a share of
        all time. ``memory/peak_gib`` is of this rank since the last row.
        """
        means = self._sums / max(1, self._steps)
        if not self._exact:
            means = mean_over_ranks(self._accelerator, means)
        elapsed = time.perf_counter() - self._since
        training = elapsed - self._upkeep
        values = dict(
            zip(("loss/G", "loss/D", "scores/real", "scores/fake"), means.tolist(), strict=True)
        )
        values |= {
            "perf/images_per_sec": self._steps * self._images_per_step / training,
            "perf/data_wait": self._data_wait / training,
            "perf/upkeep": self._upkeep / elapsed,
            "progress/kimg": step * self._images_per_step / 1000,
        }
        if self._accelerator.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.reset()
        return values
