"""Shrink the sample grids of runs until a page can hold them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from pipeline.reports.curves import spaced
from pipeline.runtime.documents import DamagedFile, read_bytes

PAGE_BYTES = 2_000_000
"""Characters that the grids of all runs take together."""
LARGEST_FILE = 64 << 20
SIZES = ((24, 512), (16, 384), (12, 320), (8, 256), (6, 192), (4, 160), (2, 128), (1, 96))
"""Grids of a run and their longer side in pixels, from most to least bytes."""


def thumbnails(run_dir: Path, characters: int) -> dict[int, str]:
    """Return ``{step: data URI}`` of evenly spaced sample grids, the last one among them.

    Files that are no pictures are left out.

    Args:
        run_dir: the run's folder.
        characters: what they may take together; as many and as large grids as fit.
    """
    files = {}
    for path in (run_dir / "samples").glob("step_*.png"):
        if (number := path.stem.removeprefix("step_")).isdecimal():
            files[int(number)] = path
    steps, found = sorted(files), dict[int, str]()
    for count, side in SIZES:
        chosen = [steps[k] for k in spaced(len(steps), count)]
        if not chosen or len(_shrunk(files[chosen[-1]], side)) * len(chosen) > 1.3 * characters:
            continue  # a guess, which saves most of the work
        found = {step: uri for step in chosen if (uri := _shrunk(files[step], side))}
        if sum(map(len, found.values())) <= characters:
            return found
    return {step: uri for step in steps[-1:] if (uri := _shrunk(files[step], SIZES[-1][1]))}


def _shrunk(path: Path, side: int) -> str:
    """Return a picture as the data URI of a JPEG, no side longer than ``side``; "" if damaged."""
    try:
        with Image.open(io.BytesIO(read_bytes(path, LARGEST_FILE)), formats=["PNG"]) as picture:
            small = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError, DamagedFile, Image.DecompressionBombError):
        return ""
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "jpeg", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
