"""Plan which shards a node downloads when, and which copies make room for them.

The order of the samples says which shards each batch of a node reads, so the future is known. A
shard is fetched a fixed number of batches before its first use (the lead, a window of the order),
and the copy that is needed last makes room (Belady, IBM Systems Journal 5(2), 1966). No plan with
this lead has fewer downloads, for shards of equal size. A longer lead would leave less of the cache
to copies that the next epoch needs (Cao, Felten, Karlin and Li, SIGMETRICS 1995).

The plan is a function of the order, the cut, the size of the cache and its content at the start.
Clocks and networks have no part in it: ``fetcher.Fetcher`` carries it out, and
``benchmarks/scale.py`` simulates it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from pipeline.data.order import Order

FAR = 1 << 62
"""The batch of a next use that lies beyond what was looked at."""
LOOKED_AT_FIRST, PER_BATCH = 1024, 64
"""Batches of the future that are looked at for the first eviction, and more for each batch since:
a look at all of it would delay the start."""


class Fetch(NamedTuple):
    """One shard that has to be in the cache."""

    shard: int
    needed: int
    """The first batch that reads it."""
    evicted: tuple[int, ...]
    """The shards that make room for it."""
    is_download: bool
    """False: the plan has kept its copy."""
    fits: bool
    """False: the batches that are read at once need more than the cache holds."""


class Plan:
    """The downloads of one node.

    Args:
        order: the data order.
        sizes: bytes of each shard.
        batch_size: images of a global batch.
        rows: those of each global batch that the ranks of this node read.
        start: the first batch that is read.
        end: the batch before which the run ends.
        ahead: batches behind the last consumed one that workers may already read.
        capacity: bytes of the cache; None = unlimited.
        held: shards that are in the cache at the start.
    """

    def __init__(
        self,
        order: Order,
        sizes: Sequence[int],
        *,
        batch_size: int,
        rows: slice,
        start: int,
        end: int,
        ahead: int,
        capacity: int | None,
        held: Iterable[int] = (),
    ) -> None:
        self._order, self._sizes, self._batch_size, self._rows = order, sizes, batch_size, rows
        self._start, self._end, self._ahead, self._capacity = start, end, ahead, capacity
        self._bounds = np.cumsum(order.sizes)
        self._epoch = -(-order.num_samples // batch_size)
        together = max(order.window, order.block) * order.lanes
        self._lead = min(self._epoch, -(-together // batch_size) + 1)
        self._now, self._looked = start - 1, start
        # Periods [first, last] of batches that read a shard, those to come, in their order. Batches
        # between two uses that are read at once with both belong to the same period.
        self._stays: dict[int, deque[list[int]]] = {}
        self._coming: deque[tuple[list[int], int]] = deque()
        self._waiting: deque[tuple[list[int], int]] = deque()
        self._in_use: dict[int, list[int]] = {}
        self._ends: list[tuple[int, int]] = []
        self._held = set(held)
        self._used = sum(sizes[shard] for shard in self._held)
        # (-first batch of the next use, shard); entries that are no longer true are passed over.
        self._idle = [(-FAR, shard) for shard in sorted(self._held)]

    def until(self, consumed: int) -> Iterator[Fetch]:
        """Yield what is to be fetched from now on, once batch ``consumed`` was consumed.

        Before the first batch that is ``start - 1``. The first use orders the fetches.
        """
        while self._now <= consumed:
            reach, lead = self._now + self._ahead + 1, self._lead
            if self._capacity is None:
                lead = min(self._epoch, lead + PER_BATCH * (self._now - self._start + 1))
            self._look_to(reach + lead)
            self._retire()
            while self._coming and self._coming[0][0][0] < reach + lead:
                stay, shard = self._coming.popleft()
                self._in_use[shard] = stay
                heappush(self._ends, (stay[1], shard))
                self._waiting.append((stay, shard))
            while self._waiting:
                stay, shard = self._waiting[0]
                if (found := self._fetched(shard, stay, urgent=stay[0] <= reach)) is None:
                    break
                self._waiting.popleft()
                yield found
            self._now += 1

    def shards_of(self, batch: int) -> list[int]:
        """Return the shards that this node's rows of a global batch lie in."""
        ids = self._order.rows(batch, self._batch_size, self._rows.start, self._rows.stop)[1]
        found: list[int] = np.unique(np.searchsorted(self._bounds, ids, side="right")).tolist()
        return found

    def _look_to(self, batch: int) -> None:
        """Note the uses in all batches before one."""
        for k in range(self._looked, min(batch, self._end)):
            for shard in self.shards_of(k):
                stays = self._stays.setdefault(shard, deque())
                if stays and k - stays[-1][1] <= self._ahead + 2:
                    stays[-1][1] = k
                    continue
                stays.append([k, k])
                self._coming.append((stays[-1], shard))
                if len(stays) == 1 and shard in self._held:
                    heappush(self._idle, (-k, shard))
        self._looked = max(self._looked, min(batch, self._end))

    def _retire(self) -> None:
        """Let shards go that no rank reads any more; one may be a batch behind this one."""
        while self._ends and self._ends[0][0] < self._now:
            _, shard = heappop(self._ends)
            if (stay := self._in_use.get(shard)) is None:
                continue
            if stay[1] >= self._now:  # it is read again
                heappush(self._ends, (stay[1], shard))
                continue
            del self._in_use[shard]
            stays = self._stays[shard]
            while stays and stays[0][1] < self._now:
                stays.popleft()
            if shard in self._held:
                heappush(self._idle, (-self._next_use(shard), shard))

    def _next_use(self, shard: int) -> int:
        stays = self._stays.get(shard)
        return stays[0][0] if stays else FAR

    def _fetched(self, shard: int, stay: list[int], *, urgent: bool) -> Fetch | None:
        """Put a shard into the cache; return None if it has to wait for room."""
        if shard in self._held:
            return Fetch(shard, stay[0], (), False, True)
        size, evicted, room = self._sizes[shard], [], self._used
        if self._capacity is not None and room + size > self._capacity:
            seen = LOOKED_AT_FIRST + PER_BATCH * (self._now - self._start)
            self._look_to(self._now + min(2 * self._epoch, seen))
        while self._capacity is not None and room + size > self._capacity and self._idle:
            entry = heappop(self._idle)
            idle = entry[1]
            is_idle = idle in self._held and idle not in self._in_use and idle not in evicted
            if is_idle and -entry[0] == self._next_use(idle):
                evicted.append(idle)
                room -= self._sizes[idle]
        fits = self._capacity is None or room + size <= self._capacity
        if not (fits or urgent):
            for idle in evicted:
                heappush(self._idle, (-self._next_use(idle), idle))
            return None
        self._held.difference_update(evicted)
        self._held.add(shard)
        self._used = room + size
        return Fetch(shard, stay[0], tuple(evicted), True, fits)
