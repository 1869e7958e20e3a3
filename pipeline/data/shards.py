"""Write and read the index of a shard set: a folder or URL of plain WebDataset tars, plus

* ``index.json``: the wids-shard-index-v1 schema (name, number of samples, size and sha256 of each
  shard) with the format and shape of the images, and how they were made;
* ``index.json.samples.npy``: a row of 16 bytes per sample (offset and length of the image in its
  tar, label). It is held in memory, so a sample is read without reading a tar header, and what was
  compared with its checksum is what is used.

The index is written last and atomically, so a folder with an index is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import index_fields
from pipeline.data.codecs import MIXED
from pipeline.data.remote import raise_on_stop, read_url
from pipeline.runtime.documents import DamagedFile, read_bytes, write_document
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import is_folder, write_atomic
from pipeline.runtime.host import remedy_of_file

INDEX_NAME = "index.json"
TABLE_NAME = "index.json.samples.npy"
KIND = "wids-shard-index-v1"
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])
LARGEST_INDEX = 32 << 20
"""Bytes; 100,000 shards take half of it. Parsed JSON may take 25 times as many."""


@dataclass(frozen=True)
class Shard:
    """A tar of a set: its file name, number of samples, size in bytes, and sha256 in hex."""

    url: str
    nsamples: int
    filesize: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The checked index of a shard set.

    Args:
        location: folder or URL of the set.
        field: extension of the images in the tars, e.g. ``npy``.
        shape: (H, W, C) of every image.
        shards: the tars, in the order of the sample ids.
        table: a row of dtype ``ROW`` for each sample id.
        made_by: how the images were made: source, crop, resize.
    """

    location: str
    field: str
    shape: tuple[int, int, int]
    shards: tuple[Shard, ...]
    table: NDArray[np.void]
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.table)

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each shard."""
        return [shard.nsamples for shard in self.shards]

    @property
    def is_remote(self) -> bool:
        return "://" in self.location

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the shards' sizes and checksums, equal for every copy of the set."""
        listed = [[shard.nsamples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def require_shape(self, wanted: tuple[int, int, int], field: str) -> None:
        """Raise ``DataError`` if the images do not have the shape (H, W, C) that a model takes.

        Args:
            wanted: the shape that the model takes.
            field: the option that named this set, for the message.
        """
        if self.shape != wanted:
            raise DataError(
                f"{field} ({self.location}): images of {_described(self.shape)}, the model wants "
                f"{_described(wanted)}. Prepare them with --size {wanted[0]} --channels "
                f"{wanted[2]}, give another set, or train with other model.image_size and "
                "model.channels."
            )


def _described(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


# -- writing ------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """Return the file name of a shard that this project writes."""
    return f"shard-{number:06d}.tar"


def write_index(
    folder: Path,
    scans: Sequence[tuple[Shard, NDArray[np.void], str, *tuple[Any, ...]]],
    shape: tuple[int, int, int],
    made_by: dict[str, Any],
) -> Index:
    """Write the index of the complete shards in ``folder``.

    Args:
        folder: where the tars are.
        scans: (shard, rows of the table, format of its images) of each tar.
        shape: (H, W, C) of every image.
        made_by: how the images were made.

    Raises:
        DataError: there are no images.
    """
    fields = {name for _, _, name, *_ in scans if name}
    if not fields:
        raise DataError(f"{folder}: the shards hold no images.")
    table = np.concatenate([rows for _, rows, *_ in scans])
    raw = io.BytesIO()
    np.save(raw, table)
    write_atomic(folder / TABLE_NAME, raw.getvalue())
    document = {
        "__kind__": KIND,
        "wids_version": 1,
        "field": fields.pop() if len(fields) == 1 else MIXED,
        "shape": list(shape),
        "samples_sha256": hashlib.sha256(raw.getvalue()).hexdigest(),
        "made_by": made_by,
        "shardlist": [asdict(shard) for shard, *_ in scans],
    }
    write_document(folder / INDEX_NAME, document, indent=1)
    return read_index(str(folder))


# -- reading ------------------------------------------------------------------------------------


def read_index(
    location: str,
    command: str = "",
    field: str = "data.shards",
    stop: Callable[[], bool] = raise_on_stop,
) -> Index:
    """Read and check the index of a folder or URL.

    Args:
        location: folder or URL of the set.
        command: the command that makes the set, for the message when the index is missing.
        field: the option that named the set, for the same message.
        stop: called while a remote index is waited for.

    Raises:
        DataError: there is no index, it is damaged, or it names files outside its folder.
        Stopped: ``stop`` returned True.
    """
    location = location.rstrip("/") if "://" in location else location
    name = f"{location}/{INDEX_NAME}"
    content = _read_beside(location, INDEX_NAME, command, field, LARGEST_INDEX, stop)
    try:
        document = index_fields.parsed(content, KIND)
    except ValueError as error:
        raise DataError(
            f"{name}: not an index of this project ({error}). "
            f"Make it again: python -m pipeline.prepare {location} --out {location}"
        ) from None
    shards = tuple(Shard(**entry) for entry in document["shardlist"])
    if odd := index_fields.odd_name([shard.url for shard in shards]):
        raise DataError(f"{name}: shard {odd}.")
    count = sum(shard.nsamples for shard in shards)
    if count == 0:
        raise DataError(f"{name}: lists no samples.")
    limit = count * ROW.itemsize + index_fields.LONGEST_NPY_HEADER
    raw = _read_beside(location, TABLE_NAME, "", field, limit, stop)
    try:
        if hashlib.sha256(raw).hexdigest() != document["samples_sha256"]:
            raise ValueError("its checksum differs from the index")
        table = index_fields.table(raw, ROW)
        if len(table) != count:
            raise ValueError(f"has {len(table)} rows; the shards of the index have {count} samples")
        index_fields.check_rows(table, [(one.nsamples, one.filesize) for one in shards])
    except ValueError as error:
        raise DataError(
            f"{location}/{TABLE_NAME}: damaged or not of this index ({error}). Make both again: "
            f"remove {name}, then run python -m pipeline.prepare {location} --out {location}"
        ) from None
    shape, made_by = tuple(document["shape"]), document["made_by"]
    return Index(location, document["field"], shape, shards, table, made_by)


def _read_beside(
    location: str,
    name: str,
    command: str,
    field: str,
    limit: int,
    stop: Callable[[], bool],
) -> bytes:
    """Return the bytes of a file beside the shards."""
    if "://" in location:
        try:
            return read_url(f"{location}/{name}", limit, stop)
        except DataError as error:
            raise DataError(f"{field}: {error}") from None
    path = Path(location).expanduser() / name
    try:
        return read_bytes(path, limit)
    except DamagedFile as error:
        if is_folder(path.parent):
            reason = str(error).removeprefix(f"{path}: ")
            raise DataError(
                f"{field} ({location}): {path} cannot be read: {reason}. Restore it, or make it "
                f"again: python -m pipeline.prepare {location} --out {location}"
            ) from None
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(
            f"{field} ({location}): {path} cannot be read: {error.strerror}. "
            f"{remedy_of_file(error)}."
        ) from None
    tars = len(list(path.parent.glob("*.tar"))) if is_folder(path.parent) else 0
    remedy = command or f"python -m pipeline.prepare SOURCE --out {location} --size SIZE"
    if tars and name == INDEX_NAME:
        found = f"{tars} tars without an index"
        remedy = f"python -m pipeline.prepare {location} --out {location}"
    else:
        found = f"no {name}" if is_folder(path.parent) else "no such folder"
    raise DataError(f"{field} ({location}): {found}. Make it with: {remedy}")
