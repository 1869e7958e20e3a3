"""List the images of a folder, zip archive, IDX file or set of tars, and read them as squares.

A ``Source`` is a listing in a fixed order, made without decoding an image. ``reader`` reads the
images in a worker process; ``to_square`` crops and resizes them, for every kind of source.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.codecs import (
    DecodeError,
    Pixels,
    flatten,
    npy_image,
    open_pillow,
    reason,
    require_pixels,
)
from pipeline.data.idx_files import fashion_mnist, idx_file, read_idx
from pipeline.data.shards import NO_LABEL, scan
from pipeline.data.source_files import open_zip, read_file, read_member, read_span, zip_images
from pipeline.runtime.console import printable
from pipeline.runtime.documents import NOT_DAMAGE, DamagedFile, open_regular
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import exists
from pipeline.runtime.host import remedy_of_file

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)
MOST_FOLDERS = 1_000_000
"""Folders that are listed; links between a dozen folders make more paths than this."""
MOST_TYPES = 10


@dataclass(frozen=True)
class Source:
    """A listing of N images.

    Args:
        kind: ``folder``, ``zip``, ``idx`` or ``tars``.
        location: the path, or ``fashion-mnist``.
        names: unique names in a fixed order; sorted for folders and zip archives.
        labels: int32 (N,), ``NO_LABEL`` where unknown.
        digest: hex sha256 that changes when an image is added, removed or renamed, or replaced by
            one of another size.
        classes: names of the classes, by label; empty if unknown.
        ignored: number of files that are no images, by extension.
        pixels: all images, uint8 (N, H, W), of an IDX file; None for other kinds.
        spans: (tar, offset, length, extension) of each image, for tars.
    """

    kind: str
    location: str
    names: Sequence[str]
    labels: NDArray[np.int32]
    digest: str
    classes: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    pixels: Pixels | None = None
    spans: Sequence[tuple[str, int, int, str]] = ()


def find(name: str, *, split: str, idx: str | None, download: bool) -> Source:
    """List the source that a user names: ``fashion-mnist``, a folder or a zip archive.

    Args:
        name: the source.
        split: ``train`` or ``test``; which IDX files to read.
        idx: folder of the IDX files of fashion-mnist; None = the usual places.
        download: whether fashion-mnist may be downloaded.

    Raises:
        DataError: the source does not exist, holds no images, or is damaged.
        OSError: it cannot be read, which is no damage.
    """
    if name == "fashion-mnist":
        return _idx(fashion_mnist(split, idx, download), split, name)
    path = Path(name).expanduser()
    if path.is_file():
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                return _zip(path)
    if not path.is_dir():
        found = "is not a zip archive" if path.exists() else "no such folder or file"
        raise DataError(
            f"SOURCE ({name}): {found}. Give a folder of images, of IDX files or of tars, a zip "
            "archive of images, or the word fashion-mnist."
        )
    if idx_file(path, split, "images"):
        return _idx(path, split, name)
    tars = sorted(path.glob("*.tar"))
    return _tars(path, tars) if tars else _folder(path)


# -- the kinds ----------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
    names, sizes, ignored = [], [], Counter[str]()
    # (folder, its name in the listing, the folders above it)
    left: list[tuple[Path, str, frozenset[tuple[int, int]]]] = [(root, "", frozenset())]
    visited = 0
    while left:
        folder, prefix, above = left.pop()
        status = folder.stat()
        if (inode := (status.st_dev, status.st_ino)) in above:
            continue  # a link to a folder that contains the link
        if (visited := visited + 1) > MOST_FOLDERS:
            raise DataError(
                f"SOURCE ({root}): has more than {MOST_FOLDERS} folders; links may lead from one "
                f"to the next, e.g. {printable(prefix[-200:])}. Remove the links."
            )
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                size = _size_of(entry)
                if size is None:
                    left.append((folder / entry.name, f"{prefix}{entry.name}/", above | {inode}))
                elif (suffix := PurePosixPath(entry.name).suffix.lower()) in SUFFIXES:
                    names.append(f"{prefix}{entry.name}")
                    sizes.append(size)
                else:
                    ignored[suffix or "no extension"] += 1
    return _listed("folder", root, names, sizes, ignored)


def _size_of(entry: os.DirEntry[str]) -> int | None:
    """Return the size of a file, -1 for what cannot be one, like a dangling link; None: a folder.

    Raises:
        OSError: it cannot be looked at, which says nothing about it.
    """
    try:
        if entry.is_dir():
            return None
        return entry.stat().st_size if entry.is_file() else -1
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise
        return -1  # a link to itself


def _zip(path: Path) -> Source:
    names, sizes, ignored = [], [], Counter[str]()
    try:
        members = zip_images(path)
    except DamagedFile as error:
        raise DataError(f"SOURCE ({path}): {error}.") from None
    for name, entry in members.items():
        if entry.flag_bits & 1:
            raise DataError(f"SOURCE ({path}): encrypted; unpack it into a folder first.")
        if (suffix := PurePosixPath(name).suffix.lower()) in SUFFIXES:
            names.append(name)
            sizes.append(entry.CRC)
        else:
            ignored[suffix or "no extension"] += 1
    return _listed("zip", path, names, sizes, ignored)


def _listed(
    kind: str, path: Path, names: list[str], sizes: list[int], ignored: Counter[str]
) -> Source:
    """Sort the names, and label them by their top folders as torchvision's ImageFolder does."""
    if not names:
        types = listed_types(ignored) or "no files"
        raise DataError(
            f"SOURCE ({path}): holds no images (found: {types}). Known types are "
            f"{' '.join(SUFFIXES)}."
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    parts = [PurePosixPath(name).parts for name in names]
    # If all of an archive is in one folder, the name of this folder is no class.
    if kind == "zip" and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    classes = sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number.get(p[0], NO_LABEL) for p in parts], np.int32)
    digest = hashlib.sha256()
    for name, i in zip(names, order, strict=True):
        digest.update(f"{name}\0{sizes[i]}\0".encode("utf-8", "surrogateescape"))
    return Source(kind, str(path), names, labels, digest.hexdigest(), tuple(classes), dict(ignored))


def listed_types(ignored: Mapping[str, int]) -> str:
    """Return the most frequent extensions of files that are no images, with their numbers."""
    found = Counter(ignored).most_common(MOST_TYPES + 1)
    types = [f"{n} {printable(suffix[:20])}" for suffix, n in found[:MOST_TYPES]]
    return ", ".join([*types, *(["..."] if len(found) > MOST_TYPES else [])])


def _tars(folder: Path, paths: list[Path]) -> Source:
    spans: list[tuple[str, int, int, str]] = []
    names, labels, digest = [], [], hashlib.sha256()
    for path in paths:
        shard, rows, extension = scan(path)
        digest.update(f"{shard.nsamples} {shard.sha256}\n".encode())
        for row, (offset, length, label) in enumerate(rows.tolist()):
            spans.append((path.name, offset, length, extension))
            names.append(f"{path.name}#{row}")
            labels.append(label)
    if not spans:
        raise DataError(f"SOURCE ({folder}): its {len(paths)} tars hold no images.")
    numbers = np.array(labels, np.int32)
    return Source("tars", str(folder), names, numbers, digest.hexdigest(), spans=spans)


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
    return Source("idx", location, names, labels.astype(np.int32), digest, pixels=pixels)


# -- one image ----------------------------------------------------------------------------------


def reader(
    source: Source, size: int, channels: int, background: tuple[int, int, int]
) -> Callable[[int], tuple[Pixels, bool]]:
    """Return a function that reads the image of a row and returns ``to_square`` of it.

    Each process makes its own. The function raises ``DecodeError`` if one image cannot be read, and
    ``DataError`` if the source cannot: if a file system goes away, its images are not damaged.
    """
    if (pixels := source.pixels) is not None:
        return lambda row: to_square(Image.fromarray(pixels[row]), size, channels, background)
    folder = Path(source.location).expanduser()
    archive = cache(lambda: open_zip(folder))  # opened once, when the first image is read

    def read(row: int) -> bytes:
        if source.kind == "zip":
            return read_member(archive(), source.names[row])
        if not source.spans:
            return read_file(folder / source.names[row])
        name, offset, length, _ = source.spans[row]
        return read_span(folder / name, offset, length)

    def pixels_of(row: int) -> tuple[Pixels, bool]:
        try:
            raw = memoryview(read(row))
            if source.spans and source.spans[row][3] == "npy":
                return to_square(npy_image(raw), size, channels, background)
            with open_pillow(raw) as image:
                return to_square(image, size, channels, background)
        except DecodeError:
            if not exists(folder):  # the file system went away
                raise _gone(source, row, "the source is gone") from None
            raise
        except (DamagedFile, KeyError) as error:
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


def to_square(
    image: Image.Image, size: int, channels: int, background: tuple[int, int, int]
) -> tuple[Pixels, bool]:
    """Return ((size, size, channels) uint8 pixels, whether they were enlarged) of a Pillow image.

    The image is turned upright by EXIF, composited on the background, cropped to the central square
    and resized with an antialiased Lanczos filter. Of an animation the first frame is used.

    Raises:
        DecodeError: it has more than ``MOST_PIXELS`` pixels, or none.
    """
    require_pixels(image.size)
    image.load()
    with contextlib.suppress(Exception):  # damaged metadata: viewers show the image as stored
        ImageOps.exif_transpose(image, in_place=True)
    # Composite before the filter, which would mix in the colours of transparent pixels.
    image = flatten(image, channels, background)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels), side < size
