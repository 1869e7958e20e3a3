"""Batches of one rank: the order, the shards and a ring of decoding processes.

    order (which ids) -> rank rows (which of them) -> workers (decode) -> ring -> training loop

Each worker decodes whole local batches straight into a row of a shared uint8 ring that exists
before it starts; only a slot number and a few integers travel between processes. Worker w serves
local batches w, w + W, ... and DataLoader takes them in strict rotation, so the batches do not
depend on the number of workers. The loader is never given to ``accelerator.prepare``: it is cut by
rank here.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.config.schema import Config
from pipeline.data.cache import Cache, check_shards
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, read_index
from pipeline.runtime.errors import DataError
from pipeline.runtime.ranks import on_every_rank, run_on_selected_ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Batch(NamedTuple):
    """This rank's rows of one global batch.

    ``images`` is (n, H, W, C) uint8 in the ring: valid until the next batch but one is asked for.
    ``labels`` (-1 = none), ``ids`` and ``positions`` are int64 (n,).
    """

    images: Tensor
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]


def open_data(config: Config, accelerator: Accelerator) -> Index:
    """The checked index of ``data.shards``; remote shards are fetched once per node.

    Raises:
        DataError: shards missing or damaged, or of other images or labels than ``model`` says.
        Stopped: a stop signal came to any rank while shards were checked or fetched.
    """
    data = config.data
    index = on_every_rank(accelerator, lambda: checked_index(config))

    def make_ready(stop: Callable[[], bool]) -> None:
        check_shards(index, data.verify, stop)
        if data.window == 0:  # a uniform order needs every shard from the first batch on
            Cache(index, data.cache_dir, data.cache_gib, stop).fetch_all()

    run_on_selected_ranks(accelerator, accelerator.is_local_main_process, make_ready)
    return index


def checked_index(config: Config) -> Index:
    """The index of ``data.shards``, whose images and labels the model takes.

    Raises:
        DataError: none there, damaged, or of other images or labels.
    """
    data, model = config.data, config.model
    make = f"python -m pipeline.prepare fashion-mnist --out {data.shards}"
    shape = f"--size {model.image_size} --channels {model.channels}"
    index = read_index(data.shards, f"{make} {shape} (or a folder of images for fashion-mnist)")
    index.require_shape(model.image_shape, "data.shards")
    labels, classes = index.table["label"], model.num_classes
    if classes and not ((labels >= 0) & (labels < classes)).all():
        raise DataError(
            f"data.shards ({data.shards}): labels {labels.min()} (-1: none) to {labels.max()}, but "
            f"model.num_classes ({classes}) wants 0 to {classes - 1} for every sample: prepare "
            "labelled shards, set model.num_classes to the number of their labels, or to 0."
        )
    if lost := sorted(set(range(classes)) - set(np.unique(labels).tolist())):
        raise DataError(
            f"data.shards ({data.shards}): no sample has the label {', '.join(map(str, lost[:9]))}"
            f"{', ...' if len(lost) > 9 else ''}, but with model.num_classes ({classes}) G draws "
            "every class as often as the others: number the labels from 0 without gaps and "
            f"set model.num_classes to {classes - len(lost)}, or to 0."
        )
    return index


def make_order(config: Config, index: Index) -> Order:
    """The data order of a run over an index."""
    data = config.data
    return Order(
        index.sizes, config.run.seed, block=data.block, window=data.window, lanes=data.lanes
    )


class Loader:
    """An endless stream of this rank's batches, from any global step on.

    Args:
        config: batch size, workers, prefetch and cache.
        index: the shard set.
        order: the data order.
        rank, world_size: which rows of each global batch to deliver.
    """

    def __init__(
        self, config: Config, index: Index, order: Order, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.index, self.order = config, index, order
        self.rank, self.world_size = rank, world_size
        self.cache = Cache(index, config.data.cache_dir, config.data.cache_gib)

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of steps ``start_step, start_step + 1, ...``; nothing before them is read.

        Raises:
            DataError: a shard or sample cannot be read (the worker's message, unchanged).
        """
        data = self.config.data
        rows = data.batch_size // self.world_size
        processes = max(1, data.workers)
        slots = data.prefetch + 2  # queued ahead, plus the one in use and the one before it
        ring = _shared_uint8(processes, slots, rows, *self.index.shape)
        stream = _Stream(self, ring, start_step)
        options: dict[str, Any] = {}
        if data.workers:
            self.rows_of(start_step)  # fork shares this epoch's permutation with every worker
            options = {
                "prefetch_factor": data.prefetch,
                "multiprocessing_context": "fork",
                "worker_init_fn": _init_worker,
            }
        loader = DataLoader(
            stream, batch_size=None, num_workers=data.workers, collate_fn=_as_it_is, **options
        )
        # iter() starts the workers now: later, threads of others would be forked with them.
        with _stop_signals_blocked(), warnings.catch_warnings():
            # Python 3.12 warns of fork beside threads; workers touch nothing that others lock.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            items = iter(loader)
        return self._deliver(items, ring)

    @staticmethod
    def _deliver(items: Iterator[Any], ring: Tensor) -> Generator[Batch, None, None]:
        try:
            for item in items:
                if isinstance(item, DataError):
                    raise item
                worker, slot, labels, ids, positions = item
                yield Batch(ring[worker, slot], labels, ids, positions)
        finally:
            del items  # the last reference: ends the workers, also while an error is held

    def rows_of(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(positions, ids) of this rank's rows of a global batch, each int64 (n,)."""
        positions, ids = self.order.batch(step, self.config.data.batch_size)
        rows = self.config.data.batch_size // self.world_size
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        return positions[mine], ids[mine]


class _Stream(IterableDataset[Any]):
    """One worker's share of the local batches, decoded into its part of the ring."""

    def __init__(self, loader: Loader, ring: Tensor, start_step: int) -> None:
        self.loader, self.ring, self.start_step = loader, ring, start_step

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = Reader(self.loader.index, self.loader.cache)
        slots = self.ring[worker].numpy()
        step, turn = self.start_step + worker, 0
        while True:
            slot = turn % len(slots)
            positions, ids = self.loader.rows_of(step)
            try:
                labels = reader.read(ids, slots[slot])
            except DataError as error:
                # Sent, not raised: DataLoader would bury the message in a traceback of its own.
                yield error
                return
            yield worker, slot, labels, ids, positions
            step, turn = step + workers, turn + 1


def _shared_uint8(*shape: int) -> Tensor:
    """Zeros that forked workers share; anonymous memory, so a container's /dev/shm may be tiny."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Workers forked in this block leave stop signals to the training process for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(_: int) -> None:
    Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End on a SIGTERM of the training process, e.g. amid a slow download; on no one else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_it_is(item: Any) -> Any:
    return item


class ToDevice:
    """The inputs of a step on their way to the device, while the step before is still computed.

    On a GPU the copies run on a stream of their own: the computing stream waits for them, the host
    for nothing. A plain ``tensor.to(device)`` makes the host wait until the GPU has caught up, and
    the GPU then idles until the next kernels are launched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The same tensors on the device; on a GPU those given may be overwritten at once."""
        if self._copies is None:
            return [tensor.to(self._device) for tensor in tensors]
        with torch.cuda.stream(self._copies):
            # Page-locked copies; the allocator keeps each until its transfer has ended.
            locked = [tensor.pin_memory() for tensor in tensors]
            moved = [tensor.to(self._device, non_blocking=True) for tensor in locked]
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        for tensor in moved:
            tensor.record_stream(computing)  # not to be reused before the computation is done
        return moved


def normalise(images: Tensor, device: torch.device, channels_last: bool = True) -> Tensor:
    """(n, H, W, C) uint8 -> (n, C, H, W) float32 in [-1, 1] on the device (x / 127.5 - 1).

    uint8 travels, a quarter of the bytes; the permuted view of NHWC is channels_last for free.
    """
    moved = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    scaled = moved.to(torch.float32).div_(127.5).sub_(1.0)
    return scaled if channels_last else scaled.contiguous()
