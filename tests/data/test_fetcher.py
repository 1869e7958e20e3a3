"""Shards that are downloaded before they are needed, through a cache smaller than the set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import CountingServer, pixels_of

from pipeline.config.schema import Config, DataConfig, RunConfig, TrainConfig
from pipeline.data import remote
from pipeline.data.fetcher import Fetcher, Traffic
from pipeline.data.loader import Loader, make_order
from pipeline.data.shards import Index, read_index
from pipeline.runtime.errors import DataError

SHARDS, SHARD, BATCH, KEPT = 24, 40, 24, 8
END = 2 * SHARDS * SHARD // BATCH
PATIENCE = 120
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def stored(make_shards: Callable[..., Index], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """24 shards of 40 images and equal size."""
    index = make_shards(tmp_path_factory.mktemp("set"), [SHARD] * SHARDS)
    assert len({shard.filesize for shard in index.shards}) == 1
    return index


@pytest.fixture
def server(
    stored: Index, serve: Callable[[Path], CountingServer], monkeypatch: pytest.MonkeyPatch
) -> CountingServer:
    monkeypatch.setattr(remote, "FETCH_PAUSE", 0.01)
    return serve(Path(stored.location))


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    psutil.wait_procs(left, timeout=30)
    assert not [process for process in left if process.is_running()]


def loader_of(index: Index, cache: Path, rank: int = 0, ranks: int = 1, seed: int = 0) -> Loader:
    data = DataConfig(
        shards=index.location,
        batch_size=BATCH,
        workers=2,
        prefetch=1,
        block=SHARD,
        window=2 * SHARD,
        cache_dir=str(cache),
        cache_gib=(KEPT * index.shards[0].filesize + 1) / 2**30,
    )
    config = Config(data=data, train=TrainConfig(total_steps=END), run=RunConfig(seed=seed))
    return Loader(config, index, make_order(config, index), rank, ranks)


def assert_right(loader: Loader, k: int, ids: np.ndarray, pixels: np.ndarray) -> None:
    assert np.array_equal(ids, loader.ids_of(k))
    assert np.array_equal(pixels[0], pixels_of(int(ids[0]), (8, 8, 3)))


def tars(gets: dict[str, int]) -> int:
    return sum(count for name, count in gets.items() if name.endswith(".tar"))


def in_time(loader: Loader, start: int, server: CountingServer) -> tuple[int, int]:
    """Read from a batch to the end, each when its plan is carried out; (downloads, of the plan).

    Steps that take longer than downloads: so the counts do not depend on the speed of the machine.
    """
    cache = loader.cache
    parts = (loader.config, cache, loader.order)
    plan = Fetcher.plan_of(*parts, slice(0, BATCH), start)
    before, planned, held = tars(server.gets), 0, set(cache.held())

    def carry_out(consumed: int) -> None:
        nonlocal planned
        for fetch in plan.until(consumed):
            held.difference_update(fetch.evicted)
            held.add(fetch.shard)
            planned += fetch.is_download
        until = time.monotonic() + PATIENCE
        while not held <= set(cache.held()):
            assert time.monotonic() < until
            time.sleep(0.01)

    with closing(loader.batches(start)) as batches:
        carry_out(start - 1)
        for k in range(start, END):
            batch = next(batches)
            assert_right(loader, k, batch.ids, batch.images.numpy())
            carry_out(k)
            assert cache.used() <= cache.limit
    return tars(server.gets) - before, planned


def test_two_epochs_through_a_third_of_the_set(server: CountingServer, tmp_path: Path) -> None:
    """The exact order, each download as planned, and no more than the cache may hold; then again
    from the middle, with the copies that are there."""
    index = read_index(server.url)
    loader = loader_of(index, tmp_path)
    downloads, planned = in_time(loader, 0, server)
    assert downloads == planned < 2 * SHARDS
    assert loader.traffic is not None
    row = loader.traffic.row(END)
    assert row["perf/fetch_mb_per_sec"] > 0
    assert row["perf/fetch_wait"] >= 0
    downloads, planned = in_time(loader_of(index, tmp_path), END // 2, server)
    assert downloads == planned <= SHARDS
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fetcher_that_is_killed_costs_time_alone(server: CountingServer, tmp_path: Path) -> None:
    """The workers download by themselves, in the exact order and within the cache."""
    loader = loader_of(read_index(server.url), tmp_path)
    with closing(loader.batches()) as batches:
        for k in range(END):
            batch = next(batches)
            if k == 3:
                assert loader._fetcher is not None
                os.kill(loader._fetcher._process.pid or 0, signal.SIGKILL)
            assert_right(loader, k, batch.ids, batch.images.numpy())
            assert loader.cache.used() <= loader.cache.limit + loader.index.shards[0].filesize


def test_ranks_and_jobs_share_a_folder(server: CountingServer, tmp_path: Path) -> None:
    """Two ranks of one job and another job with another seed, as fast as they can: exact orders."""
    index = read_index(server.url)
    with ExitStack() as stack:
        loaders = [
            *(loader_of(index, tmp_path, rank, 2) for rank in range(2)),
            loader_of(index, tmp_path, seed=1),
        ]
        streams = [stack.enter_context(closing(loader.batches())) for loader in loaders]
        for k in range(END // 2):
            for loader, stream in zip(loaders, streams, strict=True):
                batch = next(stream)
                assert_right(loader, k, batch.ids, batch.images.numpy())


@pytest.mark.parametrize("fault", ["server", "folder"])
def test_what_is_wrong_is_said_by_the_worker_that_needs_the_shard(
    fault: str, server: CountingServer, tmp_path: Path
) -> None:
    """A server that refuses from some batch on, or a folder that is none: one message, no hang."""
    index = read_index(server.url)
    cache = tmp_path / "cache"
    if fault == "folder":
        cache.write_text("a file")

    def train() -> None:
        for k in range(END):
            next(batches)
            if k == 2:
                server.failing.update(dict.fromkeys((one.url for one in index.shards), 10_000))

    words = "cannot be fetched" if fault == "server" else "data.cache_dir"
    with (
        closing(loader_of(index, cache).batches()) as batches,
        pytest.raises(DataError, match=words),
    ):
        train()


SCRIPT = """
import sys, time
from test_fetcher import *
loader = loader_of(read_index(sys.argv[1]), Path(sys.argv[2]))
batches = loader.batches()
next(batches)
print(loader._fetcher._process.pid, flush=True)
time.sleep(1000)
"""


def test_the_fetcher_ends_with_the_process_that_started_it(
    server: CountingServer, tmp_path: Path
) -> None:
    """SIGKILL of the rank: no process stays, nor a download in part."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    with process:
        assert process.stdout is not None
        fetcher = psutil.Process(int(process.stdout.readline()))
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    psutil.wait_procs([fetcher, *workers], timeout=60)
    assert not fetcher.is_running()


def test_a_row_is_of_the_steps_since_the_last_one() -> None:
    """Seconds of a step that a worker waited, on average; bytes of workers and fetcher."""
    traffic = Traffic(2)
    traffic.waited[:], traffic.fetched[:], traffic.state[2:] = (3.0, 1.0), (1e6, 0), (2e6, 2**30)
    first, second = traffic.row(4), traffic.row(4)
    assert first["perf/fetch_wait"] == 0.5
    assert first["perf/fetch_mb_per_sec"] > 0
    assert second["perf/fetch_wait"] == second["perf/fetch_mb_per_sec"] == 0
    assert second["perf/cache_gib"] == 1
