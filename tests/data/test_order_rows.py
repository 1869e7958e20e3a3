"""The data order "lwb3" and the rows of one rank: computed alone, frozen, exact, uniform."""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import bijection
from pipeline.data.blocks import Blocks
from pipeline.data.order import BY_ROW, Order

MANY = [40_000, 0, 1, 29_998]
M = sum(MANY)
UNEVEN = [*(500 + 37 * k for k in range(60)), 7]  # every rest has another size
FULL = [100] * 700


# -- frozen -------------------------------------------------------------------------------------

# (sizes, settings, first eight ids, five ids across the first epoch's end, digest of two epochs)
VECTORS = [
    (
        MANY,
        {"window": 10},
        [27924, 56639, 66598, 68944, 21759, 8535, 61552, 3338],
        [57846, 51030, 7732, 30421, 34173],
        "68a178776850c739",
    ),
    (
        MANY,
        {"block": 300, "window": 900, "lanes": 3},
        [68122, 58548, 21502, 34696, 2735, 21465, 67926, 22376],
        [54207, 46728, 50745, 5316, 28286],
        "04da16c4bf1c9f5b",
    ),
    (
        MANY,
        {"block": 50000, "window": 20000, "lanes": 2},
        [42717, 8811, 59896, 9215, 49133, 13358, 58492, 10738],
        [29663, 60716, 47542, 14719, 53323],
        "15d4ba952a1be564",
    ),
    (
        UNEVEN,
        {"block": 100},
        [12185, 12186, 12187, 12188, 12189, 12190, 12191, 12192],
        [26323, 26324, 89752, 89753, 89754],
        "46f659ae970a3ea1",
    ),
    (
        UNEVEN,
        {"block": 3000, "window": 3000, "lanes": 64},
        [1558, 62458, 32560, 12240, 90931, 64063, 64529, 24926],
        [23896, 25300, 50853, 52621, 37029],
        "0ee1177c842e1105",
    ),
    (
        FULL,
        {"block": 100, "window": 300, "lanes": 8},
        [22665, 58947, 16971, 5197, 55704, 45622, 63231, 5004],
        [25501, 25054, 60137, 23292, 12611],
        "6a7ec7d2f41bd858",
    ),
]


@pytest.mark.parametrize(("sizes", "arrangement", "head", "seam", "digest"), VECTORS)
def test_lwb3_is_frozen(sizes, arrangement, head, seam, digest):
    """Not one id may change under this name; each of two epochs holds every sample once."""
    order, n = Order(sizes, 7, **arrangement), sum(sizes)
    ids = order.ids(np.arange(2 * n))
    assert ids[:8].tolist() == head
    assert ids[n - 2 : n + 3].tolist() == seam
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest
    assert order.algorithm == order.describe()["algorithm"] == BY_ROW == "lwb3"
    for epoch in np.split(ids, 2):
        assert np.array_equal(np.sort(epoch), np.arange(n))


def test_the_permutations_of_windows_are_frozen():
    """The building block: few bits and many, where none and half of them walk."""
    for n, expected in WINDOWS:
        words = bijection.words_of("lwb3", np.arange(6))
        places = np.minimum(np.array([0, 1, 2, 3, n // 2, n - 1]), n - 1)
        assert bijection.shuffled_each(places, n, words).tolist() == expected


WINDOWS = (
    (1, [0, 0, 0, 0, 0, 0]),
    (2, [1, 0, 0, 1, 1, 0]),
    (5, [2, 3, 1, 2, 0, 0]),
    (64, [11, 49, 6, 35, 50, 11]),
    (256, [185, 74, 23, 222, 172, 70]),
    (257, [12, 70, 186, 242, 79, 176]),
    (1000, [708, 178, 541, 515, 232, 225]),
    (30000, [28886, 3552, 5383, 4087, 1823, 19552]),
    (1048576, [303141, 90511, 416639, 113337, 351178, 115480]),
)


# -- exact --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum),
    block=st.integers(1, 60),
    key=st.text(max_size=4),
)
def test_shuffled_blocks_hold_each_sample_once(sizes, block, key):
    """Any sizes: no whole block, no rest, both; blocks are runs of one shard."""
    blocks, n = Blocks(np.array(sizes), block), sum(sizes)
    tables = blocks.tables(key)
    ids = blocks.ids(np.arange(n), tables, key)
    assert np.array_equal(np.sort(ids), np.arange(n))
    places = np.random.default_rng(n).integers(0, n, 30)
    assert np.array_equal(blocks.ids(places, tables, key), ids[places])
    runs = 1 + np.count_nonzero(np.diff(ids) != 1)
    assert runs <= sum(-(-size // block) for size in sizes)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 100, 1024, 1025, 5000])
def test_each_row_has_a_permutation_of_its_own(n):
    """All places of three permutations at once: each holds every number once."""
    words = np.repeat(bijection.words_of("key", np.arange(3)), n)
    found = bijection.shuffled_each(np.tile(np.arange(n), 3), n, words).reshape(3, n)
    assert found.dtype == np.int64
    for one in found:
        assert np.array_equal(np.sort(one), np.arange(n))
    assert n < 9 or len({one.tobytes() for one in found}) == 3


@pytest.mark.parametrize(("window", "lanes"), [(1, 1), (7, 3), (300, 512), (10**6, 4)])
def test_windows_shuffle_only_inside_themselves(window, lanes):
    """Also where a lane ends amid a window, and where a window is larger than a lane."""
    plain = Order(MANY, 7, block=300, lanes=lanes).ids(np.arange(M))
    shuffled = Order(MANY, 7, block=300, window=window, lanes=lanes).ids(np.arange(M))
    for lane in {0, lanes // 2, lanes - 1}:
        a, b = shuffled[lane::lanes], plain[lane::lanes]
        for start in range(0, len(a), window):
            assert set(a[start : start + window]) == set(b[start : start + window])
    assert (window == 1) == np.array_equal(plain, shuffled)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum),
    size=st.integers(1, 120),
    lanes=st.integers(1, 12),
    k=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_rows_are_those_of_the_sorted_batch(sizes, size, lanes, k, data):
    """As a stable sort by lane says, also over the ends of one epoch or of several."""
    order = Order(sizes, 5, lanes=lanes, block=2)
    positions = np.arange(k * size, (k + 1) * size)
    lane = positions % order.num_samples % lanes
    positions = positions[np.argsort(lane, kind="stable")]
    first = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(first, size))
    found, ids = order.rows(k, size, first, stop)
    assert np.array_equal(found, positions[first:stop])
    assert np.array_equal(ids, order.ids(positions)[first:stop])


@pytest.mark.parametrize("k", [0, 17, M // 768])  # the last batch ends in the second epoch
def test_rows_of_ranks_join_to_the_batch(k):
    """lwb3 with 512 lanes: six ranks that compute their own rows only have the batch together."""
    order = Order(MANY, 7, block=300, window=100, lanes=512)
    positions, ids = order.batch(k, 768)
    assert np.array_equal(np.sort(positions), np.arange(k * 768, (k + 1) * 768))
    for rank in range(6):
        own = Order(MANY, 7, block=300, window=100, lanes=512)
        found = own.rows(k, 768, rank * 128, (rank + 1) * 128)
        assert np.array_equal(found[0], positions[rank * 128 : (rank + 1) * 128])
        assert np.array_equal(found[1], ids[rank * 128 : (rank + 1) * 128])


# -- cheap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [10_000, 128])
def test_a_seek_in_a_billion_samples_needs_little_memory(block):
    """512 lanes and windows of three shards: 4,096 rows anywhere in less than 16 MiB."""
    tracemalloc.start()
    try:
        order = Order(np.full(100_000, 10_000), 0, block=block, window=30_000, lanes=512)
        ids = order.rows(12_345, 32_768, 8192, 12_288)[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(ids.tolist())) == 4096
    assert peak < 16 << 20


# -- shuffled -----------------------------------------------------------------------------------


def per_freedom(cells: np.ndarray, bins: int) -> float:
    """Chi-squared per degree of freedom of counts that should all be alike."""
    counts = np.bincount(cells, minlength=bins)
    expected = len(cells) / bins
    return float(((counts - expected) ** 2 / expected).sum() / (bins - 1))


def limit(bins: int) -> float:
    """The 1e-6 quantile of ``per_freedom``, after Wilson and Hilferty 1931."""
    third = 2 / (9 * (bins - 1))
    return (1 - third + 4.75 * third**0.5) ** 3


def many(n: int, count: int) -> np.ndarray:
    """(count, n): the permutations of ``range(n)`` under as many words that follow each other."""
    words = np.repeat(bijection.words_of("many", np.arange(count)), n)
    return bijection.shuffled_each(np.tile(np.arange(n), count), n, words).reshape(count, n)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_of_few_are_alike(n):
    """Each of the n! comes up as often as the others."""
    drawn = many(n, 20_000)
    found = np.unique(drawn @ n ** np.arange(n), return_inverse=True)[1].ravel()
    kinds = math.factorial(n)
    assert found.max() == kinds - 1
    assert per_freedom(found, kinds) < limit(kinds)


@pytest.mark.parametrize("n", [6, 7, 9, 17, 33, 64, 65])
def test_windows_of_few_look_uniform(n):
    """Ids of places, of pairs of places, and of a place in two windows that follow each other."""
    drawn = many(n, 10_000)
    first, second, last = drawn[:, 0], drawn[:, 1], drawn[:, -1]
    for a, b in ((first, second), (second, last)):
        between = (b - a) % n - 1
        assert per_freedom(between, n - 1) < limit(n - 1)
    for cells in (first, second, last):
        assert per_freedom(cells, n) < limit(n)
    if n <= 17:
        assert per_freedom(first[:-1] * n + first[1:], n * n) < limit(n * n)


@pytest.mark.parametrize("n", [1000, 1025, 1500])
def test_larger_windows_look_uniform(n):
    """16 x 16 cells of place and id, of neighbours, and of a place in windows that follow."""
    part = many(n, 200) * 16 // n
    place = np.broadcast_to(np.arange(n) * 16 // n, part.shape)
    for a, b in ((place, part), (part[:, :-1], part[:, 1:]), (part[:-1], part[1:])):
        # Sampling without replacement: somewhat less than 1 of place and id.
        assert 0.4 < per_freedom((a * 16 + b).ravel(), 256) < limit(256)


@pytest.mark.parametrize("sizes", [UNEVEN, FULL], ids=["rests", "whole"])
def test_blocks_and_rests_are_uniform_over_epochs(sizes):
    """400 epochs: where four samples are, of whole blocks and of rests, in eight parts of the
    epoch; in which parts one is in an epoch and the next, and two of them in one epoch.
    """
    sizes = np.array(sizes) // 10
    blocks, n = Blocks(sizes, 10), int(sizes.sum())
    ends = np.cumsum(sizes)
    samples = [0, ends[30] - 1, n // 2, ends[-2] - 1]
    found = np.empty((400, len(samples)), np.int64)
    for epoch in range(400):
        ids = blocks.ids(np.arange(n), blocks.tables(f"{epoch}"), f"{epoch}")
        order = np.empty(n, np.int64)
        order[ids] = np.arange(n)
        found[epoch] = order[samples]
    part = found * 8 // n
    for column in part.T:
        assert per_freedom(column, 8) < limit(8)
        assert per_freedom(column[:-1] * 8 + column[1:], 64) < limit(64)
    for other in (1, 2, 3):
        assert per_freedom(part[:, 0] * 8 + part[:, other], 64) < limit(64)


def test_shards_that_were_neighbours_are_apart():
    """Whole shards as blocks: of 700, about one pair of neighbours in an epoch stays one."""
    kept = 0
    blocks = Blocks(np.array(FULL), 100)
    for epoch in range(100):
        key = f"{epoch}"
        shards = blocks.ids(np.arange(0, 70_000, 100), blocks.tables(key), key) // 100
        kept += np.count_nonzero(np.abs(np.diff(shards)) == 1)
    assert 130 < kept < 270  # 2 a epoch, to either side; its deviation is 14


def test_epochs_and_seeds_differ():
    """Another seed or epoch puts another sample at nearly every place."""
    first, other = (Order(MANY, seed, block=300, window=900, lanes=3) for seed in (7, 8))
    ids = first.ids(np.arange(2 * M))
    assert np.mean(ids[:M] != ids[M:]) > 0.9
    assert np.mean(ids[:M] != other.ids(np.arange(M))) > 0.9
