"""Thirty-two ranks over gloo: the bits of one, who opens which file, and how such a job ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_shards
from launching import state_of, wait_for
from ranks import start_ranks

from pipeline.config.loading import load
from pipeline.runtime import signals
from pipeline.runtime.errors import exit_on_user_error
from pipeline.train import train

pytestmark = pytest.mark.slow
RANKS, VICTIM = 32, 17
TINY = """
model: {image_size: 32, channels: 1, z_dim: 8, ngf: 4, ndf: 4}
data: {shards: DATA, batch_size: 64, workers: 0}
train: {precision: fp32, micro_batch: 2, exact_sum: true, log_every: 1, rank_timeout: 60,
        checkpoint_every: 0, checkpoint_minutes: 0, sample_every: 0}
tracking: {wandb: disabled}
"""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def on_this_rank(out: str, *words: str) -> None:
    """The training command, with its output and the files it opens in ``out``."""
    rank = os.environ["RANK"]
    said = os.open(f"{out}/{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    note_files(Path(out) / f"{rank}.files", Path(out).parent)
    signals.install()
    with exit_on_user_error():
        config = load(f"{out}/tiny.yaml", words)
        finished = train(config)
    sys.exit(signals.exit_code(finished))


def note_files(log: Path, base: Path) -> None:
    """Write a line (what, path) for each file below a folder that this process opens or changes."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES | {"open", "os.listdir", "os.scandir"}:
            return
        path = str(arguments[0])
        if path.startswith(f"{base}/") and ("/data" in path or "/run/" in path):
            writes = event in CHANGES or (event == "open" and arguments[2] & WRITES)
            os.write(file, json.dumps(["write" if writes else "read", path]).encode() + b"\n")

    sys.addaudithook(note)


@contextmanager
def running(ranks: int, out: Path, *words: str) -> Iterator[list[Any]]:
    """The ranks of a run as processes, killed when the block ends."""
    processes = start_ranks(ranks, on_this_rank, str(out), *words)
    try:
        yield processes
    finally:
        for one in processes:
            one.kill()
            one.join()


def ended(processes: list[Any]) -> list[int | None]:
    """The exit codes; like a launcher, it stops the others once one has left with an error."""
    left, deadline = list(processes), time.monotonic() + 200
    while left and time.monotonic() < deadline:
        multiprocessing.connection.wait([one.sentinel for one in left], timeout=1)
        left = [one for one in left if one.exitcode is None]
        if any(one.exitcode for one in processes):
            for one in left:
                one.terminate()
    return [one.exitcode for one in processes]


def go_on(ranks: int, out: Path, run: Path, steps: int) -> None:
    with running(ranks, out, f"run.dir={run}", f"train.total_steps={steps}") as processes:
        assert ended(processes) == [0] * ranks, said(out)


def said(out: Path) -> str:
    return "".join(file.read_text() for file in sorted(out.glob("*.txt")))


def rows(run: Path) -> list[dict[str, float]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in one.items() if k.startswith(("loss", "scores"))} for one in found]


def files(out: Path, rank: int) -> Counter[tuple[str, str]]:
    """How often a rank read or wrote each file of the run and of the data."""
    lines = (out / f"{rank}.files").read_text().splitlines()
    return Counter((what, path) for what, path in map(json.loads, lines))


def require_few_files(out: Path) -> None:
    """Rank 0 alone opens files of the run; the others read each file of the data once."""
    for rank in range(RANKS):
        opened = files(out, rank)
        of_run = [key for key in opened if "/run/" in key[1]]
        assert bool(of_run) == (rank == 0), (rank, of_run)
        assert all("/run/" in path for what, path in opened if what == "write"), (rank, opened)
        often = {path: n for (_, path), n in opened.items() if "/data" in path}
        assert max(often.values()) <= (1 if rank else 8), (rank, often)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function name -> folder with the configuration, for the output of some ranks."""
    base = tmp_path_factory.mktemp("many")
    write_shards(base / "data", [150, 1, 180], (32, 32, 1))

    def make(name: str) -> Path:
        (base / name).mkdir()
        (base / name / "tiny.yaml").write_text(TINY.replace("DATA", f"{base}/data"))
        return base / name

    return make


def test_thirty_two_ranks_are_one_run(place: Callable[[str], Path]) -> None:
    """32 ranks until one of them gets a SIGTERM, 32 of which one is killed, 4, 16 and 1: the
    checkpoint and the rows are those of one process that was never disturbed.

    All ranks save at the same step and leave with exit code 0. The lost rank is told once, and the
    others leave with 2. Ranks but the first open nothing of the run, new or resumed, and each
    file of the data once, however many steps they take.
    """
    stopped, killed, rest = place("stopped"), place("killed"), place("rest")
    moved, still = rest / "run" / "moved", rest / "run" / "still"
    endless = f"run.dir={moved}", "train.total_steps=100000"
    log = moved / "metrics.jsonl"
    taken = lambda: len(log.read_text().splitlines()) if log.exists() else 0  # noqa: E731

    with running(RANKS, stopped, *endless) as ranks:
        wait_for(lambda: taken() >= 3, "step")
        os.kill(ranks[VICTIM].pid, signal.SIGTERM)
        assert ended(ranks) == [0] * RANKS, said(stopped)
    saved = int((moved / "progress").read_text())
    assert (moved / "PREEMPTED").read_text() == str(saved)
    assert said(stopped).count(f"stopped by another rank's signal at step {saved};") == 1
    require_few_files(stopped)

    with running(RANKS, killed, *endless) as ranks:
        wait_for(lambda: taken() >= saved + 2, "step")
        os.kill(ranks[VICTIM].pid, signal.SIGKILL)
        codes = ended(ranks)
    assert [codes.pop(VICTIM), *set(codes)] == [-signal.SIGKILL, 2], said(killed)
    assert said(killed).count("error: ") == 1, said(killed)
    assert "error: rank 0 lost another rank" in said(killed)
    assert "Traceback" not in said(killed)
    assert int((moved / "progress").read_text()) == saved

    require_few_files(killed)

    for more, ranks_now in enumerate((4, 16, 1), 1):
        go_on(ranks_now, rest, moved, saved + more)
    go_on(1, rest, still, saved + 3)
    a, b = state_of(moved, saved + 3), state_of(still, saved + 3)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert rows(moved) == rows(still)
