"""What ranks tell each other before a run: real processes over gloo."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import on_ranks

from pipeline import distributed, signals
from pipeline.errors import DataError

pytestmark = pytest.mark.slow
TIME_LIMIT = 2.0


def outcome(attempt: Callable[[], object]) -> str:
    try:
        return str(attempt())
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def two_ranks_wait(folder: str) -> None:
    """Rank 0 works, longer than a collective may take; then fails; then is stopped by rank 1."""
    signals.install()
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIME_LIMIT))
    accelerator = distributed.start("fp32")
    rank, done = accelerator.process_index, Path(folder) / "done"

    def takes_long(stop: Callable[[], bool]) -> None:
        time.sleep(1.5 * TIME_LIMIT)
        done.touch()

    def fails(stop: Callable[[], bool]) -> None:
        raise DataError("damaged")

    def never_ends(stop: Callable[[], bool]) -> None:
        while not stop():
            time.sleep(0.02)
        raise signals.Stopped

    found = []
    for work in (takes_long, fails, never_ends):
        if work is never_ends and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        found.append(
            outcome(lambda work=work: distributed.while_others_wait(accelerator, rank == 0, work))
        )
        found.append(str(done.exists()))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def test_ranks_wait_for_work_that_takes_long_fails_or_is_stopped(tmp_path: Path) -> None:
    """Longer than the group's time limit; a fault ends all ranks and is told by one; a signal to a
    rank that only waits stops the one that works.
    """
    on_ranks(2, two_ranks_wait, str(tmp_path))
    works, waits = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert works[::2] == ["None", "DataError: damaged", "Stopped: "]
    assert waits[::2] == ["None", "SystemExit: 2", "Stopped: "]
    assert waits[1] == "True"
