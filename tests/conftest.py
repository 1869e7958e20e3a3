"""Shared fixtures: small shard sets with known pixels, and a web server that counts."""

from __future__ import annotations

import functools
import http.server
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from pipeline.data.index_writer import write_index
from pipeline.data.shard_writer import write_shard
from pipeline.data.shards import Index
from pipeline.data.tar_scan import scan

UNEVEN = [1, 17, 400, 3, 0, 211, 97, 268]  # 997 samples, a prime; one shard is empty
Shape = tuple[int, int, int]

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# What is ignored here stays ignored in every process that a test stops: a shell starts background
# jobs with SIGINT ignored, nohup and some runners of CI ignore SIGHUP.
for _number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from the tests and what they start, unless the tests for them are asked for."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pixels_of(sample: int, shape: Shape) -> np.ndarray:
    """The image of a sample: noise, a function of its id alone; uint8 of ``shape``."""
    return np.random.default_rng(sample).integers(0, 256, shape, dtype=np.uint8)


def label_of(sample: int) -> int:
    return sample % 10


def write_shards(
    folder: Path, sizes: Sequence[int], shape: Shape = (8, 8, 3), field: str = "npy"
) -> Index:
    """Shards of the given sizes; sample ids count through them, as they do in the index."""
    folder.mkdir(parents=True, exist_ok=True)
    scans, ids = [], itertools.count()
    for number, size in enumerate(sizes):
        path = folder / f"shard-{number:06d}.tar"
        with write_shard(path, field) as tar:
            for sample in itertools.islice(ids, size):
                tar.add(f"{sample:06d}", pixels_of(sample, shape), label_of(sample))
        scans.append(scan(path))
    return write_index(folder, scans, shape, {"test": True})


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Index]:
    """``write_shards``, for tests that need a set of their own."""
    return write_shards


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """997 labelled 8x8 RGB images in shards of very different sizes; read only."""
    return write_shards(tmp_path_factory.mktemp("uneven"), UNEVEN)


@pytest.fixture(scope="session")
def gray_32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function n -> folder of n gray 32x32 images in three shards, for training runs."""

    @functools.cache
    def folder_of(n: int) -> Path:
        folder = tmp_path_factory.mktemp(f"gray_{n}")
        write_shards(folder, [n // 3, n // 3, n - 2 * (n // 3)], (32, 32, 1))
        return folder

    return folder_of


TINY = """
model: {image_size: 32, channels: 1, z_dim: 16, ngf: 8, ndf: 8}
data: {batch_size: 32, workers: 2, record_ids: true}
optim: {g_lr: 1.0e-3, d_lr: 1.0e-3}
train: {precision: fp32, micro_batch: 8, checkpoint_every: 5, log_every: 4, sample_every: 12}
tracking: {wandb: disabled}
"""


@pytest.fixture(scope="session")
def training_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """331 gray 32x32 images in three uneven shards: an epoch is 10.3 batches."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    scans = []
    for number, size in enumerate((150, 1, 180)):
        path = folder / f"shard-{number}.tar"
        with write_shard(path, "npy") as tar:
            for k in range(size):
                pixels = np.zeros((32, 32, 1), np.uint8)
                x, y = rng.integers(4, 20, 2)
                pixels[y : y + 8, x : x + 8] = rng.integers(100, 255)
                tar.add(f"{number}-{k:05d}", pixels, k % 10)
        scans.append(scan(path))
    write_index(folder, scans, (32, 32, 1), {})
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def training_settings(training_shards: Path) -> list[str]:
    return [f"data.shards={training_shards}", "train.total_steps=24"]


class CountingServer:
    """Serves a folder on loopback and counts the requests for each file.

    ``cut_short[name] = n``: the next n answers for that file end midway. ``hold``, while it is not
    set, keeps tars back.
    """

    def __init__(self, folder: Path) -> None:
        self.gets: Counter[str] = Counter()
        self.cut_short: Counter[str] = Counter()
        self.failing: Counter[str] = Counter()
        self.hold = threading.Event()
        self.hold.set()
        lock = threading.Lock()
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                with lock:
                    server.gets[name] += 1
                    cut = server.cut_short[name] > 0
                    server.cut_short[name] -= cut
                    fail = server.failing[name] > 0
                    server.failing[name] -= fail
                if name.endswith(".tar"):
                    server.hold.wait()
                if fail:
                    self.send_error(503)
                elif cut:
                    content = (folder / name).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                else:
                    super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], CountingServer]]:
    """A function folder -> ``CountingServer``; all are closed after the test."""
    servers: list[CountingServer] = []

    def start(folder: Path) -> CountingServer:
        servers.append(CountingServer(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
