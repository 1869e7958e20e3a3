"""Measure a training run between two rows of metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import record_function

from pipeline.config.schema import Config
from pipeline.runtime.hardware import peak_tflops
from pipeline.runtime.ranks import mean_over_ranks
from pipeline.training.flops import flop_per_image


class Meter:
    """Losses since the last row, summed on the device, and the time that each kind of work took.

    Args:
        accelerator: the ranks whose losses are averaged.
        images_per_step: real images that all ranks together see in one step.
        exact: the losses are means over all ranks already (``train.exact_sum``).
        flop: floating-point operations per image, as ``flops.flop_per_image`` counts them.
        peak: TFLOP/s that the devices of all ranks together can reach; None if unknown.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images_per_step: int,
        *,
        exact: bool = False,
        flop: float = 0.0,
        peak: float | None = None,
    ) -> None:
        self._accelerator, self._images_per_step = accelerator, images_per_step
        self._exact, self._flop, self._peak = exact, flop, peak
        self.traffic: Callable[[int], dict[str, float]] | None = None
        """Returns the metrics of downloads in as many steps; None = none are made."""
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
        with record_function("upkeep"):
            yield
        self._upkeep += time.perf_counter() - began

    def add(self, loss_G: Tensor, d_terms: Sequence[Tensor]) -> None:
        """Add one step: G's loss (scalar), and ``update_D``'s result (3,) of each update of D."""
        mean = d_terms[0] if len(d_terms) == 1 else torch.stack([*d_terms]).mean(0)
        self._sums += torch.cat([loss_G[None], mean])
        self._steps += 1

    def row(self, step: int) -> dict[str, float]:
        """Return the row of metrics and begin a new one. Waits for the device; all ranks call it.

        Losses and scores are means over steps and ranks. ``perf/images_per_sec``,
        ``perf/data_wait`` (a share) and ``perf/tflops`` (of all ranks) are of the time without
        upkeep; ``perf/mfu`` is the share of ``peak``. ``perf/upkeep`` is a share of all time.
        ``memory/peak_gib`` is of this rank since the last row.
        """
        means = self._sums / max(1, self._steps)
        if not self._exact:
            means = mean_over_ranks(self._accelerator, means)
        elapsed = time.perf_counter() - self._since
        training = elapsed - self._upkeep
        values = dict(
            zip(("loss/G", "loss/D", "scores/real", "scores/fake"), means.tolist(), strict=True)
        )
        images_per_sec = self._steps * self._images_per_step / training
        values |= {
            "perf/images_per_sec": images_per_sec,
            "perf/data_wait": self._data_wait / training,
            "perf/upkeep": self._upkeep / elapsed,
            "progress/kimg": step * self._images_per_step / 1000,
        }
        if self.traffic is not None:
            values |= self.traffic(self._steps)
        if self._flop:
            values["perf/tflops"] = tflops = images_per_sec * self._flop / 1e12
            if self._peak:
                values["perf/mfu"] = tflops / self._peak
        if self._accelerator.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.reset()
        return values


def meter_of_run(config: Config, accelerator: Accelerator, precision: str) -> Meter:
    """Return the meter of a run in ``fp32``, ``bf16`` or ``fp16``, which knows FLOP and peak."""
    peak = peak_tflops(accelerator.device, precision)
    return Meter(
        accelerator,
        config.images_per_step,
        exact=config.train.exact_sum,
        flop=flop_per_image(config),
        peak=peak and peak * accelerator.num_processes,
    )
