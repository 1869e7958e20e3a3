"""Read what the updates of a step need: real images, z and classes of this rank, on its device."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.cache import hashed_later
from pipeline.data.loader import Loader, normalise
from pipeline.data.order import Order
from pipeline.data.shards import Index
from pipeline.models.noise import BY_ROW, append_classes, rng, training_z
from pipeline.runtime.documents import write_all
from pipeline.runtime.log_file import open_to_append
from pipeline.runtime.ranks import run_on_selected_ranks
from pipeline.runtime.signals import Stopped
from pipeline.training.meter import Meter

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """This rank's micro-batches for one update of D, and for the update of G that follows it."""

    real: Sequence[Tensor]
    """Images, (m, C, S, S) float32 in [-1, 1] each."""
    z: Sequence[Tensor]
    """Input of G, (m, z_dim + num_classes) float32 each."""
    y: Sequence[Tensor] | None
    """Classes, (m,) int64 each; None without ``model.num_classes``."""


class InputReader(Iterator[Inputs]):
    """An endless iterator over ``Inputs``, from any update of D on.

    Update u takes the images of global batch u of the data order, and z of the same positions
    (``training_z``). With ``train.mirror`` it mirrors the images that ``rng(run.seed, "mirror",
    u)`` chooses. Each rank takes its rows, so the global batch is the same on any number of ranks.

    Args:
        config: the whole configuration.
        index: the shards.
        order: the data order.
        accelerator: says which rows are this rank's, and where they go.
        micro_batch: images per micro-batch.
        meter: counts the time that the loader was waited for.
        start: the first update of D, from 0. Nothing before it is read.
        noise: the rule by which z are drawn, ``rows`` or ``batch``.
    """

    def __init__(
        self,
        config: Config,
        index: Index,
        order: Order,
        accelerator: Accelerator,
        *,
        micro_batch: int,
        meter: Meter,
        start: int = 0,
        noise: str = BY_ROW,
    ) -> None:
        self._noise = noise
        self._config, self._micro_batch, self._meter = config, micro_batch, meter
        rank, ranks, size = (
            accelerator.process_index,
            accelerator.num_processes,
            config.data.batch_size,
        )
        self._rows = slice(rank * size // ranks, (rank + 1) * size // ranks)
        self._update, self._device = start, accelerator.device
        self._to_device, self._ids = ToDevice(accelerator.device), IdLog(config, rank, ranks)
        self._accelerator = accelerator
        self._loader = Loader(config, index, order, rank, ranks)
        self._batches = self._loader.batches(start)
        traffic = self._loader.traffic
        meter.traffic = traffic.row if traffic is not None else None

    def __next__(self) -> Inputs:
        """Return the inputs of the next update of D.

        Raises:
            DataError: a shard or sample cannot be read.
        """
        config = self._config
        with self._meter.waiting():
            batch = next(self._batches)
        self._ids.write(self._update + 1, batch.ids.tolist())
        labels = torch.from_numpy(batch.labels)
        size, rows = config.data.batch_size, self._rows
        place = self._update * size + rows.start, rows.stop - rows.start, size
        z = training_z(config.model, config.run.seed, *place, self._noise)
        z = append_classes(config.model, z, labels)
        images, z, labels, flips = self._to_device(batch.images, z, labels, self._flips())
        if config.train.mirror:
            images = torch.where(flips[:, None, None, None], images.flip(2), images)
        real = normalise(images, self._device, config.train.channels_last)
        self._update += 1
        y = labels.split(self._micro_batch) if config.model.num_classes else None
        return Inputs(real.split(self._micro_batch), z.split(self._micro_batch), y)

    def _flips(self) -> Tensor:
        """Return which images of the next update are mirrored, (n,) bool; n is 0 without mirror."""
        config = self._config
        count = config.data.batch_size if config.train.mirror else 0
        numbers = torch.rand(count, generator=rng(config.run.seed, "mirror", self._update))
        return numbers[self._rows] < 0.5

    def finish_check(self) -> None:
        """Wait until the shards that were read are compared with their checksums.

        All ranks call it before the last checkpoint. A stop request ends the wait.

        Raises:
            DataError: a shard differs.
        """
        if not hashed_later(self._loader.index, self._config.data.verify):
            return
        try:
            run_on_selected_ranks(
                self._accelerator,
                self._accelerator.is_local_main_process,
                lambda stop: self._loader.finish_check(self._update, stop),
            )
        except Stopped:
            log.warning(
                "stopped before every shard was compared with its checksum: check them with "
                f"python -m pipeline.prepare --verify {self._loader.index.location}"
            )

    def close(self) -> None:
        """End the data workers."""
        self._batches.close()


class ToDevice:
    """A copy of the next inputs to the device while the step before is still computed.

    On a GPU the copies run on a CUDA stream of their own. The compute stream waits for them, the
    host does not. After a plain ``tensor.to(device)`` the host would wait until the GPU has caught
    up, and the GPU would then idle until the next kernels are launched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors on the device.

        On a GPU a page-locked original, as a batch of the loader is one, may be overwritten after
        the next call, others at once.
        """
        if self._copy_stream is None or self._copied is None:
            return [tensor.to(self._device) for tensor in tensors]
        self._copied.synchronize()  # the copies of the last call: done since long before
        with torch.cuda.stream(self._copy_stream):
            # Page-locked tensors stay as they are; of others a copy is made, which the allocator
            # keeps until its transfer has ended.
            pinned = [tensor.pin_memory() for tensor in tensors]
            moved = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            self._copied.record()
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_stream(self._copy_stream)
        for tensor in moved:
            # Its memory must not be reused before the computation has read it.
            tensor.record_stream(compute_stream)
        return moved


class IdLog:
    """A file with the sample ids of every batch of this rank, as evidence of the data order.

    ``ids/rank_R.jsonl`` in the run folder has one line per update of D. Without
    ``data.record_ids`` nothing is written.
    """

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._world_size, self._file = world_size, None
        if config.data.record_ids:
            folder = Path(config.run.dir).expanduser() / "ids"
            folder.mkdir(exist_ok=True)
            self._file = open_to_append(folder / f"rank_{rank}.jsonl")
            if self._file.tell():
                self._file.write(b"\n")  # a killed run may have left half a line

    def write(self, update: int, ids: list[int]) -> None:
        """Record the ids of update ``update`` of D, counted from 1."""
        if self._file:
            row = {"step": update, "world_size": self._world_size, "ids": ids}
            write_all(self._file, json.dumps(row).encode() + b"\n")
