"""The plan of a node's downloads: in time, within the cache, and the fewest that there can be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from pipeline.data.order import Order
from pipeline.data.plan import Fetch, Plan

SHARD, BATCH, AHEAD = 40, 20, 3


def planned(
    order: Order, capacity: int | None, *, end: int, start: int = 0, held: tuple[int, ...] = ()
) -> tuple[Plan, list[tuple[int, Fetch]]]:
    """A plan for one node and shards of size 1, and its fetches with the batch that allows them."""
    plan = Plan(
        order,
        [1] * len(order.sizes),
        batch_size=BATCH,
        rows=slice(0, BATCH),
        start=start,
        end=end,
        ahead=AHEAD,
        capacity=capacity,
        held=held,
    )
    found = [(now, fetch) for now in range(start - 1, end) for fetch in plan.until(now)]
    return plan, found


def fewest(plan: Plan, lead: int, capacity: int, end: int) -> int:
    """The fewest downloads: a linear program over the pauses in which a copy may be kept.

    A shard is in the cache from ``lead`` batches before a batch that reads it until it is read. Its
    matrix is one of intervals, so the best of all real solutions is one of whole numbers.
    """
    uses: dict[int, list[int]] = {}
    for k in range(end):
        for shard in plan.shards_of(k):
            uses.setdefault(shard, []).append(k)
    must = np.zeros(end + 1)
    pauses, downloads = [], 0
    for batches in uses.values():
        downloads += 1
        held = [max(0, batches[0] - lead), batches[0] + 1]
        for before, after in pairwise(batches):
            if after - lead <= before + 1:
                held[1] = after + 1
                continue
            pauses.append((before + 1, after - lead))
            must[held[0] : held[1]] += 1
            held = [after - lead, after + 1]
        must[held[0] : held[1]] += 1
    downloads += len(pauses)
    assert must.max() <= capacity
    if not pauses:
        return downloads
    covers = np.array([[a <= t < b for a, b in pauses] for t in range(end + 1)], float)
    kept = linprog(-np.ones(len(pauses)), covers, capacity - must, bounds=(0, 1))
    return downloads - round(-kept.fun)


@given(
    shards=st.integers(4, 24),
    seed=st.integers(0, 99),
    window=st.sampled_from([0, 40, 80]),
    share=st.floats(0.4, 1.0),
)
def test_no_plan_has_fewer_downloads(shards: int, seed: int, window: int, share: float) -> None:
    """Over three epochs, with a cache for a part of the set, as a linear program proves."""
    order = Order([SHARD] * shards, seed, block=SHARD, window=window)
    end = 3 * order.num_samples // BATCH
    capacity = max(8, int(share * shards))
    plan, found = planned(order, capacity, end=end)
    lead = plan._lead + AHEAD
    downloads = sum(fetch.is_download for _, fetch in found)
    assert all(fetch.fits for _, fetch in found)
    assert downloads == fewest(plan, lead, capacity, end)


@pytest.mark.parametrize("capacity", [None, 20, 9])
@pytest.mark.parametrize("start", [0, 37])
def test_every_shard_is_there_before_it_may_be_read(capacity: int | None, start: int) -> None:
    """What a worker may read after batch k was consumed was fetched then, and not evicted."""
    order = Order([SHARD] * 20, 1, block=SHARD, window=80)
    plan, found = planned(order, capacity, start=start, end=100)
    held: set[int] = set()
    for now in range(start - 1, 100):
        for at, fetch in found:
            if at == now:
                held -= set(fetch.evicted)
                assert (fetch.shard not in held) == fetch.is_download
                held.add(fetch.shard)
        assert capacity is None or len(held) <= capacity
        readable = range(max(start, now), min(100, now + AHEAD + 2))
        assert {shard for k in readable for shard in plan.shards_of(k)} <= held


def test_a_cache_that_is_too_small_is_said_and_does_not_end_the_plan() -> None:
    """The window reads four shards at once, the cache holds two: every use is still fetched."""
    order = Order([SHARD] * 12, 1, block=SHARD, window=160)
    _, found = planned(order, 2, end=48)
    assert not all(fetch.fits for _, fetch in found)
    assert {fetch.shard for _, fetch in found} == set(range(12))


def test_lanes_give_each_node_its_own_shards() -> None:
    """Two nodes, two lanes: an epoch downloads about each shard once over both nodes."""
    order = Order([SHARD] * 20, 3, block=SHARD, window=80, lanes=2)
    end = order.num_samples // BATCH
    fetched = []
    for node in range(2):
        rows = slice(node * BATCH // 2, (node + 1) * BATCH // 2)
        plan = Plan(
            order,
            [1] * 20,
            batch_size=BATCH,
            rows=rows,
            start=0,
            end=end,
            ahead=AHEAD,
            capacity=12,
        )
        fetched += [fetch.shard for now in range(end) for fetch in plan.until(now)]
    assert 20 <= len(fetched) <= 22


def test_a_warm_cache_is_used() -> None:
    """A run that goes on finds its copies: none of them is downloaded again while it is needed."""
    order = Order([SHARD] * 20, 5, block=SHARD, window=80)
    _, cold = planned(order, 10, start=20, end=40)
    held = tuple(fetch.shard for _, fetch in cold[:6])
    _, warm = planned(order, 10, start=20, end=40, held=held)
    fresh = [fetch.shard for _, fetch in warm if fetch.is_download]
    assert not set(fresh[:4]) & set(held)
    assert len(fresh) < sum(fetch.is_download for _, fetch in cold)
