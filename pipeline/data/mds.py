"""List the images of MDS shards, the format of mosaicml-streaming, without its package.

Its reader follows the paths that ``index.json`` names and unpickles some columns; this one does
neither. A shard is uint32 N, uint32 (N + 1,) offsets of the samples, a JSON text, and the samples.
A sample is the uint32 sizes of its columns of variable size, then the columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.labels import Label, numbered, parse
from pipeline.data.pictures import DecodeError, Pixels
from pipeline.data.source import Choice, Source, Stored, label_column, version_of
from pipeline.data.source_files import read_span
from pipeline.runtime.console import printable
from pipeline.runtime.documents import DamagedFile, open_regular, parse_json, read_bytes
from pipeline.runtime.errors import DataError

INDEX = "index.json"
LARGEST_INDEX = 1 << 30
SCALARS = {"int": "<i8"} | {f"int{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)}
SCALARS |= {f"uint{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)}
TEXTS = ("str", "str_int", "bytes")
STORED = ("jpeg", "png", "bytes")
MODES = {b"L": (), b"RGB": (3,), b"RGBA": (4,)}
UINT8 = 8
"""The number of this type in an array whose type is not fixed."""
LONGEST_LABEL = 4096
"""Bytes of a label that are read."""
AGAIN = "Get the data set again."


@dataclass(frozen=True)
class Columns:
    """The columns of a set: names, encodings, and bytes of those of fixed size, else None."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]

    def span(self, sample: bytes, column: int) -> slice:
        """Return where a column lies in a sample, of which at least the sizes are given.

        Raises:
            DecodeError: the sizes are cut off.
        """
        count = self.sizes.count(None)
        if len(sample) < 4 * count:
            raise DecodeError("is cut short")
        given = iter(np.frombuffer(sample, "<u4", count).tolist())
        sizes = [next(given) if size is None else size for size in self.sizes]
        start = 4 * count + sum(sizes[:column])
        return slice(start, start + sizes[column])


def mds_folder(folder: Path, choice: Choice) -> Source | None:
    """List the samples of a folder with the ``index.json`` of MDS shards; None: it has none.

    Raises:
        DataError: a shard is missing, damaged or compressed, or has no column of images.
    """
    try:
        document = parse_json(read_bytes(folder / INDEX, LARGEST_INDEX), folder / INDEX)
    except (DamagedFile, FileNotFoundError):
        return None
    entries = document.get("shards")
    if not isinstance(entries, list) or not any(_format(entry) == "mds" for entry in entries):
        return None
    try:
        columns, files = _read_index(entries)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"SOURCE ({folder}): {INDEX} is none of version 2 of MDS, or is damaged. {AGAIN}"
        ) from None
    image = _image_column(columns, choice, folder)
    label = label_column(columns.names, choice, folder)
    shards = [(folder / name, _offsets(folder / name, count)) for name, count in files]
    digest = hashlib.sha256(repr((columns, image, label)).encode())
    names, labels, bad = list[str](), list[Label](), 0
    for path, offsets in shards:
        digest.update(f"{path.name}\0{version_of(path)}\0{len(offsets)}\0".encode())
        names += [f"{path.name}[{row}]" for row in range(len(offsets) - 1)]
        if label is not None:
            found, unused = _labels(path, offsets, columns, columns.names.index(label))
            labels += found
            bad += unused
    if not names:
        raise DataError(f"SOURCE ({folder}): its {len(shards)} MDS shards hold no samples.")
    numbers, classes, unused = numbered(labels or [None] * len(names))
    bad += unused
    first = np.cumsum([0, *(len(offsets) - 1 for _, offsets in shards)])

    def read(row: int) -> Stored:
        shard = int(np.searchsorted(first, row, side="right")) - 1
        path, offsets = shards[shard]
        start, end = offsets[row - first[shard] :][:2].tolist()
        sample = read_span(path, start, end - start)
        span = columns.span(sample, image)
        if len(sample) != end - start or span.stop > len(sample):
            raise DecodeError("is cut short")
        return _image(columns.encodings[image], sample[span])

    return Source(
        kind="mds",
        location=str(folder),
        names=names,
        labels=numbers,
        digest=digest.hexdigest(),
        opener=lambda: read,
        classes=classes,
        said=[f"{bad} labels are no number or name: not used"] if bad else [],
    )


def _format(entry: object) -> object:
    return entry.get("format") if isinstance(entry, dict) else None


def _read_index(entries: list[dict[str, Any]]) -> tuple[Columns, list[tuple[str, int]]]:
    """Return the columns of all shards, and the (name, number of samples) of each.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a field is missing or of another kind.
    """
    found, files = set(), []
    for entry in entries:
        name, count = entry["raw_data"]["basename"], entry["samples"]
        if Path(name).name != name or not isinstance(count, int) or entry["version"] != 2:
            raise ValueError(name)
        names, encodings, sizes = (
            tuple(entry[f"column_{what}"]) for what in ("names", "encodings", "sizes")
        )
        if not len(names) == len(encodings) == len(sizes) or entry["format"] != "mds":
            raise ValueError(name)
        if not all(size is None or (type(size) is int and 0 < size < 2**32) for size in sizes):
            raise ValueError(sizes)
        found.add(Columns(tuple(map(str, names)), tuple(map(str, encodings)), sizes))
        files.append((name, count))
    (columns,) = found  # a ValueError unless all shards have the same ones
    return columns, files


def _offsets(path: Path, count: int) -> NDArray[np.uint32]:
    """Return where each sample of a shard begins, and where the last one ends.

    Raises:
        DataError: the shard is not there, or is not the one that the index describes.
    """
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            head = file.read(4 * count + 8) if 4 * count + 8 <= size else b""
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file, though {INDEX} names it. If the shards are compressed, unpack "
            "them beside it. Else get the data set again."
        ) from None
    except DamagedFile as error:
        raise DataError(f"{error}. {AGAIN}") from None
    table = np.frombuffer(head, "<u4")
    offsets = table[1:]
    whole = len(offsets) == count + 1 and table[0] == count and offsets[-1] == size
    if not whole or offsets[0] < len(head) or np.any(offsets[1:] < offsets[:-1]):
        raise DataError(f"{path}: is damaged: it is not as {INDEX} says. {AGAIN}")
    return offsets


def _image_column(columns: Columns, choice: Choice, folder: Path) -> int:
    kinds = [encoding.partition(":")[0] for encoding in columns.encodings]
    images = [k for k, kind in enumerate(kinds) if kind in ("jpeg", "png", "pil", "ndarray")]
    images = images or [k for k, kind in enumerate(kinds) if kind == "bytes"]
    if choice.image_field is not None:
        images = [
            k
            for k, name in enumerate(columns.names)
            if name == choice.image_field and kinds[k] in (*STORED, "pil", "ndarray")
        ]
    if len(images) == 1:
        return images[0]
    shown = ", ".join(f"{a} ({b})" for a, b in zip(columns.names, columns.encodings, strict=True))
    asked = f"--image-field ({choice.image_field})" if choice.image_field else "SOURCE"
    raise DataError(
        f"{asked}: must be one column of images (jpeg, png, pil, ndarray or bytes) in {folder}: "
        f"give --image-field NAME. Its columns are {printable(shown)[:500]}."
    )


def _labels(
    path: Path, offsets: NDArray[np.uint32], columns: Columns, column: int
) -> tuple[list[Label], int]:
    """Return the label of each sample of a shard, and how many of them are none."""
    found, bad, encoding = list[Label](), 0, columns.encodings[column]
    heads = 4 * columns.sizes.count(None)
    with open_regular(path) as file:
        for start in offsets[:-1].tolist():
            try:
                file.seek(start)
                span = columns.span(file.read(heads), column)
                file.seek(start + span.start)
                value = file.read(min(span.stop - span.start, LONGEST_LABEL))
                if encoding in SCALARS:
                    found.append(parse(np.frombuffer(value, SCALARS[encoding])[0]))
                elif encoding in TEXTS:
                    found.append(parse(value))
                else:
                    raise ValueError(encoding)
            except (DecodeError, ValueError, IndexError):
                found.append(None)
                bad += 1
    return found, bad


def _image(encoding: str, stored: bytes) -> Stored:
    """Return the image in a column: the bytes of a file, or pixels, uint8 (H, W) or (H, W, C).

    Raises:
        DecodeError: it is damaged, or of another kind than 8-bit gray, RGB or RGBA.
    """
    if encoding in STORED:
        return stored
    try:
        if encoding == "pil":
            width, height, mode = np.frombuffer(stored, "<u4", 3).tolist()
            shape = (height, width, *MODES[stored[12 : 12 + mode]])
            return _pixels(stored[12 + mode :], shape)
        _, dtype, fixed = f"{encoding}::".split(":")[:3]
        if (dtype or {UINT8: "uint8"}[stored[0]]) != "uint8":
            raise DecodeError(f"is an array of {dtype}, not uint8")
        at = 0 if dtype else 1
        if fixed:
            return _pixels(stored[at:], tuple(int(n) for n in fixed.split(",")))
        axes, size = stored[at] >> 2, 1 << (stored[at] & 3)
        numbers = np.frombuffer(stored, f"<u{size}", axes, at + 1)
        return _pixels(stored[at + 1 + axes * size :], tuple(numbers.tolist()))
    except (KeyError, IndexError, ValueError):
        raise DecodeError(f"is no 8-bit gray, RGB or RGBA image ({encoding})") from None


def _pixels(stored: bytes, shape: tuple[int, ...]) -> Pixels:
    pixels = np.frombuffer(stored, np.uint8).reshape(shape)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise ValueError(shape)
    return pixels
