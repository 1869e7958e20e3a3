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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import index_fields
from pipeline.data.codecs import MIXED
from pipeline.data.index import ROW as ROW
from pipeline.data.index import Index as Index
from pipeline.data.index import Shard as Shard
from pipeline.data.index import described
from pipeline.data.locations import INDEX_NAME as INDEX_NAME
from pipeline.data.locations import (
    LEFT_OUT,
    beside,
    folder_and_index,
    is_url,
    parts_of,
    remedy_for_index,
    what_is_missing,
)
from pipeline.data.remote import raise_on_stop, read_url
from pipeline.runtime.documents import DamagedFile, read_bytes, write_document
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import is_folder, write_atomic
from pipeline.runtime.host import remedy_of_file

KIND = "wids-shard-index-v1"
LARGEST_INDEX = 32 << 20
"""Bytes; 100,000 shards take half of it. Parsed JSON may take 25 times as many."""


# -- writing ------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """Return the file name of a shard that this project writes."""
    return f"shard-{number:06d}.tar"


def write_index(
    folder: Path | str,
    scans: Sequence[tuple[Shard, NDArray[np.void], str, *tuple[Any, ...]]],
    shape: tuple[int, int, int],
    made_by: dict[str, Any],
    file: Path | None = None,
    *,
    elsewhere: bool = False,
) -> Index:
    """Write the index of complete shards.

    Args:
        folder: where the tars are; a path or a URL.
        scans: (shard, rows of the table, format of its images) of each tar.
        shape: (H, W, C) of every image.
        made_by: how the images were made.
        file: the index file; None = ``index.json`` in ``folder``.
        elsewhere: the file is not in ``folder``, and has to name it.

    Raises:
        DataError: there are no images.
    """
    fields = {name for _, _, name, *_ in scans if name}
    if not fields:
        raise DataError(f"{folder}: the shards hold no images.")
    table = np.concatenate([rows for _, rows, *_ in scans])
    raw = io.BytesIO()
    np.save(raw, table)
    target = Path(folder) / INDEX_NAME if file is None else file
    write_atomic(table_of(target), raw.getvalue())
    place = {"shards_at": str(folder)} if elsewhere else {}
    document = {
        "__kind__": KIND,
        "wids_version": 1,
        "field": fields.pop() if len(fields) == 1 else MIXED,
        "shape": list(shape),
        "samples_sha256": hashlib.sha256(raw.getvalue()).hexdigest(),
        "made_by": made_by,
        "shardlist": [_entry(shard) for shard, *_ in scans],
    }
    write_document(target, document | place, indent=1)
    return read_index(str(target))


def _entry(shard: Shard) -> dict[str, Any]:
    return {key: value for key, value in asdict(shard).items() if key not in ("folder", "field")}


def table_of(index: Path) -> Path:
    """Return the file with the rows of an index file."""
    return index.with_name(f"{index.name}.samples.npy")


# -- reading ------------------------------------------------------------------------------------


def read_index(
    location: str,
    options: str = "--size 64",
    field: str = "data.shards",
    stop: Callable[[], bool] = raise_on_stop,
) -> Index:
    """Read and check the index of a set, or those of several sets that are read as one.

    Args:
        location: folder, URL or index file of the set, or several (``locations.parts_of``).
        options: those of ``pipeline.prepare`` that make fitting images, for messages.
        field: the option that named the set, for the same messages.
        stop: called while a remote index is waited for.

    Raises:
        DataError: there is no index, it is damaged, or it names files outside its folder; or
            images of several sets have several shapes.
        Stopped: ``stop`` returned True.
    """
    if f"={LEFT_OUT}" in location or f"//{LEFT_OUT}@" in location:
        raise DataError(
            f"{field} ({location}): its credential was not stored with the run. Give {field} on "
            "the command line again."
        )
    sets = [_read_set(part, options, field, stop) for part in parts_of(location, field)]
    first = sets[0]
    if len(sets) == 1:
        return first
    for other in sets:
        if other.shape != first.shape:
            raise DataError(
                f"{field}: sets must hold images of one shape; {first.location} has "
                f"{described(first.shape)}, {other.location} has {described(other.shape)}. "
                "Prepare one of them again with the size and channels of the other."
            )
    shards = tuple(
        dataclasses.replace(shard, folder=one.location, field=one.field)
        for one in sets
        for shard in one.shards
    )
    table = np.concatenate([one.table for one in sets])
    where = "::".join(one.location for one in sets)
    return Index(where, first.field, first.shape, shards, table)


def _read_set(location: str, options: str, field: str, stop: Callable[[], bool]) -> Index:
    """Read and check the index of one set."""
    folder, index = folder_and_index(location)
    name, table_name = beside(folder, index), beside(folder, f"{index}.samples.npy")
    content = _read_beside(folder, index, LARGEST_INDEX, field, location, options, stop)
    try:
        document = index_fields.parsed(content, KIND)
    except ValueError as error:
        remedy = remedy_for_index(content, location, name)
        raise DataError(f"{name}: not an index of this project ({error}). {remedy}") from None
    shards = tuple(Shard(**entry) for entry in document["shardlist"])
    if odd := index_fields.odd_name([shard.url for shard in shards]):
        raise DataError(f"{name}: shard {odd}.")
    count = sum(shard.nsamples for shard in shards)
    if count == 0:
        raise DataError(f"{name}: lists no samples.")
    limit = count * ROW.itemsize + index_fields.LONGEST_NPY_HEADER
    raw = _read_beside(folder, f"{index}.samples.npy", limit, field, location, options, stop)
    try:
        if hashlib.sha256(raw).hexdigest() != document["samples_sha256"]:
            raise ValueError("its checksum differs from the index")
        table = index_fields.table(raw, ROW)
        if len(table) != count:
            raise ValueError(f"has {len(table)} rows; the shards of the index have {count} samples")
        index_fields.check_rows(table, [(one.nsamples, one.filesize) for one in shards])
    except ValueError as error:
        again = remedy_for_index(b"", location, name)
        raise DataError(f"{table_name}: damaged or not of this index ({error}). {again}") from None
    if (at := document["shards_at"]) and not is_url(folder):
        folder = at
    shape, made_by = tuple(document["shape"]), document["made_by"]
    return Index(folder, document["field"], shape, shards, table, made_by)


def _read_beside(
    folder: str,
    name: str,
    limit: int,
    field: str,
    location: str,
    options: str,
    stop: Callable[[], bool],
) -> bytes:
    """Return the bytes of a file beside the shards."""
    if is_url(folder):
        try:
            return read_url(beside(folder, name), limit, stop)
        except DataError as error:
            raise DataError(f"{field}: {error}") from None
    path = Path(folder).expanduser() / name
    again = remedy_for_index(b"", location, str(path).removesuffix(".samples.npy"))
    try:
        return read_bytes(path, limit)
    except DamagedFile as error:
        if is_folder(path.parent):
            reason = str(error).removeprefix(f"{path}: ")
            raise DataError(
                f"{field} ({location}): {path} cannot be read: {reason}. {again}"
            ) from None
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(
            f"{field} ({location}): {path} cannot be read: {error.strerror}. "
            f"{remedy_of_file(error)}."
        ) from None
    if name.endswith(".npy"):
        raise DataError(f"{field} ({location}): no {name}. {again}")
    raise DataError(f"{field} ({location}): {what_is_missing(location, options)}")
