"""Finish what ``train.watch=heal`` began: remove the checkpoints after the one to go on from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pipeline.runs import checkpoint
from pipeline.runs.alarms import Alarm, healings, of_state, read_alarms
from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.errors import CheckpointError
from pipeline.runtime.files import write_atomic


def finish_healing(run_dir: Path) -> list[Alarm]:
    """Remove what a healing leaves behind, also one that was killed; return all healings.

    These are the checkpoints after its ``back_to`` that know less healings. The file ``progress``
    is set back before the first of them goes.

    Raises:
        OSError: a file cannot be read or written.
    """
    done = healings(read_alarms(run_dir))
    if not done:
        return []
    last = done[-1].back_to
    later = [path for path in committed(run_dir) if step_of(path) > last]
    stale = [path for path in later if len(healings_of(path)) < len(done)]
    if stale:
        write_atomic(run_dir / "progress", str(last).encode())
    for path in reversed(stale):
        checkpoint.remove(path)
    return done


def healings_of(path: Path) -> list[Alarm]:
    """Return the healings that a checkpoint comes after; of a damaged one as many as possible."""
    with suppress(CheckpointError):
        return of_state(checkpoint.read_state(path))
    return []
