"""Open any set of images to score, or to score against.

A set is what ``data.sources`` reads: a folder, a zip archive, tars, an array file; or shards with
an index.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from pipeline.data import sources
from pipeline.data.cache import Cache, check_shards
from pipeline.data.locations import INDEX_NAME, is_url
from pipeline.data.pictures import DecodeError, Pixels
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, read_index
from pipeline.data.source import Source
from pipeline.data.squares import Square
from pipeline.evaluation.survey import Asked, StoredSquare, Survey, find, look, require_usable
from pipeline.models.sampling import Images
from pipeline.runtime.console import printable
from pipeline.runtime.errors import DataError
from pipeline.runtime.host import cores
from pipeline.runtime.ranks import on_every_rank, on_rank_zero, run_on_selected_ranks


@dataclass(frozen=True)
class Pictures:
    """A set of images of one shape.

    Args:
        location: as the user named it.
        shape: (H, W, C) of each image.
        fingerprint: hex sha256 of the pixels, or that of the shards.
        labels: int32 (N,), ``NO_LABEL`` where unknown.
        read: (n,) rows -> (n, H, W, C) uint8; raises DataError.
        about: what the set is and what was done to its images, as JSON.
    """

    location: str
    shape: tuple[int, int, int]
    fingerprint: str
    labels: NDArray[np.int32]
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    about: dict[str, Any]

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def label_counts(self) -> dict[int, int]:
        """Number of images of each label, -1 = none."""
        labels, counts = np.unique(self.labels, return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    def labels_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the labels (n,) of some images."""
        return self.labels[rows]

    def images(self, rows: NDArray[np.int64]) -> Images:
        """Return these rows as ``Images``."""
        return lambda start, stop: self.read(rows[start:stop])


def open_pictures(
    location: str, name: str, asked: Asked, accelerator: Accelerator
) -> Pictures | Index:
    """Open a set of images; called on all ranks.

    Args:
        location: folder, file or URL; with an ``index.json`` its shards are read by the index.
        name: of the option that named it, for messages.
        asked: what may be done to the images.
        accelerator: rank 0 looks at each image before any is used.

    Returns:
        the set; an ``Index`` if it has one and its images need not be resized.

    Raises:
        DataError: there are no such images, or none can be read.
        EvaluationError: they are several sets, of several sizes or transparent, and it was not
            asked for that.
        Stopped: a stop signal came.
    """
    folder = Path(location).expanduser()
    if is_url(location) or lexists(folder / INDEX_NAME):
        index = on_every_rank(accelerator, lambda: read_index(location, field=name))
        if asked.size in (0, index.shape[0]):
            return index
    source = on_every_rank(accelerator, lambda: find(location, name, asked))
    colour = asked.background or (255, 255, 255)
    square = StoredSquare(asked.size, asked.channels, colour)
    survey = Survey()

    run_on_selected_ranks(
        accelerator, accelerator.is_main_process, partial(look, source, square, name, survey)
    )
    survey = on_rank_zero(accelerator, lambda: require_usable(survey, source, name, asked))
    return _pictures(source, square, survey, name)


def from_shards(index: Index, verify: str, accelerator: Accelerator) -> Pictures:
    """Return shards with an index as a set to score, after a check of the shards."""
    run_on_selected_ranks(
        accelerator,
        accelerator.is_main_process,
        lambda stopped: check_shards(index, verify, stopped),
    )
    reader = Reader(index, Cache(index, ""))

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.empty((len(rows), *index.shape), np.uint8)
        reader.read(rows, out)
        return out

    return Pictures(
        index.location, index.shape, index.fingerprint, index.labels, read, about(index)
    )


def about(data: Pictures | Index) -> dict[str, Any]:
    """Return what a set of images is, as JSON."""
    if isinstance(data, Pictures):
        return data.about
    return {
        "location": data.location,
        "kind": "shards",
        "images": data.num_samples,
        "size": [data.shape[1], data.shape[0]],
        "sha256": data.fingerprint,
    }


def has_statistics_only(location: str) -> bool:
    """Return whether an npz file holds mu and sigma and no images."""
    if not location.endswith(".npz") or not zipfile.is_zipfile(location):
        return False
    with zipfile.ZipFile(location) as archive:
        names = set(archive.namelist())
    return {"mu.npy", "sigma.npy"} <= names and "arr_0.npy" not in names


def _pictures(source: Source, square: Square, survey: Survey, name: str) -> Pictures:
    (shape,) = survey.shapes
    usable, read_one = np.array(survey.rows), sources.reader(source, square)
    where = f"{name} ({source.location})"

    def pixels_of(row: int) -> Pixels:
        try:
            pixels = read_one(row)[0]
        except DecodeError as error:
            raise DataError(f"{where}: {printable(source.names[row])}: {error}.") from None
        if pixels.shape != shape:
            raise DataError(f"{where}: {printable(source.names[row])} was changed meanwhile.")
        return pixels

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        with ThreadPoolExecutor(cores()) as pool:
            return np.stack(list(pool.map(pixels_of, usable[rows].tolist())))

    what = {
        "location": source.location,
        "kind": source.kind,
        "images": len(usable),
        "size": [shape[1], shape[0]],
        "done": dict(survey.done),
        "unreadable": len(survey.skipped),
        "left_out": source.left_out,
        "sha256": survey.digest,
    }
    return Pictures(source.location, shape, survey.digest, source.labels[usable], read, what)
