"""Look at every file of a source of images before any is scored: which can be used, and as what.

Images are taken as they are stored. What changes their meaning is done only if it was asked for:
another size, a background behind transparency, folders of several sets as one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from pipeline.data import sources
from pipeline.data.colour import to_srgb
from pipeline.data.folders import SPLIT, SeveralParts, common_depth
from pipeline.data.pictures import (
    COMPOSITED,
    DecodeError,
    Pixels,
    flatten,
    on_background,
    require_pixels,
    upright,
)
from pipeline.data.skipped import account_of
from pipeline.data.source import Choice, Source
from pipeline.data.squares import Square
from pipeline.runtime.console import printable, progress, say
from pipeline.runtime.errors import DataError, EvaluationError
from pipeline.runtime.host import cores

CROPPED, RESIZED = "cropped to the central square", "resized"
GRAYED = "converted to gray"
MOST_LISTED = 5
"""Sizes, folders and unreadable files that a message names."""
SETS = {
    *("real", "reals", "fake", "fakes", "gen", "generated", "sample", "samples", "synthetic"),
    *("ref", "refs", "reference", "references", "orig", "original", "originals", "gt", "target"),
    *("targets", "recon", "reconstructions", "a", "b"),
}
"""Names of folders that are sets of images, not classes of one set."""


@dataclass(frozen=True)
class Asked:
    """What may be done to images.

    Args:
        size: make central squares of this side in pixels; 0 = take all as they are stored.
        background: colour behind transparent pixels, (R, G, B); None = refuse them.
        subfolders: take the images of several folders as one set.
        channels: 3, to which gray is repeated; 1 for what compares gray pixels themselves.
    """

    size: int = 0
    background: tuple[int, int, int] | None = None
    subfolders: bool = False
    channels: int = 3


@dataclass(frozen=True)
class StoredSquare(Square):
    """Takes images as they are stored, of any size; as a square only if ``size`` is not 0."""

    def of(self, image: Image.Image) -> tuple[Pixels, list[str]]:
        notes = (
            [GRAYED] if self.channels == 1 and image.mode not in ("1", "L", "LA", "I;16") else []
        )
        if self.size:
            notes += [CROPPED] * (image.width != image.height)
            notes += [RESIZED] * (min(image.size) != self.size)
            pixels, done = super().of(image)
            return pixels, notes + done
        require_pixels(image.size)
        notes += upright(image)
        flat, done, info = on_background(image, self.background)
        flat, converted = to_srgb(flat, info)
        pixels = np.asarray(flatten(flat, self.channels))
        return pixels.reshape(*pixels.shape[:2], self.channels), notes + done + converted


@dataclass
class Survey:
    """What every file of a source is: the rows of those that can be used, and what they are."""

    rows: list[int] = field(default_factory=list)
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    digest: str = ""


def find(location: str, name: str, asked: Asked) -> Source:
    """List the images that ``--images`` or ``--against`` (``name``) names.

    Raises:
        DataError: there are none.
        EvaluationError: they lie in folders that may be several sets.
    """
    try:
        source = sources.find(location, Choice(download=False))
    except SeveralParts as error:
        if not asked.subfolders:
            raise EvaluationError(_several(name, location, error.parts)) from None
        source = sources.find(location, Choice(split="all", download=False))
    except DataError as error:
        raise DataError(str(error).replace("SOURCE (", f"{name} (")) from None
    if source.kind in ("folder", "zip") and not asked.subfolders:
        depth = common_depth(source.names)
        paths = [PurePosixPath(name).parts[depth:] for name in source.names]
        folders = Counter(path[0] if len(path) > 1 else "" for path in paths)
        has_sets = any(f.lower() in SETS or SPLIT.fullmatch(f) for f in folders)
        looks_like_sets = len(folders) == 2 or "" in folders or has_sets
        if len(folders) > 1 and looks_like_sets:
            raise EvaluationError(_several(name, location, folders))
    return source


def _several(name: str, location: str, folders: Counter[str]) -> str:
    listed = [
        f"{printable(folder)}/ ({n})" if folder else f"{n} beside them"
        for folder, n in sorted(folders.items(), reverse=True)
    ]
    return (
        f"{name} ({location}): holds images in {', '.join(listed[:MOST_LISTED])}"
        f"{', ...' if len(listed) > MOST_LISTED else ''}, which may be several sets. Give one of "
        "the folders, or --subfolders to take all of them as one set."
    )


def look(
    source: Source, square: Square, name: str, survey: Survey, stopped: Callable[[], bool]
) -> None:
    """Read every image once, to know which can be used, their shapes and what was done to them."""
    read = sources.reader(source, square)
    total, digest, step = len(source.names), hashlib.sha256(), 256

    def attempt(row: int) -> tuple[tuple[int, ...], list[str], bytes] | str:
        try:
            pixels, notes = read(row)
        except DecodeError as error:
            return str(error)
        return pixels.shape, notes, hashlib.sha256(pixels.tobytes()).digest()

    with ThreadPoolExecutor(cores()) as pool, progress(f"reading {name}", total) as advance:
        for start in range(0, total, step):
            if stopped():
                return
            rows = range(start, min(start + step, total))
            for row, found in zip(rows, pool.map(attempt, rows), strict=True):
                if isinstance(found, str):
                    survey.skipped.append(f"{printable(source.names[row])}: {printable(found)}")
                    continue
                shape, notes, sha256 = found
                height, width, channels = shape
                survey.rows.append(row)
                survey.shapes[height, width, channels] += 1
                survey.done.update(dict.fromkeys(notes, 1))
                digest.update(sha256)
            advance(len(rows))
    survey.digest = hashlib.sha256(
        f"{dict(survey.shapes)}{digest.hexdigest()}".encode()
    ).hexdigest()


def require_usable(survey: Survey, source: Source, name: str, asked: Asked) -> Survey:
    """Say what became of each file; raise if what they are was not asked for."""
    counts = {
        "skipped": len(survey.skipped),
        "left_out": source.left_out,
        "done": dict(survey.done),
    }
    say(f"{name} {source.location}: {account_of(counts, len(source.names))}")
    for line in (*source.said, *survey.skipped[:MOST_LISTED]):
        say(f"  {line}")
    where = f"{name} ({source.location})"
    if not survey.rows:
        raise DataError(f"{where}: none of its {len(source.names)} images can be read.")
    if (clear := survey.done[COMPOSITED]) and asked.background is None:
        raise EvaluationError(
            f"{where}: {clear} of {len(survey.rows)} images have transparent pixels, whose colour "
            "depends on what is behind them. Name it: --background white, or another colour."
        )
    if len(survey.shapes) > 1:
        listed = [f"{w}x{h} ({n})" for (h, w, _), n in survey.shapes.most_common(MOST_LISTED)]
        raise EvaluationError(
            f"{where}: its images have {len(survey.shapes)} different sizes: {', '.join(listed)}"
            f"{', ...' if len(survey.shapes) > MOST_LISTED else ''}. Give images of one size, or "
            "--size N to make central squares of N pixels of all images."
        )
    return survey
