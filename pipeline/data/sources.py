"""List the images of a source, and read them as squares.

A ``Source`` is a listing in a fixed order, made without decoding an image. ``reader`` reads the
images in a worker process and makes squares of them, for every kind of source.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.codecs import NPY, npy_image
from pipeline.data.folders import Listing, choose_split, labels_of, list_folder, list_zip
from pipeline.data.idx_files import fashion_mnist, idx_file, read_idx
from pipeline.data.pictures import (
    SUFFIXES,
    DecodeError,
    Pixels,
    open_pillow,
    reason,
    require_intact,
)
from pipeline.data.skipped import listed_types
from pipeline.data.source_files import open_zip, read_file, read_member, read_span
from pipeline.data.squares import Square
from pipeline.data.tar_scan import lines, number_classes, scan
from pipeline.runtime.console import printable
from pipeline.runtime.documents import DamagedFile, open_regular
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import exists
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
            one of another size.
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


def find(name: str, choice: Choice) -> Source:
    """List the source that a user names: ``fashion-mnist``, a folder, a zip archive, ...

    Raises:
        DataError: the source does not exist, holds no images, or is damaged.
        OSError: it cannot be read, which is no damage.
    """
    idx_split = "test" if choice.split == "test" else "train"
    if name == "fashion-mnist":
        return _idx(fashion_mnist(idx_split, choice.idx, choice.download), idx_split, name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".tar":
            return _tars(path.parent, [path], choice)
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                return _zip(path, choice)
    if not path.is_dir():
        found = "is not a zip archive" if path.exists() else "no such folder or file"
        raise DataError(
            f"SOURCE ({name}): {found}. Give a folder of images, of IDX files or of tars, a zip "
            "archive of images, or the word fashion-mnist."
        )
    if idx_file(path, idx_split, "images"):
        return _idx(path, idx_split, name)
    tars = sorted(path.glob("*.tar"))
    return _tars(path, tars, choice) if tars else _folder(path, choice)


# -- the kinds ----------------------------------------------------------------------------------


def _folder(root: Path, choice: Choice) -> Source:
    def opener() -> Callable[[int], Stored]:
        return lambda row: read_file(root / source.names[row])

    source = _listed("folder", root, list_folder(root), opener, choice)
    return source


def _zip(path: Path, choice: Choice) -> Source:
    found, places = list_zip(path)
    crcs = dict(zip(found.names, zip(places, found.sizes, strict=True), strict=True))

    def opener() -> Callable[[int], Stored]:
        archive = cache(lambda: open_zip(path))  # opened when the first image is read

        def read(row: int) -> bytes:
            entries = archive().infolist()
            (place, name), crc = crcs[source.names[row]]
            here = entries[place : place + 1]
            if [(entry.filename, entry.CRC) for entry in here] != [(name, crc)]:
                raise DamagedFile("another image stands in its place")
            return read_member(archive(), here[0])

        return read

    source = _listed("zip", path, found, opener, choice)
    return source


def _listed(
    kind: str,
    path: Path,
    found: Listing,
    opener: Callable[[], Callable[[int], Stored]],
    choice: Choice,
) -> Source:
    if not found.names:
        types = listed_types(found.left_out) or "no files"
        raise DataError(
            f"SOURCE ({path}): holds no images (found: {types}). Known types are "
            f"{' '.join(SUFFIXES)}."
        )
    found = choose_split(found, choice.split, str(path))
    labels, classes = labels_of(found, str(path))
    return Source(
        kind=kind,
        location=str(path),
        names=found.names,
        labels=labels,
        digest=found.digest,
        opener=opener,
        classes=classes,
        left_out=dict(found.left_out),
        said=found.said,
    )


def _tars(folder: Path, paths: list[Path], choice: Choice) -> Source:
    scans, classes, said = number_classes(
        [scan(path, choice.image_field, choice.label_field) for path in paths]
    )
    spans: list[tuple[str, int, int]] = []
    names, left_out, digest = list[str](), Counter[str](), hashlib.sha256()
    for path, one in zip(paths, scans, strict=True):
        digest.update(f"{one.shard.nsamples} {one.shard.sha256}\n".encode())
        spans += [(path.name, offset, length) for offset, length, _ in one.table.tolist()]
        seen = Counter[str]()
        for name in one.contents.names:
            seen[name] += 1
            names.append(f"{path.name}/{name}" + (f" ({seen[name]})" if seen[name] > 1 else ""))
        left_out.update(one.contents.left_out)
    if not spans:
        raise DataError(f"SOURCE ({folder}): its {len(paths)} tars hold no images.")
    labels = np.concatenate([one.table["label"] for one in scans]).astype(np.int32)

    def opener() -> Callable[[int], Stored]:
        def read(row: int) -> bytes:
            name, offset, length = spans[row]
            return read_span(folder / name, offset, length)

        return read

    return Source(
        kind="tars",
        location=str(folder if len(paths) != 1 else paths[0]),
        names=names,
        labels=labels,
        digest=digest.hexdigest(),
        opener=opener,
        classes=classes,
        left_out=dict(left_out),
        said=lines([one.contents for one in scans]) + said,
    )


def _idx(folder: Path, split: str, location: str) -> Source:
    pixels = read_idx(folder, split, "images", 3)
    labels = read_idx(folder, split, "labels", 1)
    if len(pixels) != len(labels) or not pixels.size:
        raise DataError(
            f"{folder}: the {split} split has {len(pixels)} images and {len(labels)} labels. There "
            "must be as many labels as images, and at least one. Get both files again."
        )
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    names = [f"{split}[{i}]" for i in range(len(pixels))]
    labelled = labels.astype(np.int32)
    return Source("idx", location, names, labelled, digest, lambda: lambda row: pixels[row])


# -- one image ----------------------------------------------------------------------------------


def reader(source: Source, square: Square) -> Callable[[int], tuple[Pixels, list[str]]]:
    """Return a function that reads the image of a row and returns (square, what was done to it).

    Each process makes its own. The function raises ``DecodeError`` if one image cannot be read, and
    ``DataError`` if the source cannot: if a file system goes away, its images are not damaged.
    """
    location = Path(source.location).expanduser()
    read = source.opener()

    def pixels_of(row: int) -> tuple[Pixels, list[str]]:
        try:
            stored = read(row)
            if isinstance(stored, np.ndarray):
                return square.of(Image.fromarray(stored))
            if stored[:6] == NPY:
                return square.of(npy_image(memoryview(stored)))
            with open_pillow(memoryview(stored)) as image:
                said = require_intact(memoryview(stored), image)
                pixels, done = square.of(image)
                return pixels, said + done
        except DecodeError:
            if source.kind != "idx" and not exists(location):  # the file system went away
                raise _gone(source, row, "the source is gone") from None
            raise
        except DamagedFile as error:
            raise _gone(source, row, f"the archive was changed: {reason(error)}") from None
        except OSError as error:
            raise _gone(
                source, row, f"{error.strerror or error}: {remedy_of_file(error)}"
            ) from None

    return pixels_of


def _gone(source: Source, row: int, why: str) -> DataError:
    """Return the message for a source that cannot be read, which says nothing about its images."""
    return DataError(
        f"{printable(source.names[row])}: cannot be read from {source.location}: {why}. When it "
        "can be read again, the same command continues."
    )
