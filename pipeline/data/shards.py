"""Read the index of a shard set: a folder or URL of plain WebDataset tars, plus

* ``index.json``: the wids-shard-index-v1 schema (name, number of samples, size and sha256 of each
  shard) with the format and shape of the images, how they were made, the number of samples of each
  label, and the checksums of the table as a whole and of its parts;
* ``index.json.samples.npy``: a row of 16 bytes per sample (offset and length of the image in its
  tar, label), so that a sample is read without reading a tar header. Up to ``HELD`` bytes are held
  in memory, and what was compared with its checksum is what is used. A larger table is read in
  parts, when they are used (``sample_table``).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import index_fields
from pipeline.data.index import ROW as ROW
from pipeline.data.index import Index as Index
from pipeline.data.index import Shard as Shard
from pipeline.data.index import Table, described
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
from pipeline.data.sample_table import JoinedTable, SampleTable, fetched
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import is_folder
from pipeline.runtime.host import remedy_of_file

KIND = "wids-shard-index-v1"
LARGEST_INDEX = 64 << 20
"""Bytes; 100,000 shards with a billion samples take two thirds of it. Parsed JSON may take 25 times
as many."""
HELD = 64 << 20
"""Bytes of the tables of a set, or of several as one, that are held in memory: 4 million samples.
Of an index without checksums of parts, as earlier versions wrote it, any table is."""


def shard_name(number: int) -> str:
    """Return the file name of a shard that this project writes."""
    return f"shard-{number:06d}.tar"


def table_of(index: str) -> str:
    """Return the name of the file with the rows of an index file."""
    return f"{index}.samples.npy"


def read_index(
    location: str,
    options: str = "--size 64",
    field: str = "data.shards",
    stop: Callable[[], bool] = raise_on_stop,
    tables_at: Path | None = None,
) -> Index:
    """Read and check the index of a set, or those of several sets that are read as one.

    Args:
        location: folder, URL or index file of the set, or several (``locations.parts_of``).
        options: those of ``pipeline.prepare`` that make fitting images, for messages.
        field: the option that named the set, for the same messages.
        stop: called while a remote index is waited for.
        tables_at: folder of this node that keeps the tables of large remote sets; None = they are
            held in memory.

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
    found = [read_manifest(part, options, field, stop) for part in parts_of(location, field)]
    first = found[0]
    for other in found:
        if other.shape != first.shape:
            raise DataError(
                f"{field}: sets must hold images of one shape; {first.location} has "
                f"{described(first.shape)}, {other.location} has {described(other.shape)}. "
                "Prepare one of them again with the size and channels of the other."
            )
    rows = sum(int(one.within.starts[-1]) for one in found)
    held = rows * ROW.itemsize <= HELD
    tables = [_open_table(one, held, tables_at, (field, options, stop)) for one in found]
    counts = [one.document["label_counts"] for one in found]
    total: Counter[int] = sum(map(Counter, counts), Counter())
    known = dict(total) if all(counts) else None
    if len(found) == 1:
        made_by, kind = first.document["made_by"], first.document["field"]
        return Index(first.at, kind, first.shape, first.shards, tables[0], made_by, known)
    shards = tuple(
        dataclasses.replace(shard, folder=one.at, field=one.document["field"])
        for one in found
        for shard in one.shards
    )
    arrays = [table for table in tables if isinstance(table, np.ndarray)]
    whole = len(arrays) == len(tables)
    table: Table = np.concatenate(arrays) if whole else JoinedTable(tables)
    where = "::".join(one.at for one in found)
    return Index(where, first.document["field"], first.shape, shards, table, counted=known)


@dataclass(frozen=True)
class Manifest:
    """What an index file says, checked, before its table is read.

    Args:
        location: of the set, as the user gave it.
        folder: that the index file is in.
        name: of the index file.
        document: its fields, as ``index_fields.parsed`` returns them.
        within: what the rows of its table must be within.
    """

    location: str
    folder: str
    name: str
    document: dict[str, Any]
    within: index_fields.Bounds

    @property
    def shards(self) -> tuple[Shard, ...]:
        found: tuple[Shard, ...] = self.document["shards"]
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.document["shape"]
        return height, width, channels

    @property
    def at(self) -> str:
        """The folder or URL of the shards."""
        elsewhere: str = self.document["shards_at"]
        return elsewhere if elsewhere and not is_url(self.folder) else self.folder

    @property
    def table(self) -> str:
        """The path or URL of the table."""
        return beside(self.folder, table_of(self.name))

    @property
    def remedy(self) -> str:
        """What to do about a damaged table."""
        return remedy_for_index(b"", self.location, beside(self.folder, self.name))

    def damaged(self, error: ValueError) -> DataError:
        return DataError(f"{self.table}: damaged or not of this index ({error}). {self.remedy}")


def read_manifest(
    location: str, options: str, field: str, stop: Callable[[], bool] = raise_on_stop
) -> Manifest:
    """Read and check the index file of one set; the arguments are those of ``read_index``."""
    folder, index = folder_and_index(location)
    name = beside(folder, index)
    content = _read_beside(folder, index, LARGEST_INDEX, location, (field, options, stop))
    try:
        document = index_fields.parsed(content, KIND)
    except ValueError as error:
        remedy = remedy_for_index(content, location, name)
        raise DataError(f"{name}: not an index of this project ({error}). {remedy}") from None
    if odd := index_fields.odd_name([shard.url for shard in document["shards"]]):
        raise DataError(f"{name}: shard {odd}.")
    within = index_fields.bounds(document)
    if within.starts[-1] == 0:
        raise DataError(f"{name}: lists no samples.")
    return Manifest(location, folder, index, document, within)


Reading = tuple[str, str, Callable[[], bool]]
"""``field``, ``options`` and ``stop`` of ``read_index``."""


def _open_table(one: Manifest, held: bool, tables_at: Path | None, reading: Reading) -> Table:
    """Read the table of a set, or open it."""
    name, document, count = table_of(one.name), one.document, int(one.within.starts[-1])
    parts, remote = document["parts"], is_url(one.folder)
    limit = count * ROW.itemsize + index_fields.LONGEST_NPY_HEADER
    try:
        if held or parts is None or (remote and tables_at is None):
            raw = _read_beside(one.folder, name, limit, one.location, reading)
            if hashlib.sha256(raw).hexdigest() != document["samples_sha256"]:
                raise ValueError("its checksum differs from the index")
            begin = index_fields.npy_head(raw, len(raw), ROW, count)
            table = np.frombuffer(raw, ROW, offset=begin)
            index_fields.check_rows(table, one.within)
            return table
        if remote and tables_at is not None:
            path = fetched(one.table, document["samples_sha256"], tables_at, reading[2])
        else:
            _read_beside(one.folder, name, limit, one.location, reading, head=1)
            path = Path(one.table).expanduser()
        return SampleTable(path, parts, one.within, one.remedy)
    except ValueError as error:
        raise one.damaged(error) from None


def _read_beside(
    folder: str,
    name: str,
    limit: int,
    location: str,
    reading: Reading,
    head: int | None = None,
) -> bytes:
    """Return the bytes of a file beside the shards, or its first ``head``."""
    field, options, stop = reading
    if is_url(folder):
        try:
            return read_url(beside(folder, name), limit, stop)
        except DataError as error:
            raise DataError(f"{field}: {error}") from None
    path = Path(folder).expanduser() / name
    again = remedy_for_index(b"", location, str(path).removesuffix(".samples.npy"))
    try:
        return read_bytes(path, limit, head)
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
