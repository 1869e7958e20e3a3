"""Measure a run between two rows of metrics, and record the ids of its batches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.loader import Batch
from pipeline.runtime.ranks import mean_over_ranks


class IdLog:
    """The sample ids of every batch of this rank, one JSON line a step: proof of the data order."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._world_size, self._file = world_size, None
        if config.data.record_ids:
            folder = Path(config.run.dir).expanduser() / "ids"
            folder.mkdir(exist_ok=True)
            self._file = (folder / f"rank_{rank}.jsonl").open("a", buffering=1)
            if self._file.tell():
                self._file.write("\n")  # a killed run may have left half a line

    def write(self, step: int, batch: Batch) -> None:
        """Record the ids behind D's optimizer step ``step``."""
        if self._file:
            row = {"step": step, "world_size": self._world_size, "ids": batch.ids.tolist()}
            self._file.write(json.dumps(row) + "\n")


class Meter:
    """Means since the last row, summed on the device, and where the time went."""

    def __init__(self, accelerator: Accelerator, images_per_step: int) -> None:
        self._accelerator, self._images_per_step = accelerator, images_per_step
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(4, device=self._accelerator.device)
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, loss_G: Tensor, d_terms: Tensor) -> None:
        """Add one step: G's loss, and D's loss, D(x) and D(G(z))."""
        self._sums += torch.cat([loss_G[None], d_terms])
        self._steps += 1

    def row(self, step: int) -> dict[str, Any]:
        """Values since the last row, averaged over steps and ranks; waits for the device."""
        means = mean_over_ranks(self._accelerator, self._sums / max(1, self._steps)).tolist()
        elapsed = time.perf_counter() - self._since
        values = dict(zip(("loss/G", "loss/D", "scores/real", "scores/fake"), means, strict=True))
        values |= {
            "perf/images_per_sec": self._steps * self._images_per_step / elapsed,
            "perf/data_wait": self._waited / elapsed,
            "progress/kimg": step * self._images_per_step / 1000,
        }
        if self._accelerator.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._reset()
        return values
