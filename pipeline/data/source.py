"""What a source of images is: a listing in a fixed order, and what to take of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.labels import KEYS
from pipeline.data.pictures import Pixels
from pipeline.runtime.console import printable
from pipeline.runtime.errors import DataError
from pipeline.runtime.host import remedy_of_file

Stored = bytes | Pixels
"""An image of a source: the bytes of a file, or its pixels, uint8 (H, W) or (H, W, C)."""


@dataclass(frozen=True)
class Source:
    """A listing of N images.

    Args:
        kind: ``folder``, ``zip``, ``idx``, ``tars``, ...
        location: the path, or ``fashion-mnist``.
        names: unique names in a fixed order; sorted for folders and zip archives.
        labels: int32 (N,), ``NO_LABEL`` where unknown.
        digest: hex sha256 that changes when an image is added, removed or renamed, or replaced by
            one of another size. Of a large file it has the time of change.
        opener: called once in a worker process; returns a function that reads the image of a row.
        classes: names of the classes, by label; empty if unknown.
        left_out: number of files that are not used, by extension or reason.
        said: lines for the user about files that are used.
    """

    kind: str
    location: str
    names: Sequence[str]
    labels: NDArray[np.int32]
    digest: str
    opener: Callable[[], Callable[[int], Stored]]
    classes: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What to take of a source, as the user said.

    Args:
        split: part of a data set: ``train``, ``test``, a folder, or ``all``; None: not said.
        idx: folder of the IDX files of fashion-mnist; None = the usual places.
        download: whether fashion-mnist may be downloaded.
        image_field: which of several images of a sample to use; None: all.
        label_field: where the label is; None: the usual names.
    """

    split: str | None = None
    idx: str | None = None
    download: bool = True
    image_field: str | None = None
    label_field: str | None = None


def label_column(
    names: Sequence[str], choice: Choice, location: Path, usual: Sequence[str] = KEYS
) -> str | None:
    """Return the column with the labels: the one that the user chose, else the first usual name.

    Args:
        names: of all columns.
        choice: of the user.
        location: for the message.
        usual: names to look for.

    Raises:
        DataError: there is no column of the name that the user chose.
    """
    if choice.label_field and choice.label_field not in names:
        raise DataError(
            f"--label-field ({choice.label_field}): {location} has no such column; it has "
            f"{printable(', '.join(names))[:500]}."
        )
    wanted = [choice.label_field] if choice.label_field else usual
    return next((name for name in wanted if name in names), None)


def gone(source: Source, row: int, why: str | OSError) -> DataError:
    """Return the message for a source that cannot be read, which says nothing about its images."""
    if isinstance(why, OSError):
        why = f"{why.strerror or why}: {remedy_of_file(why)}"
    return DataError(
        f"{printable(source.names[row])}: cannot be read from {source.location}: {why}. When it "
        "can be read again, the same command continues."
    )


def version_of(path: Path) -> str:
    """Return a text that changes when a large file is edited: its size and time of change."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def package(module: str, name: str, path: Path) -> Any:
    """Return an optional module that reads a kind of source.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"SOURCE ({path}): needs the package {name}. Install it: pip install {name}"
        ) from None
