"""A run's folders named after steps, ``checkpoints/step_00010000``: found without reading any.

A folder that is still written or being removed ends in ``.tmp``: one without it is whole.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


def committed(run_dir: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Whole folders of a run, oldest first; ``kind`` is ``CHECKPOINTS`` or ``SNAPSHOTS``."""
    found = (run_dir / kind).glob("step_*")
    return sorted((p for p in found if p.name.removeprefix("step_").isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """The step in a folder's name."""
    return int(path.name.removeprefix("step_"))


def folder_of(run_dir: Path, kind: str, step: int) -> Path:
    """Where what belongs to ``step`` is, or will be."""
    return run_dir / kind / f"step_{step:08d}"
