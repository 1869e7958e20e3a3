"""List the checkpoints and snapshots of a run: folders ``step_00001000``, one for each step."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


def committed(run_dir: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Return the complete folders of a run by step; ``kind`` is CHECKPOINTS or SNAPSHOTS.

    A folder is complete once it has its name ``step_N``. A link, a file, ``step_N.tmp`` (being
    written) and ``step_N.damaged`` (set aside) are none. ``checkpoint.read`` and ``load_snapshot``
    verify the content.
    """
    folders = (run_dir / kind).glob("step_*")
    return sorted(
        (p for p in folders if _number(p).isdecimal() and p.is_dir() and not p.is_symlink()),
        key=step_of,
    )


def step_of(path: Path) -> int:
    """Return the step in a folder's name."""
    return int(_number(path))


def folder_of(run_dir: Path, kind: str, step: int) -> Path:
    """Return the folder of a step's checkpoint or snapshot, which need not exist."""
    return run_dir / kind / f"step_{step:08d}"


def steps_set_aside(run_dir: Path) -> list[int]:
    """Return the steps of the damaged checkpoints that were set aside."""
    found = (run_dir / CHECKPOINTS).glob("step_*.damaged*")
    numbers = [_number(path).partition(".")[0] for path in found]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _number(path: Path) -> str:
    return path.name.removeprefix("step_")
