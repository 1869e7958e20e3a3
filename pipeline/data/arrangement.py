"""Choose how local the data order is, ``data.order``, and say what that means for a node.

A uniform order needs every shard of the set at any time. Where a node's cache cannot hold all of
them, whole shards are shuffled, and samples among a few shards in each lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.config.changes import CHOSEN
from pipeline.config.schema import Config, DataConfig
from pipeline.data import bijection
from pipeline.data.index import Index
from pipeline.data.order import SORTED, Order

WINDOW = 3
"""Shards among which samples are shuffled, if the cache has room for them."""
LOOKS, LOOKED_AT = 8, 2**18
"""Batches, and images at most, from all over an epoch: are they well mixed?"""


def make_order(
    config: Config, index: Index, saved: Mapping[str, Any] = MappingProxyType({}), nodes: int = 1
) -> Order:
    """Return the data order of a run over an index.

    Args:
        config: of the run.
        index: the shards.
        saved: what the checkpoint that the run starts from has of its order
            (``run_folder.saved_order``); empty for a new run.
        nodes: of this launch.
    """
    cuts = arrange(config, index, nodes, saved)
    return Order(index.sizes, config.run.seed, **cuts, algorithm=saved.get("algorithm"))


def arrange(config: Config, index: Index, nodes: int, saved: Mapping[str, Any]) -> dict[str, int]:
    """Return block, window and lanes of a run's order.

    Values that the configuration gives win. Others are those of the checkpoint that the run starts
    from, if it is of the same data and ``data.order``; else ``data.order`` chooses them.

    Args:
        config: of the run.
        index: the shards.
        nodes: of this launch.
        saved: what that checkpoint has of its order; empty for a new run.
    """
    return _chosen(config, index, nodes) | _kept(config, index, saved) | _given(config.data)


def _given(data: DataConfig) -> dict[str, int]:
    return {cut: value for cut in CHOSEN if (value := getattr(data, cut)) is not None}


def _kept(config: Config, index: Index, saved: Mapping[str, Any]) -> dict[str, int]:
    if not saved or saved["order"] != config.data.order:
        return {}
    same = saved.get("fingerprint") == index.fingerprint
    return {cut: saved[cut] for cut in CHOSEN if cut in saved} if same else {}


def _chosen(config: Config, index: Index, nodes: int) -> dict[str, int]:
    """Return what ``data.order`` chooses: a function of configuration, shards and nodes alone.

    The free space of a disk is none of them: it differs between nodes and days.
    """
    data = config.data
    by_hand = data.block is not None or data.window is not None
    if by_hand or data.order == "uniform" or (data.order == "auto" and _fits(data, index)):
        return {"block": 1, "window": 0, "lanes": 1}
    shards = [shard.filesize for shard in index.shards if shard.nsamples]
    # Half of the cache: the other half is for the shards of the next windows.
    cache = int(data.cache_gib * 2**30) // max(shards)
    room = cache // 2 if data.cache_gib else len(shards)
    window = min(WINDOW, max(1, room - 1))  # a window begins and ends amid a shard
    most = max(1, min(room // (window + 1), len(shards) // window))
    # Each batch then has as many rows of one lane as of another, and each node whole lanes.
    rows = data.batch_size // nodes
    lanes = nodes * max(n for n in range(1, max(1, most // nodes) + 1) if rows % n == 0)
    block = max(index.sizes)
    return {"block": block, "window": window * block, "lanes": lanes}


def _remote_bytes(index: Index) -> int:
    return sum(shard.filesize for shard in index.shards) - sum(
        shard.filesize for shard in index.local_shards
    )


def _fits(data: DataConfig, index: Index) -> bool:
    """Return whether a node can keep every shard: those on a disk are where they are."""
    return not data.cache_gib or _remote_bytes(index) <= data.cache_gib * 2**30


def describe(
    config: Config, index: Index, order: Order, nodes: int, saved: Mapping[str, Any]
) -> str:
    """Return one line on an order and what it means: shards, downloads, mixture.

    Args:
        config: of the run.
        index: the shards.
        order: the order.
        nodes: of this launch.
        saved: as for ``arrange``.
    """
    shards, remote = sum(map(bool, index.sizes)), _remote_bytes(index)
    used = {cut: getattr(order, cut) for cut in CHOSEN}
    is_uniform = order.block == 1 and order.lanes == 1
    kind = "uniform" if is_uniform else ", ".join(f"{cut} {value}" for cut, value in used.items())
    # A window begins and ends amid a block; without one, a lane reads one block after the other.
    blocks = -(-order.window // order.block) + 1 if order.window else 1
    open_at_once = min(shards, blocks * -(-order.lanes // nodes)) if order.block > 1 else shards
    parts = [f"{open_at_once} of {shards} shards at a time on a node"]
    if remote and _fits(config.data, index):
        parts.append(f"which downloads {_gb(remote)} once")
    elif remote and order.block == 1:
        parts.append(
            f"whose data.cache_gib ({config.data.cache_gib:g}) has not room for all: it downloads "
            "most of them again and again; leave data.order=auto and data.block out in a new run"
        )
    elif remote:
        share = remote / min(nodes, order.lanes)
        parts.append(
            f"which downloads {_gb(share)} per epoch (data.cache_gib {config.data.cache_gib:g})"
        )
    if order.algorithm != SORTED or order.num_samples < bijection.SMALLEST:
        together, uniform = mixture(order, config.data.batch_size)
        parts.append(
            f"two images of a batch are of one shard in {together:.2%} of cases"
            + ("" if is_uniform else f" ({uniform:.2%} in a uniform order)")
        )
    line = f"{kind} ({order.algorithm}): {', '.join(parts)}"
    if _kept(config, index, saved) and _chosen(config, index, nodes) | _given(config.data) != used:
        line += "; kept from the start of the run, a new one would have another order"
    return line


def mixture(order: Order, batch_size: int) -> tuple[float, float]:
    """Return how often two images of a batch are of the same shard, here and in a uniform order.

    Counted in some batches of the first epoch.
    """
    ends, batches = np.cumsum(order.sizes), max(1, order.num_samples // batch_size)
    found = []
    looks = max(1, min(LOOKS, LOOKED_AT // batch_size))
    for k in sorted({look * batches // looks for look in range(looks)}):
        ids = order.batch(k, batch_size)[1]
        counts = np.bincount(np.searchsorted(ends, ids, side="right"))
        found.append(_pairs(counts))
    return float(np.mean(found)), _pairs(order.sizes)


def _pairs(counts: np.ndarray[Any, Any]) -> float:
    total = int(counts.sum())
    return float((counts * (counts - 1.0)).sum() / max(1, total * (total - 1)))


def _gb(count: float) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e11 else f"{count / 1e9:.3g} GB"
