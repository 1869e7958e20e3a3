"""Compute the sample id of any position in the data order, without computing those before it.

A run reads an endless sequence of positions. Position p lies in epoch ``p // N``, and each epoch
``[eN, (e+1)N)`` holds every sample exactly once. Global batch k of size B is the positions
``[kB, (k+1)B)``. Ranks and workers take rows of it, but do not change the order. Hence one integer
resumes the order in O(1) on any number of ranks and workers.

The algorithms are frozen by test vectors: if a single id changes, the name must change. "lwb1"
(lanes, windows, blocks) makes tables, of all blocks and of each window. Orders of
``bijection.SMALLEST`` samples or more compute single places. "lwb2" does so for the samples of a
uniform order (block = 1), and windows are as in lwb1. "lwb3" does so for blocks and windows, too;
its blocks are those of ``Blocks``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pipeline.data import bijection
from pipeline.data.bijection import Ids
from pipeline.data.bijection import permutation as permutation
from pipeline.data.blocks import Blocks

SORTED, COMPUTED, BY_ROW = "lwb1", "lwb2", "lwb3"
Cache = OrderedDict[tuple[int, ...], tuple[Ids, ...]]


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
        algorithm: of the run that is resumed, which goes on with it. By default, and where such
            settings never had it, the newest: lwb2 for uniform orders, lwb3 for others, and lwb1
            for either of fewer samples.

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
        algorithm: str | None = None,
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples == 0 or self.sizes.min() < 0:
            raise ValueError("sizes must hold at least one sample and no negative number")
        if block < 1 or window < 0 or lanes < 1:
            raise ValueError(f"block ({block}), lanes ({lanes}) >= 1 and window ({window}) >= 0")
        self.seed, self.block, self.window, self.lanes = seed, block, window, lanes
        names = [SORTED]
        if self.num_samples >= bijection.SMALLEST:
            names += [COMPUTED] * (block == 1) + [BY_ROW] * (block > 1 or window > 0)
        self.algorithm = algorithm if algorithm in names else names[-1]
        if self.algorithm == BY_ROW:
            self._blocks = Blocks(self.sizes, block)
        elif block > 1:  # else a block is one sample and needs no table
            self._block_starts, self._block_sizes = _cut(self.sizes, block)
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
        return self.rows(k, batch_size, 0, batch_size)

    def rows(self, k: int, batch_size: int, first: int, stop: int) -> tuple[Ids, Ids]:
        """Return (positions, ids) of rows [first, stop) of global batch k, int64 each.

        The other rows of the batch are not computed.
        """
        rows = np.arange(first, stop, dtype=np.int64)
        positions = k * batch_size + rows
        if self.lanes > 1:
            positions = self._sorted_by_lane(k * batch_size, batch_size, rows)
        return positions, self.ids(positions)

    def _sorted_by_lane(self, start: int, size: int, rows: Ids) -> Ids:
        """Return what the positions [start, start + size), sorted by lane, have at some rows."""
        n, lanes = self.num_samples, min(self.lanes, self.num_samples)
        # Parts of the batch in one epoch, and how many of their places each lane has.
        epochs = np.arange(start // n, (start + size - 1) // n + 1)
        low = np.maximum(start - epochs * n, 0)
        high = np.minimum(start + size - epochs * n, n)
        lane = np.arange(lanes)[:, None]
        before = ((low - lane + lanes - 1) // lanes).ravel()  # places of the lane in front of low
        counts = ((high - lane + lanes - 1) // lanes).ravel() - before
        ends = np.cumsum(counts)
        cell = np.searchsorted(ends, rows, side="right")
        nth = rows - (ends - counts - before)[cell]
        lane_of, part = np.divmod(cell, len(epochs))
        out: Ids = epochs[part] * n + nth * lanes + lane_of
        return out

    def _ids_in_epoch(self, epoch: int, places: Ids) -> Ids:
        rows, lanes = np.divmod(places, self.lanes)
        quotient, rest = divmod(self.num_samples, self.lanes)
        sizes = quotient + (lanes < rest)
        if self.window and self.algorithm == BY_ROW:
            rows = self._compute_windows(epoch, lanes, rows, sizes)
        elif self.window:
            rows = self._shuffle_windows(epoch, lanes, rows, sizes)
        place = lanes * quotient + np.minimum(lanes, rest) + rows
        if self.block == 1 and self.algorithm != SORTED:
            return bijection.shuffled(place, self.num_samples, self._key(epoch))
        if self.algorithm == BY_ROW:
            return self._blocks.ids(place, self._layout(epoch), self._key(epoch))
        permuted, ends = self._layout(epoch)
        if self.block == 1:
            out: Ids = permuted[place]
            return out
        at = np.searchsorted(ends, place, side="right")
        block = permuted[at]
        within: Ids = place - (ends[at] - self._block_sizes[block])
        return self._block_starts[block] + within

    def _compute_windows(self, epoch: int, lanes: Ids, rows: Ids, sizes: Ids) -> Ids:
        windows, within = np.divmod(rows, self.window)
        starts = rows - within
        lengths = np.minimum(self.window, sizes - starts)
        numbers = lanes * (self.num_samples // self.window + 1) + windows
        words = bijection.words_of(f"{self.algorithm}|{self.seed}|{epoch}|windows", numbers)
        for length in np.unique(lengths).tolist():  # of a window, and of the last ones of a lane
            chosen = np.flatnonzero(lengths == length)
            within[chosen] = bijection.shuffled_each(within[chosen], length, words[chosen])
        return starts + within

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

    def _layout(self, epoch: int) -> tuple[Ids, ...]:
        def build() -> tuple[Ids, ...]:
            key = self._key(epoch)
            if self.algorithm == BY_ROW:
                return self._blocks.tables(key)
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
