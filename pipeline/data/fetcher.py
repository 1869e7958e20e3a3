"""Download shards before the data workers need them: one process per node carries out a ``Plan``.

The first rank of a node forks it beside its workers. A worker that needs a shard which is not there
yet downloads it by itself, or waits for the lock of the download in progress. So a fetcher that is
late, fails or is killed costs time alone, and what is wrong with a shard is said by the worker that
needs it.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
import multiprocessing
import os
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess

import numpy as np

from pipeline.config.schema import Config
from pipeline.data.background import leave_signals_to_parent
from pipeline.data.cache import Cache
from pipeline.data.order import Order
from pipeline.data.plan import Fetch, Plan
from pipeline.data.remote import Patience
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError, as_user_error
from pipeline.runtime.hardware import local_world_size
from pipeline.runtime.signals import Stopped

CONNECTIONS = 8
POLL_SECONDS = 0.05
PAUSE_SECONDS = 10.0
"""After a download that failed, in which time the workers may have better luck."""
LEAVE_SECONDS = 5.0


def fetches_ahead(order: Order, cache: Cache) -> bool:
    """Return whether a run downloads shards while it trains; else they are here before step 1."""
    in_turn = order.block > 1 and (order.window > 0 or cache.limit > 0)
    return cache.index.is_remote and in_turn


class Traffic:
    """What a rank's workers and its node's fetcher waited for and downloaded; they share it.

    Args:
        workers: data workers of this rank, at least 1.
    """

    def __init__(self, workers: int) -> None:
        numbers = np.frombuffer(mmap.mmap(-1, 8 * (4 + 2 * workers)), np.float64)
        self.state, parts = numbers[:4], numbers[4:].reshape(2, workers)
        """Last consumed batch, whether the fetcher shall end, its bytes, and the cache's."""
        self.waited, self.fetched = parts
        self._before = 0.0, 0.0, time.monotonic()

    def note(self, worker: int, cache: Cache) -> None:
        """Take over the counts of a worker's cache."""
        self.waited[worker], self.fetched[worker] = cache.waited, cache.fetched

    def row(self, steps: int) -> dict[str, float]:
        """Return the metrics of the steps since the last call.

        ``perf/fetch_wait``: seconds of a step that a worker of this rank waited for shards, on
        average; ``perf/fetch_mb_per_sec``: of this node's fetcher and this rank's workers;
        ``perf/cache_gib``: GiB of copies in the cache folder.
        """
        waited, since = float(self.waited.mean()), time.monotonic()
        fetched = float(self.fetched.sum() + self.state[2])
        seconds = max(1e-9, since - self._before[2])
        values = {
            "perf/fetch_wait": (waited - self._before[0]) / max(1, steps),
            "perf/fetch_mb_per_sec": (fetched - self._before[1]) / 1e6 / seconds,
            "perf/cache_gib": float(self.state[3]) / 2**30,
        }
        self._before = waited, fetched, since
        return values


class Fetcher:
    """The process of a node that downloads ahead; make it where the data workers are forked.

    Args:
        config: batch size, workers, prefetch and the end of the run.
        cache: where the copies go.
        order: the data order of the run.
        ranks: number of this rank, the first of its node, and of all ranks.
        start: the first batch that is read.
        traffic: counters that the process shares.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        order: Order,
        *,
        ranks: tuple[int, int],
        start: int,
        traffic: Traffic,
    ) -> None:
        self._config, self._cache = config, copy.copy(cache)
        first, world_size = ranks
        rows, last = config.data.batch_size // world_size, first + local_world_size()
        node = slice(first * rows, min(last, world_size) * rows)
        self._plan = self.plan_of(config, cache, order, node, start)
        self._state, self._parent, self._patience = traffic.state, os.getpid(), Patience()
        self._state[0] = start - 1
        self._shards, self._said, self._not_before = cache.index.shards, False, 0.0
        self._queue = deque[Fetch]()
        self._running: dict[Future[int], Fetch] = {}
        if cache.limit and cache.used():  # the first workers must not evict what will be needed
            for fetch in self._plan.until(start - 1):
                self._take(fetch)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._work, daemon=True, name="fetcher")
        self._process.start()
        self.close = weakref.finalize(self, _end, self._process, self._state, self._parent)

    def _leaves(self) -> bool:
        gone = os.getppid() != self._parent
        return gone or bool(self._state[1]) or self._patience()

    @staticmethod
    def plan_of(config: Config, cache: Cache, order: Order, rows: slice, start: int) -> Plan:
        """Return the plan of a node that reads these rows of each global batch."""
        data, ahead = config.data, read_ahead(config.data.workers, config.data.prefetch)
        return Plan(
            order,
            [shard.filesize for shard in cache.index.shards],
            batch_size=data.batch_size,
            rows=rows,
            start=start,
            end=config.train.total_steps * config.optim.d_steps + ahead,  # workers know no end
            ahead=ahead,
            capacity=cache.limit or None,
            held=cache.held(),
        )

    def _work(self) -> None:
        """Carry out the plan, in the process that was forked."""
        leave_signals_to_parent()
        self._cache.stop = self._leaves
        looked = 0.0
        with ThreadPoolExecutor(CONNECTIONS) as self._pool:
            while not self._leaves():
                for fetch in self._plan.until(int(self._state[0])):
                    self._take(fetch)
                    self._go_on()
                    if self._leaves():
                        return
                self._go_on()
                if (now := time.monotonic()) > looked + 1:
                    self._state[3], looked = self._cache.used(), now
                time.sleep(POLL_SECONDS)

    def _take(self, fetch: Fetch) -> None:
        for number in fetch.evicted:
            self._cache.release(self._shards[number])
        if fetch.fits:
            self._queue.append(fetch)
        else:  # the workers download it when they need it
            self._warn(
                f"data.cache_gib ({self._config.data.cache_gib:g}): the shards that are read at "
                "the same time do not fit, so that some are downloaded again and again. Raise it, "
                "or lower data.window, data.prefetch or data.workers."
            )

    def _go_on(self) -> None:
        """Collect downloads that have ended, and begin others."""
        for done in [future for future in self._running if future.done()]:
            fetch = self._running.pop(done)
            try:
                self._state[2] += done.result()
            except Stopped:
                return
            except (UserError, OSError, MemoryError) as error:
                self._warn(str(as_user_error(error) or error))
                self._not_before = time.monotonic() + PAUSE_SECONDS
                if fetch.needed > self._state[0]:
                    self._queue.appendleft(fetch)
        while self._queue and len(self._running) < CONNECTIONS:
            if time.monotonic() < self._not_before:
                return
            fetch = self._queue.popleft()
            if any(other.shard == fetch.shard for other in self._running.values()):
                continue  # locks do not exclude threads of one process
            for number in fetch.evicted:
                self._cache.evict(self._shards[number])
            self._running[self._pool.submit(self._obtain, fetch.shard)] = fetch

    def _obtain(self, number: int) -> int:
        """Return the bytes that had to be downloaded for a shard to be there."""
        cache = copy.copy(self._cache)
        cache.fetched = 0
        cache.path(self._shards[number])
        return cache.fetched

    def _warn(self, text: str) -> None:
        if not self._said:
            say(f"warning: shards are not downloaded ahead as planned: {text}")
            self._said = True


def read_ahead(workers: int, prefetch: int) -> int:
    """Return how many batches behind the last consumed one the workers of a rank may read."""
    return workers * prefetch + 1


def _end(process: BaseProcess, state: np.ndarray, parent: int) -> None:
    if os.getpid() == parent:  # not in a data worker, which has a copy of the object
        with contextlib.suppress(ValueError):
            state[1] = 1
        process.join(LEAVE_SECONDS)  # it removes what it has downloaded in part
        if process.is_alive():
            process.terminate()
        process.join()
