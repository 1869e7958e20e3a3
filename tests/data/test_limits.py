"""Training where open files or /dev/shm are scarce: it goes on, or ends with one message."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launching import REPO, TIMEOUT, command, environment, started

from pipeline.data.shards import INDEX_NAME, Index
from pipeline.runs.step_folders import committed, step_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]
FEW_FILES = ("sh", "-c", 'ulimit -n 64; exec "$@"', "sh")
MOUNT = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
SHM = {
    "small": MOUNT,
    "full": f"{MOUNT}; dd if=/dev/zero of=/dev/shm/fill bs=4k 2>/dev/null",
    "read-only": f"{MOUNT}; mount -o remount,ro /dev/shm",
}


def under(prefix: Sequence[str], *arguments: object) -> tuple[int, str]:
    """(exit code, output) of a command that ``prefix`` starts, in a private environment."""
    done = subprocess.run(
        [*prefix, *map(str, arguments)],
        env=environment() | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


def with_shm(how: str) -> tuple[str, ...]:
    """The words that start a command with a /dev/shm of its own; skips where root is needed."""
    probe = ("unshare", "-m", "sh", "-c", MOUNT)
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a /dev/shm of its own needs root and mount namespaces")
    return ("unshare", "-m", "sh", "-c", f'{SHM[how]}; exec "$@"', "sh")


def assert_one_message(output: str, *parts: str) -> None:
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    for part in parts:
        assert part in errors[0]


@pytest.fixture(scope="module")
def many_shards(make_shards: Callable[..., Index], tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 shards of one image each; a batch alone has half as many as 64 open files."""
    folder = tmp_path_factory.mktemp("many")
    make_shards(folder, [1] * 200, (32, 32, 1))
    return f"data.shards={folder}"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_more_shards_than_open_files(
    workers: int, many_shards: str, tiny_config: Path, tmp_path: Path
) -> None:
    """RLIMIT_NOFILE=64, soft and hard: two epochs of 200 shards are read."""
    settings = ("train.total_steps=13", f"run.dir={tmp_path / 'run'}", f"data.workers={workers}")
    code, output = under(FEW_FILES, *command(1, tiny_config, many_shards, *settings))
    assert code == 0, output
    assert step_of(committed(tmp_path / "run")[-1]) == 13


def test_too_few_open_files_for_the_workers_is_one_message(
    many_shards: str, tiny_config: Path, tmp_path: Path
) -> None:
    """The message says which limit, and a setting that needs no worker; no process is left."""
    settings = ("train.total_steps=3", f"run.dir={tmp_path / 'run'}")
    words = command(1, tiny_config, many_shards, *settings)
    code, output = under(FEW_FILES, *words, "data.workers=32")
    assert code == 2
    assert_one_message(output, "data.workers (32)", "limited to 64", "ulimit -n", "data.workers=0")
    assert under(FEW_FILES, *words, "data.workers=0")[0] == 0


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    """Also in a process that was given few, if the hard limit allows more."""
    show = "from pipeline.runtime.host import raise_open_files as f; print(f(), f())"
    for limits, expected in (("-Sn 64; ulimit -Hn 500", 500), ("-n 77", 77)):
        words = ("sh", "-c", f'ulimit {limits}; exec "$@"', "sh")
        assert under(words, sys.executable, "-c", show) == (0, f"{expected} {expected}\n")


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_dev_shm_that_cannot_be_used_is_one_message(
    how: str, many_shards: str, tiny_config: Path, tmp_path: Path
) -> None:
    """A run of 5 steps goes on where /dev/shm is gone: its checkpoint stays, the remedy works."""
    prefix, run = with_shm(how), tmp_path / "run"
    words = command(1, tiny_config, many_shards, f"run.dir={run}")
    assert under((), *words, "train.total_steps=5")[0] == 0
    code, output = under(prefix, *words, "train.total_steps=8")
    assert code == 2
    assert_one_message(output, "data.workers (2)", "/dev/shm", "--shm-size", "data.workers=0")
    assert [step_of(path) for path in committed(run)] == [5]
    code, output = under(prefix, *words, "train.total_steps=8", "data.workers=0")
    assert code == 0, output
    assert step_of(committed(run)[-1]) == 8


def test_a_tiny_dev_shm_is_enough(many_shards: str, tiny_config: Path, tmp_path: Path) -> None:
    """256 KiB, of which a batch of 64 px images alone would take three times as much."""
    settings = ("train.total_steps=3", "data.prefetch=8", f"run.dir={tmp_path / 'run'}")
    code, output = under(with_shm("small"), *command(1, tiny_config, many_shards, *settings))
    assert code == 0, output


def test_a_shard_cut_during_the_run_is_one_message(
    make_shards: Callable[..., Index], tiny_config: Path, tmp_path: Path
) -> None:
    """A worker that reads past the new end says so, and ends; the message blames the shard."""
    index = make_shards(tmp_path / "set", [400], (32, 32, 1))
    settings = (f"data.shards={index.location}", "train.total_steps=100000")
    with started(1, tiny_config, *settings, f"run.dir={tmp_path / 'run'}") as process:
        deadline = time.monotonic() + TIMEOUT
        while not committed(tmp_path / "run"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with Path(index.location, index.shards[0].url).open("r+b") as file:
            file.truncate(4096)
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, output
    name = f"{index.location}/{index.shards[0].url}"
    assert_one_message(output, f"{name}: ", "Restore it")
    assert committed(tmp_path / "run")


def assert_prepare_names(prefix: Sequence[str], folder: Path, workers: int, *parts: str) -> None:
    """``prepare`` cannot start its workers: one message; a usual place then completes the set."""
    words = (sys.executable, "-m", "pipeline.prepare", folder, "--workers", workers)
    code, output = under(prefix, *words)
    assert code == 2, output
    assert_one_message(output, f"--workers ({workers})", *parts)
    assert under((), *words)[0] == 0


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_prepare_names_a_dev_shm_that_cannot_be_used(
    how: str, make_shards: Callable[..., Index], tmp_path: Path
) -> None:
    """Its workers share semaphores there as well."""
    index = make_shards(tmp_path / "set", [2, 2])
    (tmp_path / "set" / INDEX_NAME).unlink()
    assert_prepare_names(with_shm(how), Path(index.location), 2, "/dev/shm", "--shm-size")


def test_prepare_names_too_few_open_files_for_its_workers(
    make_shards: Callable[..., Index], tmp_path: Path
) -> None:
    """Each worker takes pipes; no worker that did start is left."""
    index = make_shards(tmp_path / "set", [1] * 80)
    (tmp_path / "set" / INDEX_NAME).unlink()
    assert_prepare_names(FEW_FILES, Path(index.location), 80, "limited to 64", "fewer --workers")
