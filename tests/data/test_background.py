"""Shards too large to be hashed before a run are hashed during it, and no swap stays unseen."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from launching import TIMEOUT, start

from pipeline.config.schema import Config, DataConfig, ModelConfig
from pipeline.data import background, cache, checksums
from pipeline.data.background import BackgroundCheck, first_uses
from pipeline.data.loader import Loader, make_order, open_data
from pipeline.data.order import Order
from pipeline.data.shards import Index, read_index
from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.errors import DataError
from pipeline.runtime.host import cores
from pipeline.runtime.signals import Stopped, never_stop

SIZES = [40, 0, 40, 40, 40, 40]


@pytest.fixture(autouse=True)
def all_sets_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "HASH_ALL_BELOW", 0)
    checksums._compared.clear()


@pytest.fixture
def even(make_shards: Callable[..., Index], tmp_path: Path) -> Index:
    """Five shards of equal size, and an empty one."""
    index = make_shards(tmp_path / "set", SIZES)
    assert len({shard.filesize for shard in index.shards if shard.nsamples}) == 1
    return index


def swap(index: Index, a: int = 3, b: int = 4) -> None:
    """Exchange two tars of equal size."""
    one, other = (Path(index.location, index.shards[number].url) for number in (a, b))
    spare = one.with_suffix(".spare")
    for source, target in ((one, spare), (other, one), (spare, other)):
        shutil.move(source, target)


def config_of(index: Index, **data: object) -> Config:
    values = {"shards": index.location, "batch_size": 8, "workers": 0} | data
    return Config(
        data=DataConfig(**values),  # type: ignore[arg-type]
        model=ModelConfig(image_size=8, channels=3),
    )


def loader_of(index: Index, **data: object) -> Loader:
    config = config_of(index, **data)
    return Loader(config, index, make_order(config, index))


@pytest.fixture
def no_process_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    psutil.wait_procs(left, timeout=30)
    assert not [process for process in left if process.is_running()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("no_process_left")
def test_two_swapped_shards_end_the_run_with_one_message(workers: int, even: Index) -> None:
    """Equal sizes, decodable samples, wrong labels: named with the remedy within the run."""
    swap(even)
    open_data(config_of(even), Accelerator(cpu=True))  # sizes are right
    until = time.monotonic() + 120
    with (
        closing(loader_of(even, workers=workers).batches()) as batches,
        pytest.raises(DataError) as caught,
    ):
        list(itertools.takewhile(lambda _: time.monotonic() < until, batches))
    message = str(caught.value)
    assert any(f"{even.location}/{even.shards[k].url}: its checksum" in message for k in (3, 4))
    for part in ("Restore it", "--verify", "remove the checkpoints that were written since"):
        assert part in message
    assert "\n" not in message


@pytest.mark.usefixtures("no_process_left")
def test_a_run_does_not_end_before_what_it_read_is_compared(even: Index) -> None:
    """One batch alone is read; the last checkpoint waits for the shards of this batch."""
    swap(even)
    loader = loader_of(even)
    with closing(loader.batches()) as batches:
        next(batches)
        with pytest.raises(DataError, match="its checksum differs"):
            loader.finish_check(30, never_stop)


ALL_ARE_LARGE = """
import sys
from pipeline.data import cache
cache.HASH_ALL_BELOW = 0
from pipeline.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_of_one_step_on_swapped_shards_ends_with_one_message(
    workers: int, make_shards: Callable[..., Index], tiny_config: Path, tmp_path: Path
) -> None:
    """The command exits with code 2 before it commits a checkpoint; put right, it trains."""
    index = make_shards(tmp_path / "gray", [50, 50, 50], (32, 32, 1))
    swap(index, 0, 2)
    settings = (f"data.shards={index.location}", f"data.workers={workers}", "train.total_steps=1")
    words = [sys.executable, "-c", ALL_ARE_LARGE, "--config", str(tiny_config), *settings]

    def run() -> tuple[int, str]:
        process = start([*words, f"run.dir={tmp_path / 'run'}"])
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output

    code, output = run()
    assert code == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "its checksum differs from the index" in errors[0]
    assert "Traceback" not in output
    assert not committed(tmp_path / "run")
    swap(index, 0, 2)
    code, output = run()
    assert code == 0, output
    assert step_of(committed(tmp_path / "run")[-1]) == 1


@pytest.mark.usefixtures("no_process_left")
def test_a_right_set_is_read_to_the_end(even: Index) -> None:
    """Three epochs and the check at the end pass; a stop ends that check."""
    loader = loader_of(even, workers=1)
    with closing(loader.batches()) as batches:
        for _ in range(75):
            next(batches)
        loader.finish_check(75, never_stop)
        assert loader._check is not None
        assert loader._check.left(75) == 0


@pytest.mark.usefixtures("no_process_left")
def test_the_rest_is_compared_here_if_the_process_was_killed(even: Index) -> None:
    """Whoever kills the process, no shard stays unchecked."""
    swap(even)
    order = Order(even.sizes, 0)
    check = BackgroundCheck(even, order, 0)
    assert check._process.pid is not None
    os.kill(check._process.pid, signal.SIGKILL)
    check._process.join()
    check._states[:] = background.TO_DO
    with pytest.raises(DataError, match="its checksum differs"):
        check.finish(200, never_stop)
    check.close()


@pytest.mark.usefixtures("no_process_left")
def test_a_stop_ends_the_wait_at_the_end(even: Index) -> None:
    """The process is kept from its work; the wait for it ends all the same."""
    check = BackgroundCheck(even, Order(even.sizes, 0), 0)
    assert check._process.pid is not None
    os.kill(check._process.pid, signal.SIGSTOP)
    check._states[:] = background.TO_DO
    with pytest.raises(Stopped):
        check.finish(200, lambda: True)
    os.kill(check._process.pid, signal.SIGCONT)
    check.close()


@pytest.mark.parametrize("fault", ["missing", "cut", "fifo", "folder"])
@pytest.mark.usefixtures("no_process_left")
def test_other_faults_of_a_shard_are_named_too(fault: str, even: Index) -> None:
    """A shard that is harmed after the run began."""
    path = Path(even.location, even.shards[3].url)
    check = BackgroundCheck(even, Order(even.sizes, 0), 0)
    assert check._process.pid is not None
    os.kill(check._process.pid, signal.SIGKILL)
    check._process.join()
    check._states[:] = background.TO_DO
    content = path.read_bytes()
    path.unlink()
    if fault == "cut":
        path.write_bytes(content[:-512])
    elif fault == "fifo":
        os.mkfifo(path)
    elif fault == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=rf"{path}: .*Restore it|{path}: missing"):
        check.finish(200, never_stop)
    check.close()


def test_shards_come_in_the_order_in_which_a_run_reads_them(uneven: Index) -> None:
    """From any start, in any order, each shard with samples comes exactly once."""
    for order in (Order(uneven.sizes, 1), Order(uneven.sizes, 1, block=8, window=40, lanes=2)):
        for begin in (0, 500, 996, 5000):
            found = list(first_uses(uneven, order, begin))
            assert sorted(found) == [k for k, size in enumerate(uneven.sizes) if size]
            ids = order.ids(range(begin, begin + 2 * 997))
            starts = [sum(uneven.sizes[:k]) for k in range(len(uneven.sizes) + 1)]
            seen: list[int] = []
            for sample in ids.tolist():
                k = next(k for k, end in enumerate(starts[1:]) if sample < end)
                if k not in seen:
                    seen.append(k)
            assert found == seen
            assert list(first_uses(uneven, order, begin, begin + 1)) == found[:1]


@pytest.mark.usefixtures("no_process_left")
def test_hashing_takes_a_small_share_of_the_cores_until_it_is_waited_for(
    make_shards: Callable[..., Index], tmp_path: Path
) -> None:
    """No CPU hashes 3 GB a second; at a hundredth of the cores it takes accordingly longer."""
    index = make_shards(tmp_path / "big", [1000, 1000], (64, 64, 3))
    size = sum(shard.filesize for shard in index.shards)
    least = size / 3e9 / min(background.LARGEST_SHARE, background.SHARE * cores())
    began = time.monotonic()
    check = BackgroundCheck(index, Order(index.sizes, 0), 0)
    while check.left(4000):
        time.sleep(0.01)
    assert time.monotonic() - began > least
    check.finish(4000, never_stop)
    check.close()
    hurried = BackgroundCheck(index, Order(index.sizes, 0), 0)
    hurried.finish(4000, never_stop)
    assert hurried.left(4000) == 0
    hurried.close()


@pytest.mark.parametrize(("how", "large"), [("size", True), ("sha256", True), ("auto", False)])
@pytest.mark.usefixtures("no_process_left")
def test_no_process_where_it_is_not_needed(
    how: str, large: bool, even: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets that were hashed before the run, or whose user asked for sizes alone."""
    monkeypatch.setattr(cache, "HASH_ALL_BELOW", 0 if large else 1 << 40)
    loader = loader_of(even, verify=how)
    with closing(loader.batches()) as batches:
        next(batches)
        assert loader._check is None
        loader.finish_check(1, never_stop)


def test_bytes_are_compared_once_in_the_life_of_a_process(
    even: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the file changes, which its times and its inode tell."""
    counted: list[Path] = []
    real = checksums.fault_of
    monkeypatch.setattr(
        checksums, "fault_of", lambda path, *rest: counted.append(path) or real(path, *rest)
    )
    for _ in range(2):
        cache.check_shards(even, "auto")
    assert len(counted) == len(even.shards)
    swap(read_index(even.location))
    with pytest.raises(DataError, match="its checksum differs"):
        cache.check_shards(even, "auto")
