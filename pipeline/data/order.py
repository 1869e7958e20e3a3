"""Compute the sample id of any position in the data order, without computing those before it.

A run reads an endless sequence of positions. Position p lies in epoch ``p // N``, and each epoch
``[eN, (e+1)N)`` holds every sample exactly once. Global batch k of size B is the positions
``[kB, (k+1)B)``. Ranks and workers take rows of it, but do not change the order. Hence one integer
resumes the order in O(1) on any number of ranks and workers.

The algorithms are frozen by test vectors: if a single id changes, the name must change. "lwb1"
(lanes, windows, blocks) sorts random words, raw Philox bits, which numpy guarantees (NEP 19).
"lwb2" is a uniform order (block = 1) of ``bijection.SMALLEST`` samples or more: the permutation of
the whole set is computed place by place, without a table. All else about it is as in lwb1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from pipeline.data import bijection

SORTED, COMPUTED = "lwb1", "lwb2"
Ids = NDArray[np.int64]
Cache = OrderedDict[tuple[int, ...], tuple[Ids, ...]]


def permutation(n: int, key: str) -> Ids:
    """Return a uniform permutation of ``range(n)``, which depends only on ``key``: int64 (n,)."""
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
        block: number of samples of a shard that stay adjacent; the blocks are shuffled. 1 = a
            uniform permutation of all samples.
        window: number of consecutive samples that are shuffled among each other after the blocks
            were shuffled; 0 = none.
        lanes: number of near-equal parts that an epoch is cut into before positions are dealt to
            them in turn. Batches are sorted by lane, so a node reads whole shards if the job never
            uses more nodes than lanes (MosaicML: ``num_canonical_nodes``).
        algorithm: of the run that is resumed: ``lwb1`` keeps a uniform order of many samples as
            versions before lwb2 had it. By default the order is lwb2 where that exists.

    Raises:
        ValueError: there are no samples, or a setting is out of range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        *,
        block: int = 1,
        window: int = 0,
        lanes: int = 1,
        algorithm: str = COMPUTED,
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples == 0 or self.sizes.min() < 0:
            raise ValueError("sizes must hold at least one sample and no negative number")
        if block < 1 or window < 0 or lanes < 1:
            raise ValueError(f"block ({block}), lanes ({lanes}) >= 1 and window ({window}) >= 0")
        self.seed, self.block, self.window, self.lanes = seed, block, window, lanes
        if block > 1:  # else a block is one sample and needs no table
            self._block_starts, self._block_sizes = _cut(self.sizes, block)
        has_both = block == 1 and self.num_samples >= bijection.SMALLEST
        self.algorithm = COMPUTED if has_both and algorithm == COMPUTED else SORTED
        self._layouts: Cache = OrderedDict()
        self._windows: Cache = OrderedDict()

    def describe(self) -> dict[str, int | str]:
        """Return the settings; over the same samples, equal settings make equal orders."""
        return {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "block": self.block,
            "window": self.window,
            "lanes": self.lanes,
        }

    def ids(self, positions: Ids) -> Ids:
        """Return the sample ids in [0, N) at the given positions (n,): int64 (n,)."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._ids_in_epoch(int(epoch), places[chosen])
        return out

    def batch(self, k: int, batch_size: int) -> tuple[Ids, Ids]:
        """Return (positions, ids) of global batch k, int64 (batch_size,) each, sorted by lane."""
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
        if self.algorithm == COMPUTED:
            return bijection.shuffled(place, self.num_samples, self._key(epoch))
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
            key = f"{self.algorithm}|{self.seed}|{epoch}|lane {lane}|window {window}"
            (shuffled,) = _remember(
                # One batch can hold rows of two windows of every lane, in two epochs.
                self._windows,
                4 * self.lanes,
                (epoch, lane, window),
                partial(_one_permutation, length, key),
            )
            out[chosen] = start + shuffled[rows[chosen] - start]
        return out

    def _key(self, epoch: int) -> str:
        return f"{self.algorithm}|{self.seed}|{epoch}|blocks"

    def _blocks(self, epoch: int) -> tuple[Ids, ...]:
        def build() -> tuple[Ids, ...]:
            key = self._key(epoch)
            if self.block == 1:
                permuted = permutation(self.num_samples, key)
                return permuted, permuted
            permuted = permutation(len(self._block_sizes), key)
            return permuted, np.cumsum(self._block_sizes[permuted])

        return _remember(self._layouts, 2, (epoch,), build)  # one batch can hold rows of two epochs


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
    """Return (starts, sizes) of the blocks: ceil(n / block) near-equal blocks per shard of n."""
    counts = -(-sizes // block)
    shard = np.repeat(np.arange(len(sizes)), counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    lower = sizes[shard] * index // counts[shard]
    upper = sizes[shard] * (index + 1) // counts[shard]
    return (np.cumsum(sizes) - sizes)[shard] + lower, upper - lower
