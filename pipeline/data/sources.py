"""Find out what kind of source a user names, list its images, and read them as squares."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.arrays import array_file, hdf5_file
from pipeline.data.cifar import CIFAR_FILES, LARGEST_BATCH, cifar, cifar_folder
from pipeline.data.codecs import NPY, npy_image
from pipeline.data.compressed import extracted, is_compressed, unpacked
from pipeline.data.folders import Listing, choose_split, labels_of, list_folder, list_zip
from pipeline.data.idx_files import fashion_mnist, idx_file, idx_folder, read_idx
from pipeline.data.labels import NO_LABEL
from pipeline.data.lmdb_store import FILE as LMDB_FILE
from pipeline.data.lmdb_store import lmdb_folder
from pipeline.data.mds import mds_folder
from pipeline.data.pictures import (
    SUFFIXES,
    DecodeError,
    Pixels,
    open_pillow,
    reason,
    require_intact,
)
from pipeline.data.skipped import listed_types
from pipeline.data.source import Choice, Source, Stored, gone
from pipeline.data.source_files import open_zip, read_file, read_member, read_span
from pipeline.data.squares import Square
from pipeline.data.tables import HUB, from_hub, parquet_files
from pipeline.data.tar_scan import lines, number_classes, scan
from pipeline.runtime.documents import DamagedFile, open_regular, read_bytes
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import exists

GIVE = (
    "Give a folder of images, of IDX files, of tars, of Parquet files or of MDS shards; a zip "
    "archive, tar, .npy, .npz, .h5 or .parquet file; hf://datasets/OWNER/NAME; or the word "
    "fashion-mnist."
)
PACKED = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst")
IN_MEMORY = ("idx", "cifar", "npz")
"""Kinds that are read when they are listed."""


def find(name: str, choice: Choice) -> Source:
    """List the source that a user names: ``fashion-mnist``, a folder, a zip archive, ...

    Raises:
        DataError: the source does not exist, holds no images, or is damaged.
        OSError: it cannot be read, which is no damage; it has the name of a file.
    """
    try:
        return _find(name, choice)
    except OSError as error:
        error.filename = error.filename or name
        raise


def _find(name: str, choice: Choice) -> Source:
    if name == "fashion-mnist":
        split = "test" if choice.split == "test" else "train"
        return _idx(fashion_mnist(split, choice.idx, choice.download), "", choice, name)
    path = from_hub(name) if name.startswith(HUB) else Path(name).expanduser()
    if path.is_file():
        return _file(path, choice)
    if not path.is_dir():
        found = "is neither a file nor a folder" if path.exists() else "no such folder or file"
        raise DataError(f"SOURCE ({name}): {found}. {GIVE}")
    if (path / LMDB_FILE).is_file():
        return lmdb_folder(path)
    for place in (path, path / (choice.split or "train")):
        if mds := mds_folder(place, choice):
            return mds
    if batches := cifar_folder(path):
        return cifar(batches, choice, read_bytes)
    if idx := idx_folder(path, choice.image_field):
        return _idx(*idx, choice, name)
    tars = sorted(path.glob("[!.]*.tar"))
    return _tars(path, tars, choice) if tars else _folder(path, choice)


def _file(path: Path, choice: Choice) -> Source:
    """List the images of a file, by its ending or its first bytes."""
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return array_file(path, choice)
    if suffix in (".h5", ".hdf5"):
        return hdf5_file(path, choice)
    if suffix == ".parquet":
        return parquet_files(path, [path], choice)
    if is_compressed(path):
        tar = unpacked(path)
        if folder := extracted(tar, CIFAR_FILES, LARGEST_BATCH):
            return cifar(folder, choice, read_bytes)
        return dataclasses.replace(_tars(tar.parent, [tar], choice), location=str(path))
    with open_regular(path) as file:
        if suffix == ".zip" or (suffix != ".tar" and zipfile.is_zipfile(file)):
            return _zip(path, choice)
        is_tar = suffix == ".tar" or (file.seek(257) and file.read(5) == b"ustar")
    if is_tar:
        return _tars(path.parent, [path], choice)
    if suffix in SUFFIXES:
        raise DataError(f"SOURCE ({path}): is one image. Give the folder of all images.")
    raise DataError(f"SOURCE ({path}): is none of the files that hold images. {GIVE}")


# -- the kinds ----------------------------------------------------------------------------------


def _folder(root: Path, choice: Choice) -> Source:
    found = list_folder(root)
    if not found.names:
        tables, tars = ([root / one for one in found.sets[end]] for end in (".parquet", ".tar"))
        if tables:
            return parquet_files(root, tables, choice)
        if tars:
            return _tars(root, tars, choice)

    def opener() -> Callable[[int], Stored]:
        return lambda row: read_file(root / source.names[row])

    source = _listed("folder", root, found, opener, choice)
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
        if packed := [suffix for suffix in found.left_out if suffix in PACKED]:
            raise DataError(
                f"SOURCE ({path}): holds no images, but archives ({types}). Give one of its "
                f"{packed[0]} files, or unpack them."
            )
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
        inside = path.relative_to(folder).as_posix()
        digest.update(f"{one.shard.nsamples} {one.shard.sha256}\n".encode())
        spans += [(inside, offset, length) for offset, length, _ in one.table.tolist()]
        seen = Counter[str]()
        for name in one.contents.names:
            seen[name] += 1
            names.append(f"{inside}/{name}" + (f" ({seen[name]})" if seen[name] > 1 else ""))
        left_out.update(one.contents.left_out)
    location = str(folder if len(paths) != 1 else paths[0])
    if not spans:
        raise DataError(f"SOURCE ({location}): its {len(paths)} tars hold no images.")
    labels = np.concatenate([one.table["label"] for one in scans]).astype(np.int32)

    def opener() -> Callable[[int], Stored]:
        def read(row: int) -> bytes:
            name, offset, length = spans[row]
            return read_span(folder / name, offset, length)

        return read

    return Source(
        kind="tars",
        location=location,
        names=names,
        labels=labels,
        digest=digest.hexdigest(),
        opener=opener,
        classes=classes,
        left_out=dict(left_out),
        said=lines([one.contents for one in scans]) + said,
    )


def _idx(folder: Path, prefix: str, choice: Choice, location: str) -> Source:
    split = choice.split or "train"
    if split not in ("train", "test"):
        raise DataError(f"--split ({split}): must be train or test for IDX files.")
    pixels = read_idx(folder, split, "images", 3, prefix)
    said = []
    if prefix.startswith("emnist-"):
        pixels = pixels.transpose(0, 2, 1)
        said.append("EMNIST stores its images lying on their sides: turned upright")
    labels = np.full(len(pixels), NO_LABEL, np.int32)
    if idx_file(folder, split, "labels", prefix):
        labels = read_idx(folder, split, "labels", 1, prefix).astype(np.int32)
    if len(pixels) != len(labels) or not pixels.size:
        raise DataError(
            f"{folder}: the {split} split has {len(pixels)} images and {len(labels)} labels. There "
            "must be as many labels as images, and at least one. Get both files again."
        )
    digest = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    return Source(
        kind="idx",
        location=location,
        names=[f"{split}[{i}]" for i in range(len(pixels))],
        labels=labels,
        digest=digest,
        opener=lambda: lambda row: np.ascontiguousarray(pixels[row]),
        said=said,
    )


# -- one image ----------------------------------------------------------------------------------


def reader(
    source: Source, square: Square, seen: Callable[[Stored], None] = lambda stored: None
) -> Callable[[int], tuple[Pixels, list[str]]]:
    """Return a function that reads the image of a row and returns (square, what was done to it).

    Each process makes its own. ``seen`` is called with what the source has of each image, b"" of
    one that cannot be read. The function raises ``DecodeError`` if one image cannot be read, and
    ``DataError`` if the source cannot: if a file system goes away, its images are not damaged.
    """
    location = Path(source.location).expanduser()
    read = source.opener()

    def pixels_of(row: int) -> tuple[Pixels, list[str]]:
        try:
            try:
                stored = read(row)
            except DecodeError:
                seen(b"")
                raise
            seen(stored)
            if isinstance(stored, np.ndarray):
                return square.of(Image.fromarray(stored))
            if stored[:6] == NPY:
                return square.of(npy_image(memoryview(stored)))
            with open_pillow(memoryview(stored)) as image:
                said = require_intact(memoryview(stored), image)
                pixels, done = square.of(image)
                return pixels, said + done
        except DecodeError:
            if source.kind not in IN_MEMORY and not exists(location):  # the file system went away
                raise gone(source, row, "the source is gone") from None
            raise
        except DamagedFile as error:
            raise gone(source, row, f"the archive was changed: {reason(error)}") from None
        except OSError as error:
            raise gone(source, row, error) from None

    return pixels_of
