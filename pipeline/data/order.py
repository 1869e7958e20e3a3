"""Stream position -> sample id: the data order as a pure, versioned, random-access function.

A run reads one endless stream. Position p lies in epoch ``p // N``; positions ``[eN, (e+1)N)`` hold
every sample exactly once. Global batch k of size B is positions ``[kB, (k+1)B)``; ranks and workers
cut its rows and never influence the order. Hence one integer resumes the stream in O(1) on any
number of ranks and workers.

The algorithm is named "lwb1" (lanes, windows, blocks) and frozen by test vectors: a change of a
single id is a new name. It uses only raw Philox bits, whose stream numpy guarantees (NEP 19).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ALGORITHM = "lwb1"
Ids = NDArray[np.int64]
Cache = OrderedDict[tuple[int, ...], tuple[Ids, ...]]


def permutation(n: int, key: str) -> Ids:
    """A uniform permutation of ``range(n)``, a function of ``key`` alone; int64, shape (n,)."""
    words = np.frombuffer(blake2b(key.encode(), digest_size=16).digest(), "<u8")
    raw = np.random.Philox(key=words).random_raw(n)
    # The index in the low bits makes every word distinct, so the sort needs no tie rule.
    low = np.uint64(max(1, (n - 1).bit_length()) if n else 1)
    tagged = (raw >> low << low) | np.arange(n, dtype=np.uint64)
    tagged.sort()
    return (tagged & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def _one_permutation(n: int, key: str) -> tuple[Ids]:
    return (permutation(n, key),)


class Order:
    """The order of one data set under one seed.

    Args:
        sizes: samples per shard, in the order of the index; zeros are allowed.
        seed: the run's seed.
        block: samples of a shard that stay adjacent (1 = a uniform permutation of everything).
        window: rows shuffled among each other after the blocks are laid out (0 = none).
        lanes: stripes dealt round-robin, so that with as many nodes each reads its own shards.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, *, block: int = 1, window: int = 0, lanes: int = 1
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples == 0 or self.sizes.min() < 0:
            raise ValueError("sizes must hold at least one sample and no negative number")
        if block < 1 or window < 0 or lanes < 1:
            raise ValueError(f"block ({block}), lanes ({lanes}) >= 1 and window ({window}) >= 0")
        self.seed, self.block, self.window, self.lanes = seed, block, window, lanes
        if block > 1:  # else every block is one sample and needs no table
            self._block_starts, self._block_sizes = _cut(self.sizes, block)
        self._layouts: Cache = OrderedDict()
        self._windows: Cache = OrderedDict()

    def describe(self) -> dict[str, int | str]:
        """What must be equal for two orders to be the same over the same samples."""
        return {
            "algorithm": ALGORITHM,
            "seed": self.seed,
            "block": self.block,
            "window": self.window,
            "lanes": self.lanes,
        }

    def ids(self, positions: Ids) -> Ids:
        """Sample ids in ``[0, N)`` at stream positions; int64, same shape (n,)."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._ids_in_epoch(int(epoch), places[chosen])
        return out

    def batch(self, k: int, batch_size: int) -> tuple[Ids, Ids]:
        """(positions, ids) of global batch k, each int64 (batch_size,), rows grouped by lane."""
        positions = np.arange(k * batch_size, (k + 1) * batch_size, dtype=np.int64)
        if self.lanes > 1:
            lane = positions % self.num_samples % self.lanes
            positions = positions[np.argsort(lane, kind="stable")]
        return positions, self.ids(positions)

    def _ids_in_epoch(self, epoch: int, places: Ids) -> Ids:
        rows, lanes = np.divmod(places, self.lanes)
        quotient, rest = divmod(self.num_samples, self.lanes)
        sizes = quotient + (lanes < rest)
        if self.window:
            rows = self._shuffle_windows(epoch, lanes, rows, sizes)
        place = lanes * quotient + np.minimum(lanes, rest) + rows
        permuted, ends = self._blocks(epoch)
        if self.block == 1:
            out: Ids = permuted[place]
            return out
        at = np.searchsorted(ends, place, side="right")
        block = permuted[at]
        within: Ids = place - (ends[at] - self._block_sizes[block])
        return self._block_starts[block] + within

    def _shuffle_windows(self, epoch: int, lanes: Ids, rows: Ids, sizes: Ids) -> Ids:
        out = np.empty_like(rows)
        windows = rows // self.window
        tags = lanes * (self.num_samples // self.window + 1) + windows
        for tag in np.unique(tags):
            chosen = tags == tag
            lane, window = int(lanes[chosen][0]), int(windows[chosen][0])
            start = window * self.window
            length = min(self.window, int(sizes[chosen][0]) - start)
            key = f"{ALGORITHM}|{self.seed}|{epoch}|lane {lane}|window {window}"
            (shuffled,) = _remember(
                # A batch may touch two windows of every lane, in two epochs.
                self._windows,
                4 * self.lanes,
                (epoch, lane, window),
                partial(_one_permutation, length, key),
            )
            out[chosen] = start + shuffled[rows[chosen] - start]
        return out

    def _blocks(self, epoch: int) -> tuple[Ids, ...]:
        def build() -> tuple[Ids, ...]:
            key = f"{ALGORITHM}|{self.seed}|{epoch}|blocks"
            if self.block == 1:
                permuted = permutation(self.num_samples, key)
                return permuted, permuted
            permuted = permutation(len(self._block_sizes), key)
            return permuted, np.cumsum(self._block_sizes[permuted])

        return _remember(self._layouts, 2, (epoch,), build)  # two epochs meet in one batch


def _remember(
    cache: Cache, limit: int, key: tuple[int, ...], build: Callable[[], tuple[Ids, ...]]
) -> tuple[Ids, ...]:
    if key not in cache:
        cache[key] = build()
        while len(cache) > limit:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def _cut(sizes: Ids, block: int) -> tuple[Ids, Ids]:
    """Starts and sizes of each shard's ceil(n / block) near-equal contiguous runs."""
    counts = -(-sizes // block)
    shard = np.repeat(np.arange(len(sizes)), counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    lower = sizes[shard] * index // counts[shard]
    upper = sizes[shard] * (index + 1) // counts[shard]
    return (np.cumsum(sizes) - sizes)[shard] + lower, upper - lower
