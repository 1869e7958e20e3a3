"""Shuffle blocks of samples so that any place of the shuffled sequence is found by arithmetic.

Each shard is cut into blocks of one size; what is left at its end is its rest. Whole blocks are
shuffled among each other, rests too, and the rests are spread evenly between the whole blocks, from
a random place on. Hence an epoch needs a table of the rests at most, one per shard, and none of the
blocks, of which there may be far more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data import bijection

Ids = NDArray[np.int64]


class Blocks:
    """The blocks of a data set.

    Args:
        sizes: samples per shard, int64 (shards,).
        block: samples of a whole block.
    """

    def __init__(self, sizes: Ids, block: int) -> None:
        whole, self.block = sizes // block, block
        self._starts = np.cumsum(sizes) - sizes
        self._ends = np.cumsum(whole)
        self._first = self._ends - whole  # number of the first whole block of each shard
        self.whole = int(self._ends[-1])
        rests = sizes - whole * block
        shards = np.flatnonzero(rests)
        self._rest_sizes = rests[shards]
        self._rest_starts = (self._starts + whole * block)[shards]

    def tables(self, key: str) -> tuple[Ids, ...]:
        """Return what an epoch needs to be kept of it, for ``ids``; ``key`` names the epoch.

        The tables are: where each rest begins in the shuffled sequence; its size; the sample that
        it begins with; the whole blocks before it; and, of fewer than ``bijection.SMALLEST`` whole
        blocks, their permutation. A rest of no sample at place 0 comes first.
        """
        count, whole = len(self._rest_sizes), self.whole
        order = bijection.permutation(count, f"{key}|rests")
        sizes = self._rest_sizes[order]
        phase = int(bijection.words_of(f"{key}|phase", np.zeros(1, np.int64))[0]) % (whole + 1)
        before = (np.arange(count) * whole + phase) // max(1, count)
        begins = np.cumsum(sizes) - sizes + before * self.block
        columns = (begins, sizes, self._rest_starts[order], before)
        rests = (np.concatenate([np.zeros(1, np.int64), column]) for column in columns)
        few = bijection.permutation(whole if whole < bijection.SMALLEST else 0, key)
        return *rests, few

    def ids(self, places: Ids, tables: tuple[Ids, ...], key: str) -> Ids:
        """Return the samples at some places (n,) of the shuffled sequence: int64 (n,)."""
        begins, sizes, first_samples, before, few = tables
        at = np.searchsorted(begins, places, side="right") - 1
        beyond = places - begins[at] - sizes[at]  # negative inside a rest
        out: Ids = first_samples[at] + beyond + sizes[at]
        inside = np.flatnonzero(beyond >= 0)
        slots, within = np.divmod(beyond[inside], self.block)
        slots += before[at[inside]]
        if self.whole < bijection.SMALLEST:
            blocks = few[slots]
        else:
            blocks = bijection.shuffled(slots, self.whole, key)
        shards = np.searchsorted(self._ends, blocks, side="right")
        ahead = blocks - self._first[shards]
        out[inside] = self._starts[shards] + ahead * self.block + within
        return out
