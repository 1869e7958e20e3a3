"""The data orders "lwb1" and "lwb2": frozen, exact, random-access, independent of ranks.

``test_order_rows.py`` has "lwb3" and the rows of a rank.
"""

from __future__ import annotations

import hashlib
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from launching import STATE

from pipeline.config.schema import Config, DataConfig, RunConfig
from pipeline.data import bijection
from pipeline.data import order as order_module
from pipeline.data.loader import make_order
from pipeline.data.order import COMPUTED, SORTED, Order, permutation
from pipeline.models.noise import BY_BATCH, BY_ROW
from pipeline.runs import checkpoint
from pipeline.runs.run_folder import saved_noise, saved_order
from pipeline.runtime.errors import CheckpointError

SIZES = [1, 17, 400, 3, 0, 211, 97, 268]  # 997, a prime, with an empty shard
N = sum(SIZES)


@st.composite
def orders(draw):
    """Any order over a small data set, with empty shards and oversized settings."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    assume(sum(sizes))
    return Order(
        sizes,
        draw(st.integers(0, 2**63 - 1)),
        block=draw(st.integers(1, 60)),
        window=draw(st.integers(0, 60)),
        lanes=draw(st.integers(1, 8)),
    )


def epoch_of(order: Order, epoch: int = 0) -> np.ndarray:
    start = epoch * order.num_samples
    return order.ids(np.arange(start, start + order.num_samples))


# -- frozen -------------------------------------------------------------------------------------

# (settings, first eight ids, seven ids across the first epoch's end, digest of three epochs)
VECTORS = [
    (
        {},
        [872, 830, 536, 132, 549, 271, 250, 818],
        [294, 883, 958, 317, 222, 467, 605],
        "55313fb6165b2e4b",
    ),
    (
        {"window": 10},
        [250, 204, 830, 549, 271, 536, 818, 132],
        [883, 295, 286, 455, 605, 317, 467],
        "9ce74784c205c824",
    ),
    (
        {"block": 16, "window": 50},
        [867, 861, 864, 377, 675, 856, 372, 869],
        [516, 951, 26, 954, 964, 146, 737],
        "4875fdc92db87733",
    ),
    (
        {"block": 64, "lanes": 4},
        [729, 147, 512, 208, 730, 148, 513, 209],
        [74, 146, 75, 449, 206, 804, 76],
        "d4733520c4ad4685",
    ),
    (
        {"block": 400, "window": 120, "lanes": 3},
        [790, 586, 127, 741, 539, 149, 735, 531],
        [328, 453, 133, 399, 917, 115, 361],
        "6fdf95eb8098201f",
    ),
]


@pytest.mark.parametrize(("arrangement", "head", "seam", "digest"), VECTORS)
def test_lwb1_is_frozen(arrangement, head, seam, digest):
    """Not one id may change under this name: running and archived runs depend on it."""
    ids = Order(SIZES, 7, **arrangement).ids(np.arange(3 * N))
    assert ids[:8].tolist() == head
    assert ids[N - 2 : N + 5].tolist() == seam
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest
    assert SORTED == "lwb1"


def test_the_batch_over_an_epoch_end_is_frozen():
    """Positions and ids of one global batch with lanes: the tail of one epoch, the head of two."""
    positions, ids = Order(SIZES, 7, block=16, window=50, lanes=3).batch(83, 12)
    assert positions.tolist() == [
        *[996, 997, 1000, 1003],
        *[1006, 998, 1001, 1004],
        *[1007, 999, 1002, 1005],
    ]
    assert ids.tolist() == [688, 26, 954, 964, 146, 219, 210, 214, 281, 987, 984, 986]


def test_a_batch_of_two_lanes_is_frozen():
    """The rows of the first lane come before those of the second."""
    positions, ids = Order(SIZES, 7, block=16, lanes=2).batch(0, 8)
    assert positions.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert ids.tolist() == [855, 856, 857, 858, 299, 300, 301, 302]


def test_the_permutation_is_frozen():
    """The building block, from raw Philox bits whose stream numpy guarantees."""
    assert permutation(10, "lwb1").tolist() == [5, 1, 0, 8, 9, 4, 7, 2, 6, 3]
    assert permutation(2, "a").tolist() == [1, 0]


# -- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 65_537])
def test_a_permutation_holds_each_number_once(n):
    """Also for none and one, and around powers of two."""
    found = permutation(n, f"key {n}")
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


def test_a_permutation_is_uniform():
    """All 24 orders of 4 things come up alike; chi-squared below its 1e-6 quantile."""
    counts: dict[bytes, int] = {}
    for key in range(12_000):
        drawn = permutation(4, f"uniform {key}").tobytes()
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 24
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 71


@settings(max_examples=200, deadline=None)
@given(order=orders(), epoch=st.integers(0, 2**20))
def test_each_epoch_has_every_sample_exactly_once(order, epoch):
    """For any sizes, block, window, lanes and epoch."""
    assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(order.num_samples))


@settings(max_examples=100, deadline=None)
@given(order=orders(), start=st.integers(0, 10**6), count=st.integers(1, 150), data=st.data())
def test_random_access_equals_reading_in_order(order, start, count, data):
    """The id at a position does not depend on what was asked before or beside it."""
    ids = order.ids(np.arange(start, start + count))
    again = Order(
        order.sizes, order.seed, block=order.block, window=order.window, lanes=order.lanes
    )
    places = np.array(data.draw(st.permutations(range(count))))
    assert np.array_equal(again.ids(start + places), ids[places])
    one = int(places[0])
    assert again.ids(np.array([start + one])).tolist() == [ids[one]]


@settings(max_examples=100, deadline=None)
@given(order=orders(), size=st.integers(1, 50), first=st.integers(0, 1000))
def test_batches_cut_the_stream(order, size, first):
    """Batch k is positions [kB, (k+1)B), each with its id, whatever the lanes do to the rows."""
    for k in (first, first + 1):
        positions, ids = order.batch(k, size)
        assert np.array_equal(np.sort(positions), np.arange(k * size, (k + 1) * size))
        assert np.array_equal(ids, order.ids(positions))


@settings(max_examples=60, deadline=None)
@given(order=orders(), k=st.integers(0, 500), rows=st.integers(1, 4))
def test_any_number_of_ranks_gets_the_same_batch(order, k, rows):
    """Rank r of R takes rows [rB/R, (r+1)B/R): joined by rank they are the batch, for every R."""
    size = 12 * rows
    whole = order.batch(k, size)[1]
    for ranks in (1, 2, 3, 4, 6, 12):
        share = size // ranks
        parts = []
        for rank in range(ranks):  # a rank of its own process knows the order and k, nothing else
            own = Order(
                order.sizes, order.seed, block=order.block, window=order.window, lanes=order.lanes
            )
            parts.append(own.batch(k, size)[1][rank * share : (rank + 1) * share])
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("arrangement", [vector[0] for vector in VECTORS])
def test_ids_do_not_depend_on_the_dtypes_of_sizes_and_positions(arrangement):
    """Numbers of one byte are counted in eight, as those of a list are."""
    sizes, positions = [200, 100], np.arange(250)
    expected = Order(sizes, 7, **arrangement).ids(positions)
    ids = Order(np.array(sizes, np.uint8), 7, **arrangement).ids(positions.astype(np.uint8))
    assert ids.dtype == np.int64
    assert np.array_equal(ids, expected)


def test_ids_keep_the_shape_of_an_empty_request():
    """Nothing asked, nothing answered."""
    assert Order(SIZES, 0).ids(np.array([], dtype=np.int64)).shape == (0,)


def test_a_data_set_of_one_sample_repeats_it():
    """N = 1: every position is sample 0."""
    order = Order([0, 1, 0], 3, block=8, window=8, lanes=4)
    assert order.ids(np.arange(5)).tolist() == [0] * 5


def test_batches_larger_than_the_data_set():
    """N < B: several epochs meet in one batch, each whole."""
    ids = Order([2, 3], 1).batch(0, 20)[1]
    assert np.bincount(ids).tolist() == [4] * 5


# -- shuffled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arrangement", [vector[0] for vector in VECTORS])
def test_seeds_and_epochs_differ(arrangement):
    """Another seed or another epoch puts another sample at nearly every place."""
    order, other = (Order(SIZES, seed, **arrangement) for seed in (7, 8))
    assert np.mean(epoch_of(order) != epoch_of(other)) > 0.9
    assert np.mean(epoch_of(order, 0) != epoch_of(order, 1)) > 0.9


def test_the_default_is_a_uniform_permutation():
    """block = 1 alone is one permutation of the whole set."""
    expected = permutation(N, f"{SORTED}|7|0|blocks")
    assert np.array_equal(epoch_of(Order(SIZES, 7)), expected)


def test_blocks_stay_adjacent_within_a_shard():
    """block = 16: contiguous runs of at most 16 ids of one shard, near-equal in size."""
    ids = epoch_of(Order(SIZES, 7, block=16))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    ends = np.cumsum(SIZES)
    shards = [set(np.searchsorted(ends, run, side="right")) for run in runs]
    joined = sum(len(run) > 16 for run in runs)  # neighbours may land side by side
    assert joined <= 2
    assert all(len(shard) == 1 for run, shard in zip(runs, shards, strict=True) if len(run) <= 16)
    assert len(runs) >= sum(-(-size // 16) for size in SIZES) - joined


@settings(max_examples=60, deadline=None)
@given(order=orders())
def test_windows_shuffle_only_inside_themselves(order):
    """What stays of locality: a row leaves neither its lane nor its window."""
    assume(order.window)
    still = Order(order.sizes, order.seed, block=order.block, lanes=order.lanes)
    shuffled, plain = epoch_of(order), epoch_of(still)
    for lane in range(order.lanes):
        a, b = shuffled[lane :: order.lanes], plain[lane :: order.lanes]
        for start in range(0, len(a), order.window):
            window = slice(start, start + order.window)
            assert set(a[window]) == set(b[window])


def test_with_a_lane_per_node_a_node_reads_few_shards():
    """Whole-shard blocks and 8 lanes: each node reads its share of the shards, not all of them."""
    order = Order([50] * 64, 0, block=50, window=100, lanes=8)
    touched: list[set[int]] = [set() for _ in range(8)]
    for k in range(order.num_samples // 80):
        ids = order.batch(k, 80)[1].reshape(8, 10)
        for node in range(8):
            touched[node] |= set((ids[node] // 50).tolist())
    assert max(map(len, touched)) <= 9


# -- cheap --------------------------------------------------------------------------------------


def test_thirty_million_samples_in_blocks_are_cheap():
    """block > 1 never makes a list of N: a batch mid-epoch of 30M samples costs < 64 MiB."""
    tracemalloc.start()
    try:
        order = Order([10_000] * 3_000, 0, block=64, window=8192)
        ids = order.batch(123_456, 256)[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(ids.tolist())) == 256
    assert peak < 64 << 20


@pytest.mark.parametrize(
    "arrangement", [{"window": 8}, {"window": 8, "lanes": 2}, {"window": 8, "block": 4}]
)
def test_a_batch_over_many_windows_lays_the_blocks_out_once(monkeypatch, arrangement):
    """The permutation of an epoch is made once, however many windows its batches touch."""
    made = []

    def counted(n, key):
        made.append(key)
        return permutation(n, key)

    monkeypatch.setattr(order_module, "permutation", counted)
    order = Order(SIZES, 7, **arrangement)
    for k in range(4):
        order.batch(k, 200)
    assert sum(key.endswith("blocks") for key in made) == 1


def test_a_batch_over_two_epochs_makes_each_permutation_once(monkeypatch):
    """Both epochs stay in memory while a batch needs them, and no third one does."""
    made = []

    def counted(n, key):
        made.append(key)
        return permutation(n, key)

    monkeypatch.setattr(order_module, "permutation", counted)
    order = Order(SIZES, 7, window=400, lanes=2)
    for _ in range(2):
        order.batch(0, 2 * N)
    assert len(made) == len(set(made)) == 2 + 2 * 2 * 2  # epochs; windows of lanes of epochs
    for k in range(1, 4):
        order.batch(k, 2 * N)
    assert (len(order._layouts), len(order._windows)) == (2, 4 * 2)


# -- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [0, 0], [-1, 5]])
def test_sizes_without_samples_are_refused(sizes):
    """There is no order of nothing, nor of less."""
    with pytest.raises(ValueError, match=r"^sizes must hold at least one sample"):
        Order(sizes, 0)


@pytest.mark.parametrize("arrangement", [{"block": 0}, {"lanes": 0}, {"window": -1}])
def test_settings_without_meaning_are_refused(arrangement):
    """Named, instead of a division by zero later."""
    with pytest.raises(ValueError, match=next(iter(arrangement))):
        Order([5], 0, **arrangement)


def test_describe_is_frozen():
    """Checkpoints hold these keys and values; another default would refuse to resume them."""
    settings = {"algorithm": "lwb1", "seed": 7, "block": 1, "window": 0, "lanes": 1}
    assert Order(SIZES, 7).describe() == settings


def test_describe_tells_orders_apart():
    """What a checkpoint keeps of the order differs whenever the order does."""
    described = [str(Order(SIZES, 7, **vector[0]).describe()) for vector in VECTORS]
    assert len({*described, str(Order(SIZES, 8).describe())}) == len(VECTORS) + 1


# -- lwb2: uniform orders of many samples, without a table --------------------------------------

MANY = [40_000, 0, 1, 29_998]
M = sum(MANY)
MANY_VECTORS = [
    (
        {},
        [5693, 2448, 45017, 32751, 14557, 1291, 41038, 20699],
        [61815, 51082, 8906, 67176, 64365],
        "a278a5e1c9c06275",
    ),
    (
        {"window": 10},
        [20699, 5693, 13217, 45017, 14557, 1291, 41038, 2448],
        [29273, 9084, 8906, 44117, 12034],
        "8b6cac4cc95400a2",
    ),
    (
        {"lanes": 3},
        [5693, 67377, 48747, 2448, 47096, 44833, 45017, 63723],
        [40165, 51082, 8906, 47750, 29116],
        "397d6a422a364f11",
    ),
    (
        {"window": 20_000, "lanes": 2},
        [35138, 64599, 62674, 63703, 20350, 1432, 21322, 14298],
        [67580, 39566, 45927, 1413, 36745],
        "ecf27f1f06afb25c",
    ),
]


@pytest.mark.parametrize(("arrangement", "head", "seam", "digest"), MANY_VECTORS)
def test_lwb2_is_frozen(arrangement, head, seam, digest):
    """Not one id may change under this name; each of two epochs holds every sample once."""
    order = Order(MANY, 7, **arrangement, algorithm="lwb2")
    ids = order.ids(np.arange(2 * M))
    assert ids[:8].tolist() == head
    assert ids[M - 2 : M + 3].tolist() == seam
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest
    assert order.algorithm == order.describe()["algorithm"] == COMPUTED == "lwb2"
    for epoch in np.split(ids, 2):
        assert np.array_equal(np.sort(epoch), np.arange(M))


def test_the_bijection_is_frozen():
    """The building block, at powers of two, beside them, and far beyond any table."""
    for n, expected in (
        (65_536, [60234, 16969, 14885, 13388, 35033]),
        (10**6, [228770, 15240, 632309, 675241, 405815]),
        (10**9, [443133945, 391883218, 942999258, 121264922, 422625835]),
        (2**40, [237149213927, 1034104442721, 450322905393, 419510641081, 894997186710]),
    ):
        places = np.array([0, 1, 2, n // 2, n - 1])
        assert bijection.shuffled(places, n, "lwb2").tolist() == expected


def test_an_order_of_a_billion_samples_needs_no_table():
    """Any position at once: a few ids of epochs 0, 1 and 5, in less than 8 MiB."""
    order = Order(np.full(100_000, 10_000), 7)
    tracemalloc.start()
    try:
        ids = order.ids(np.array([0, 1, 10**9 - 1, 10**9, 5 * 10**9 + 3]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.tolist() == [116139011, 543334236, 617518233, 363845562, 240894879]
    assert peak < 8 << 20


@pytest.mark.parametrize("n", [65_536, 65_537, 70_001, 131_071, 131_072])
def test_the_bijection_holds_each_number_once(n):
    """Around powers of two, with even and odd numbers of bits, where none and half of them walk."""
    found = bijection.shuffled(np.arange(n), n, f"key {n}")
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


def test_fewer_samples_keep_lwb1():
    """One sample fewer than SMALLEST: sorted, with the ids of lwb1."""
    small = Order([bijection.SMALLEST - 1], 7)
    assert small.algorithm == SORTED
    assert Order([bijection.SMALLEST - 1], 7, block=2, window=9).algorithm == SORTED
    assert Order([bijection.SMALLEST], 7).algorithm == COMPUTED
    places = np.arange(100)
    expected = permutation(bijection.SMALLEST - 1, "lwb1|7|0|blocks")[:100]
    assert np.array_equal(small.ids(places), expected)


def per_freedom(cells: np.ndarray, bins: int) -> float:
    """Chi-squared per degree of freedom of counts that should all be alike."""
    counts = np.bincount(cells, minlength=bins)
    expected = len(cells) / bins
    return float(((counts - expected) ** 2 / expected).sum() / (bins - 1))


@pytest.mark.parametrize("n", [65_536, 70_001, 131_071])
def test_the_bijection_looks_uniform(n):
    """1024 cells of each: place and id, ids of neighbours, their difference, ids of a place in two
    epochs. Chi-squared per degree of freedom is 1 with a deviation of 0.044; sums of three keys.
    """
    found = np.zeros(4)
    for key in range(3):
        ids, later = (bijection.shuffled(np.arange(n), n, f"key {k}") for k in (key, key + 1))
        part, after = ids * 32 // n, later * 32 // n
        cells = (
            np.arange(n) * 32 // n * 32 + part,
            part[:-1] * 32 + part[1:],
            (ids[1:] - ids[:-1]) % n * 1024 // n,
            part * 32 + after,
        )
        found += [per_freedom(one, 1024) / 3 for one in cells]
    assert np.all(np.abs(found - 1) < 0.15), found


def test_single_places_are_uniform_over_keys():
    """The ids of four places, and the difference of the first two, over 4,000 keys: 64 cells."""
    n, places = 70_001, np.array([0, 1, 35_000, 70_000])
    ids = np.array([bijection.shuffled(places, n, f"place {k}") for k in range(4000)])
    columns = [*ids.T, (ids[:, 1] - ids[:, 0]) % n]
    assert max(per_freedom(one * 64 // n, 64) for one in columns) < 2  # its 1e-6 quantile
    fixed = sum(
        np.count_nonzero(bijection.shuffled(np.arange(n), n, f"fixed {k}") == np.arange(n))
        for k in range(20)
    )
    assert 3 <= fixed <= 50  # a random permutation has one fixed place on average: 20 here


def test_a_run_goes_on_with_its_algorithm_and_a_new_one_takes_the_newest(tmp_path):
    """The newest checkpoint says which; a name that this version lacks is refused later, by name,
    because the order does not take it. A fork may have settings that its origin's never had.
    """
    index = SimpleNamespace(sizes=MANY, fingerprint="f")
    for cuts, names in (
        ({}, ["lwb1", "lwb2"]),
        ({"window": 9}, ["lwb1", "lwb2", "lwb3"]),
        ({"block": 100, "window": 900, "lanes": 2}, ["lwb1", "lwb3"]),
    ):
        folder = tmp_path / f"run {cuts}"
        config = load_config(folder, **cuts)
        assert saved_order(config) == {}
        assert make_order(config, index).algorithm == names[-1]
        for step, name in enumerate([*names, "lwb9"], 1):
            state = STATE | {"stream": {"algorithm": name}}
            checkpoint.save(folder, step, {"G": torch.nn.Linear(1, 1)}, {}, state)
            assert saved_order(config) == {"algorithm": name, "order": "auto"}
            kept = name if name in names else names[-1]
            assert make_order(config, index, saved_order(config)).algorithm == kept
            fork = load_config(tmp_path / "fork", fork=folder, **cuts)
            assert make_order(fork, index, saved_order(fork)).algorithm == kept
        other = load_config(tmp_path / "fork", fork=folder, block=3)
        assert make_order(other, index, {"algorithm": "lwb2", "order": "auto"}).algorithm == "lwb3"


def test_a_run_goes_on_with_the_rule_of_its_z(tmp_path):
    """No rule in the newest checkpoint: it is from before there were two. An unknown one is
    refused by name.
    """
    folder = tmp_path / "run"
    config = load_config(folder)
    assert saved_noise(config) == BY_ROW
    for step, stream, kept in ((1, {}, BY_BATCH), (2, {"z": "rows"}, BY_ROW)):
        checkpoint.save(folder, step, {"G": torch.nn.Linear(1, 1)}, {}, STATE | {"stream": stream})
        assert saved_noise(config) == kept
        assert saved_noise(load_config(tmp_path / "fork", fork=folder)) == kept
    state = STATE | {"stream": {"z": "rows 9"}}
    checkpoint.save(folder, 3, {"G": torch.nn.Linear(1, 1)}, {}, state)
    with pytest.raises(CheckpointError, match=r"z by the rule 'rows 9': resume with that version"):
        saved_noise(config)


def load_config(folder, fork="", **cuts):
    return Config(run=RunConfig(dir=str(folder), fork=str(fork)), data=DataConfig(**cuts))
