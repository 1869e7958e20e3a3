"""``data.order``: what it chooses for a set, a cache and a number of nodes, and who keeps it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CountingServer, write_shards
from launching import STATE, train

from pipeline.config.changes import fixed_differences
from pipeline.config.schema import Config, DataConfig, RunConfig, flatten
from pipeline.data.arrangement import arrange, describe, mixture
from pipeline.data.index import Index, Shard
from pipeline.data.loader import make_order
from pipeline.data.order import Order
from pipeline.runs import checkpoint
from pipeline.runs.run_folder import saved_order
from pipeline.runs.step_folders import committed

GIB = 2**30
UNIFORM = {"block": 1, "window": 0, "lanes": 1}


@dataclasses.dataclass(frozen=True)
class Sizes(Index):
    """An index without a table."""

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)


def index_of(shards: int, samples: int = 10_000, gib: float = 1.0, *, remote: bool = True) -> Index:
    listed = [Shard(f"{k}.tar", samples, int(gib * GIB), f"{k:064}") for k in range(shards)]
    where = "https://host/set" if remote else "/data/set"
    return Sizes(where, "npy", (8, 8, 3), tuple(listed), np.zeros(0))


def config_of(**data: object) -> Config:
    return Config(data=DataConfig(**data))


@pytest.mark.parametrize(
    ("settings", "index", "nodes", "expected"),
    [
        ({}, index_of(100, remote=False), 1, UNIFORM),  # local: every shard is there
        ({"cache_gib": 5}, index_of(100, remote=False), 8, UNIFORM),
        ({}, index_of(100), 8, UNIFORM),  # no limit
        ({"cache_gib": 100}, index_of(100), 1, UNIFORM),  # it just fits
        ({"cache_gib": 99}, index_of(100), 1, {"block": 10_000, "window": 30_000, "lanes": 8}),
        ({"cache_gib": 99}, index_of(100), 3, {"block": 10_000, "window": 30_000, "lanes": 12}),
        ({"cache_gib": 500}, index_of(9000), 4, {"block": 10_000, "window": 30_000, "lanes": 32}),
        ({"cache_gib": 8}, index_of(9000), 1, {"block": 10_000, "window": 30_000, "lanes": 1}),
        ({"cache_gib": 8}, index_of(9000), 64, {"block": 10_000, "window": 30_000, "lanes": 64}),
        ({"cache_gib": 4}, index_of(9000), 1, {"block": 10_000, "window": 10_000, "lanes": 1}),
        ({"cache_gib": 0.5}, index_of(9000), 1, {"block": 10_000, "window": 10_000, "lanes": 1}),
        ({"cache_gib": 99, "order": "uniform"}, index_of(100), 1, UNIFORM),
        ({"order": "shards"}, index_of(7, remote=False), 1, UNIFORM | {"block": 10_000}),
        ({"cache_gib": 99, "lanes": 5}, index_of(100), 1, {"block": 10_000, "lanes": 5}),
        ({"cache_gib": 99, "block": 9}, index_of(100), 1, UNIFORM | {"block": 9}),
    ],
)
def test_auto_chooses_by_set_cache_and_nodes(settings, index, nodes, expected):
    """Uniform where a node can keep the set; else shards, with windows of all lanes in half of the
    cache of one node, and as many rows of each lane in a batch. What is set stays.
    """
    config = config_of(batch_size=960 if nodes == 3 else 128, **settings)
    found = arrange(config, index, nodes, {})
    if settings.get("order") == "shards":
        assert found == {"block": 10_000, "window": 30_000, "lanes": 1}
        return
    assert {key: found[key] for key in expected} == expected
    assert config.data.batch_size % found["lanes"] == 0 or "lanes" in settings
    if found["block"] > 1 and nodes == 1 and "lanes" not in settings:
        at_once = found["lanes"] * (found["window"] // found["block"] + 1)
        assert at_once <= max(2, config.data.cache_gib)


def test_an_order_says_what_it_means():
    """Shards at once, downloads per node and epoch, the mixture; and that uniform does not fit."""
    index = index_of(1000)
    line = line_of(config_of(cache_gib=100, batch_size=128), index, nodes=4)
    assert line.startswith("block 10000, window 30000, lanes 8 (lwb3): 8 of 1000 shards at a time")
    assert "downloads 268 GB per epoch (data.cache_gib 100)" in line
    assert "(0.10% in a uniform order)" in line
    assert "which downloads 1,074 GB once" in line_of(config_of(), index, nodes=4)
    poor = line_of(config_of(cache_gib=100, order="uniform"), index, nodes=4)
    assert "data.cache_gib (100) has not room for all" in poor
    assert "download" not in line_of(config_of(), index_of(9, remote=False), nodes=1)


def line_of(config: Config, index: Index, nodes: int) -> str:
    return describe(config, index, make_order(config, index, {}, nodes), nodes, {})


def test_the_mixture_is_that_of_the_batches():
    """One lane of whole shards without a window: one shard fills a batch; uniform: their share."""
    apart, uniform = mixture(Order([1000] * 100, 0, block=1000), 50)
    assert apart == 1
    assert uniform == pytest.approx(0.01, rel=0.1)
    assert mixture(Order([1000] * 100, 0), 1000)[0] == pytest.approx(0.01, rel=0.1)


# -- resume -------------------------------------------------------------------------------------


def saved_in(folder: Path, stream: dict[str, object], config: dict[str, object]) -> Config:
    state = STATE | {"stream": stream, "config": config}
    checkpoint.save(folder, 1, {"G": torch.nn.Linear(1, 1)}, {}, state)
    return Config(run=RunConfig(dir=str(folder)))


def test_a_run_keeps_its_order_with_another_cache_and_other_nodes(tmp_path):
    """As its checkpoint says; a fork too, unless data.order or the data are others."""
    index, small = index_of(1000), config_of(cache_gib=100)
    began = make_order(small, index, {}, 4)
    stream = began.describe() | {"fingerprint": index.fingerprint}
    run = saved_in(tmp_path / "run", stream, flatten(small)).run
    for settings, nodes in (({}, 1), ({"cache_gib": 2000}, 16), ({"cache_gib": 9}, 64)):
        config = dataclasses.replace(config_of(**settings), run=run)
        saved = saved_order(config)
        order = make_order(config, index, saved, nodes)
        assert order.describe() == began.describe()
        assert "kept from the start of the run" in describe(config, index, order, nodes, saved)
    assert make_order(config_of(order="uniform"), index, saved).block == 1
    assert make_order(config_of(), index_of(999), saved).block == 1
    assert make_order(config_of(block=7), index, saved).describe()["lanes"] == began.lanes


def test_a_run_from_before_the_key_keeps_its_order(tmp_path):
    """Its configuration has numbers, and today's has None: no difference, and the same order."""
    index, old = index_of(1000), flatten(config_of(cache_gib=100)) | {"data.lanes": 2}
    old |= {"data.block": 1, "data.window": 0}
    del old["data.order"]
    began = Order(index.sizes, 0, lanes=2, algorithm="lwb1")
    stream = began.describe() | {"fingerprint": index.fingerprint}
    config = saved_in(tmp_path / "run", stream, old)
    config = dataclasses.replace(config, data=config_of(cache_gib=100).data)
    assert make_order(config, index, saved_order(config), 8).describe() == began.describe()
    assert fixed_differences(old, config, stream) == []
    same, other = (config_of(cache_gib=100, lanes=n) for n in (2, 4))
    assert fixed_differences(old, same, stream) == []
    assert fixed_differences(old, other, stream) == ["data.lanes: 2 -> 4"]


def test_what_auto_chose_may_be_written_down(tmp_path):
    """The chosen numbers, given by hand, are no change; others are."""
    old, stream = flatten(config_of()), {"block": 500, "window": 1500, "lanes": 4}
    assert fixed_differences(old, config_of(), stream) == []
    assert fixed_differences(old, config_of(block=500, lanes=4), stream) == []
    assert fixed_differences(old, config_of(block=50), stream) == ["data.block: 500 -> 50"]
    assert fixed_differences(old, config_of(order="uniform"), stream) == [
        "data.order: auto -> uniform"
    ]


@pytest.mark.slow
def test_a_training_with_a_cache_smaller_than_the_set(
    serve: Callable[[Path], CountingServer], tiny_config: Path, tmp_path: Path
) -> None:
    """It chooses shards and never keeps them all; the resumed run has room for all, keeps the
    order, and says so. Its batches are those of the order.
    """
    index = write_shards(tmp_path / "set", [20] * 16, (32, 32, 1))
    server, run_dir, cache = serve(tmp_path / "set"), tmp_path / "run", tmp_path / "cache"
    gib = 6.5 * index.shards[0].filesize / GIB
    settings = (f"data.shards={server.url}", f"run.dir={run_dir}", f"data.cache_dir={cache}")
    first = train(1, tiny_config, *settings, f"data.cache_gib={gib}", "train.total_steps=2")
    assert "data order: block 20, window 40, lanes 1 (lwb1): 3 of 16 shards at a time" in first
    assert 0 < len(list(cache.glob("*.tar"))) <= 6
    again = train(1, tiny_config, *settings, "train.total_steps=3")
    assert "block 20, window 40, lanes 1 (lwb1): 3 of 16 shards at a time" in again
    assert "kept from the start of the run" in again
    stream = json.loads((committed(run_dir)[-1] / "state.json").read_text())["stream"]
    order = Order(index.sizes, stream["seed"], block=20, window=40)
    assert order.describe().items() <= stream.items()
    lines = (run_dir / "ids" / "rank_0.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) >= 3
    for row in rows:
        assert row["ids"] == order.batch(row["step"] - 1, 32)[1].tolist()
