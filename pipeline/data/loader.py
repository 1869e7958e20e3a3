"""Load the batches of one rank: data order, shards, and a ring that worker processes decode into.

    order (sample ids) -> this rank's rows -> workers (decode) -> ring -> training loop

The ring is shared memory, allocated before the workers are forked. A worker decodes a whole local
batch into one of its slots and sends only the number of the slot: a worker that is killed amid a
long message would leave the training waiting for the rest of it. Worker w of W decodes
local batches w, w + W, ... and DataLoader takes them in turn, so the batches do not depend on the
number of workers. Do not pass the loader to ``accelerator.prepare``: it already yields the rows of
one rank only.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.config.schema import Config
from pipeline.data.arrangement import make_order as make_order
from pipeline.data.background import (
    BackgroundCheck,
    leave_signals_to_parent,
    signals_left_to_the_parent,
)
from pipeline.data.cache import Cache, check_shards, hashed_later, node_folder
from pipeline.data.fetcher import Fetcher, Traffic, fetches_ahead
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.remote import Patience, raise_on_stop
from pipeline.data.ring import Ring, make_ring
from pipeline.data.shards import Index, read_index
from pipeline.runtime.console import say
from pipeline.runtime.errors import DataError, UserError, as_user_error
from pipeline.runtime.hardware import page_locked
from pipeline.runtime.host import raise_open_files, remedy_for
from pipeline.runtime.ranks import on_every_rank, run_on_selected_ranks
from pipeline.runtime.signals import Stopped


class Batch(NamedTuple):
    """This rank's n rows of one global batch."""

    images: Tensor
    """(n, H, W, C) uint8, a slot of the ring: overwritten when the second next batch is taken. With
    a GPU in use it is page-locked."""
    labels: NDArray[np.int64]
    """(n,); -1 = no label."""
    ids: NDArray[np.int64]
    """(n,), ids of the samples that were read."""


def open_data(config: Config, accelerator: Accelerator) -> Index:
    """Read the index of ``data.shards`` and check or fetch the shards, once per node.

    Raises:
        DataError: shards missing or damaged, or of other images or labels than ``model`` says.
        Stopped: a stop signal came to any rank while shards were checked or fetched.
    """
    data = config.data
    found: list[Index | UserError] = []

    def read(stop: Callable[[], bool]) -> None:
        try:
            found.append(checked_index(config, stop))
        except Stopped:
            raise
        except Exception as error:
            if (known := as_user_error(error)) is None:
                raise
            found.append(known)

    def result() -> Index:
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    run_on_selected_ranks(accelerator, True, read)  # a server may keep all of them waiting
    index = on_every_rank(accelerator, result)

    def make_ready(stop: Callable[[], bool]) -> None:
        check_shards(index, data.verify, stop, every_byte=not hashed_later(index, data.verify))
        cache = Cache(index, data.cache_dir, data.cache_gib, stop)
        cache.announce()
        if data.verify == "sha256":
            cache.check_copies()
        if not data.window and data.order != "shards":  # uniform: every shard from the start on
            cache.fetch_all()

    run_on_selected_ranks(accelerator, accelerator.is_local_main_process, make_ready)
    return index


def checked_index(config: Config, stop: Callable[[], bool] = raise_on_stop) -> Index:
    """Read the index of ``data.shards``; check that its images and labels fit the model.

    Raises:
        DataError: no index, a damaged one, or other images or labels than the model takes.
        Stopped: ``stop`` returned True while a remote index was waited for.
    """
    data, model = config.data, config.model
    shape = f"--size {model.image_size} --channels {model.channels}"
    tables_at = Path(data.cache_dir).expanduser() if data.cache_dir else node_folder()
    index = read_index(data.shards, shape, stop=stop, tables_at=tables_at)
    index.require_shape(model.image_shape, "data.shards")
    if not (classes := model.num_classes):
        return index
    labels = index.label_counts
    low, high = min(labels), max(labels)
    if low < 0 or high >= classes:
        raise DataError(
            f"data.shards ({data.shards}): labels {low} (-1: none) to {high}, but "
            f"model.num_classes ({classes}) wants 0 to {classes - 1} for every sample: prepare "
            "labelled shards, set model.num_classes to the number of their labels, or to 0."
        )
    if lost := sorted(set(range(classes)) - set(labels)):
        raise DataError(
            f"data.shards ({data.shards}): no sample has the label {', '.join(map(str, lost[:9]))}"
            f"{', ...' if len(lost) > 9 else ''}, but with model.num_classes ({classes}) G draws "
            "every class as often as the others: number the labels from 0 without gaps and "
            f"set model.num_classes to {classes - len(lost)}, or to 0."
        )
    return index


class Loader:
    """Endless batches of one rank, from any global batch on.

    Args:
        config: batch size, workers, prefetch and cache.
        index: the shards.
        order: the data order.
        rank: of ``world_size``; its rows of each global batch are loaded.
        world_size: number of ranks; it divides ``data.batch_size``.
    """

    def __init__(
        self, config: Config, index: Index, order: Order, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.index, self.order = config, index, order
        self.rank, self.world_size = rank, world_size
        self.cache = Cache(index, config.data.cache_dir, config.data.cache_gib, Patience())
        self._check: BackgroundCheck | None = None
        self._fetcher: Fetcher | None = None
        self.traffic: Traffic | None = None
        """Of a run that downloads shards while it trains."""
        self._damaged: set[int] = set()

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Fork the workers and yield global batches ``start``, ``start + 1``, ... without an end.

        Raises:
            DataError: a shard or sample cannot be read (the worker's message, unchanged).
        """
        data = self.config.data
        rows = data.batch_size // self.world_size
        processes = max(1, data.workers)
        slots = data.prefetch + 2  # queued ahead, plus the one in use and the one before it
        ring = make_ring(processes, slots, rows, self.index.shape)
        if fetches_ahead(self.order, self.cache):
            self.traffic = Traffic(processes)
        batches = _WorkerBatches(self, ring, start)
        options: dict[str, Any] = {}
        if data.workers:
            self.ids_of(start)  # compute the epoch's permutation once: workers inherit it by fork
            options = {
                "prefetch_factor": data.prefetch,
                "multiprocessing_context": "fork",
                "worker_init_fn": leave_signals_to_parent,
            }
        loader = DataLoader(
            batches, batch_size=None, num_workers=data.workers, collate_fn=_identity, **options
        )
        # iter() forks the workers now, before other parts of the program start threads.
        with signals_left_to_the_parent(), warnings.catch_warnings():
            # Python 3.12 warns of fork beside threads; workers touch nothing that others lock.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                self._start_helpers(start)
            items = self._started(loader)
        return self._deliver(items, ring, start)

    def _start_helpers(self, start: int) -> None:
        """Fork the processes of which a node has one."""
        if hashed_later(self.index, self.config.data.verify):
            positions = start * self.config.data.batch_size
            self._check = BackgroundCheck(self.index, self.order, positions)
        if self.traffic is not None:
            parts, ranks = (self.config, self.cache, self.order), (self.rank, self.world_size)
            self._fetcher = Fetcher(*parts, ranks=ranks, start=start, traffic=self.traffic)

    def _started(self, loader: DataLoader[Any]) -> Iterator[Any]:
        raise_open_files()  # each worker takes several pipes
        try:
            return iter(loader)
        except OSError as error:
            message = (
                f"data.workers ({loader.num_workers}): cannot be started ({error.strerror}): "
                f"{remedy_for(error) or 'remove the cause'}, or lower data.workers; with "
                "data.workers=0 the training process reads by itself."
            )
            # DataLoader's half-made iterator goes with the frames, and would print a traceback.
            show, sys.unraisablehook = sys.unraisablehook, lambda _: None
            error.with_traceback(None)
            sys.unraisablehook = show
        raise DataError(message)

    def _deliver(
        self, items: Iterator[Any], ring: Ring, start: int
    ) -> Generator[Batch, None, None]:
        try:
            with page_locked(ring.images):  # after the fork: it is this process's lock
                for k in itertools.count(start):
                    try:
                        item = next(items)
                    except RuntimeError as error:  # DataLoader's word for a worker that has died
                        if "DataLoader worker" not in str(error):
                            raise
                        raise self._killed() from None
                    if isinstance(item, UserError):
                        raise item
                    if self._check is not None:
                        self._check.raise_if_faulty()
                    if self.traffic is not None:
                        self.traffic.state[0] = k
                    labels, ids, wanted = ring.numbers[item].numpy().copy()
                    self._say_replaced(wanted[wanted != ids], ids[wanted != ids])
                    yield Batch(ring.images[item], labels, ids)
        finally:
            del items  # the last reference: the workers end, even if a traceback holds the frame
            for helper in (self._check, self._fetcher):
                if helper is not None:
                    helper.close()

    def _say_replaced(self, damaged: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        for bad, good in zip(damaged.tolist(), used.tolist(), strict=True):
            if bad not in self._damaged:
                self._damaged.add(bad)
                say(
                    f"warning: data.shards: sample {bad} is damaged, sample {good} takes its place "
                    f"({len(self._damaged)} until now on this rank; data.skip_damaged). Find out "
                    f"why: python -m pipeline.prepare --verify {self.index.location}"
                )

    def finish_check(self, end: int, stop: Callable[[], bool]) -> None:
        """Wait until the shards of all batches before ``end`` are compared with their checksums.

        Raises:
            DataError: one differs.
            Stopped: ``stop`` returned True; some are not compared.
        """
        if self._check is not None:
            positions = end * self.config.data.batch_size
            if left := self._check.left(positions):
                say(f"comparing {left} shards with their checksums before the run ends")
            self._check.finish(positions, stop)

    def _killed(self) -> DataError:
        intact = "The last checkpoint is intact"
        return DataError(
            f"data.workers ({self.config.data.workers}): a data worker was killed, most often for "
            f"lack of memory. {intact}: lower data.workers or data.prefetch, or give the job more "
            "memory, and run the same command again."
        )

    def ids_of(self, k: int) -> NDArray[np.int64]:
        """Return the sample ids (n,) of this rank's rows of global batch k."""
        batch = self.config.data.batch_size
        rows = batch // self.world_size
        return self.order.rows(k, batch, self.rank * rows, (self.rank + 1) * rows)[1]


class _WorkerBatches(IterableDataset[Any]):
    """The local batches of one worker, decoded into its slots of the ring."""

    def __init__(self, loader: Loader, ring: Ring, start: int) -> None:
        self.loader, self.ring, self.start = loader, ring, start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = Reader(self.loader.index, self.loader.cache, self.loader.config.data.skip_damaged)
        images, numbers = (part[worker].numpy() for part in self.ring)
        k, turn = self.start + worker, 0
        while True:
            slot = turn % len(images)
            ids = self.loader.ids_of(k)
            try:
                numbers[slot, 2] = ids
                numbers[slot, :2] = reader.read_intact(ids, images[slot])
            except Stopped:
                yield DataError(
                    f"data.shards ({self.loader.index.location}): a stop was requested while a "
                    "shard was waited for. The last checkpoint is intact: run the same command "
                    "again to go on."
                )
                return
            except (UserError, OSError, MemoryError) as error:
                # DataLoader would wrap a raised error in a traceback of its own.
                yield as_user_error(error) or DataError(str(error))
                return
            if self.loader.traffic is not None:
                self.loader.traffic.note(worker, self.loader.cache)
            yield worker, slot
            k, turn = k + workers, turn + 1


def _identity(item: Any) -> Any:
    return item


def normalise(images: Tensor, device: torch.device, channels_last: bool = True) -> Tensor:
    """Convert (n, H, W, C) uint8 to (n, C, H, W) float32 in [-1, 1] on the device: x / 127.5 - 1.

    The copy to the device is of uint8, a quarter of the bytes. A permuted NHWC tensor is
    channels_last already.
    """
    moved = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    scaled = moved.to(torch.float32).div_(127.5).sub_(1.0)
    return scaled if channels_last else scaled.contiguous()
