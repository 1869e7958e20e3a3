"""Write the index of a shard set, of any number of samples, in little memory.

The table is written first, shard by shard, then the index, atomically: a folder with an index is
complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray

from pipeline.data import index_fields
from pipeline.data.codecs import MIXED
from pipeline.data.index import COLUMN, ROW, Index, Shard
from pipeline.data.locations import INDEX_NAME, folder_and_index, is_url
from pipeline.data.shards import KIND, read_index, read_manifest, table_of
from pipeline.runtime.documents import open_regular, read_document, write_document
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import new_file, sha256_of, sync_folder
from pipeline.runtime.host import remedy_of_file

PART = 2048
"""Rows of a part: 32 KiB, read and compared in 0.1 ms. A billion samples have 488,282 of them, with
checksums of 16 MB in the index."""


class Sums:
    """What an index says about the rows of its table, found while they pass by."""

    def __init__(self) -> None:
        self.rows, self._counted = 0, 0
        self._parts: list[str] = []
        self._open, self._room = hashlib.sha256(), PART
        self._labels: Counter[int] = Counter()
        self._uncounted: list[NDArray[np.int32]] = []

    def add(self, rows: NDArray[np.void]) -> None:
        """Take the next rows."""
        self.rows += len(rows)
        self._uncounted.append(rows["label"].copy())
        if self.rows - self._counted >= COLUMN:
            self._count()
        while len(rows):
            self._open.update(rows[: self._room].tobytes())
            self._room, rows = self._room - len(rows[: self._room]), rows[self._room :]
            if not self._room:
                self._close()

    def _count(self) -> None:
        labels, counts = np.unique(np.concatenate(self._uncounted), return_counts=True)
        self._uncounted.clear()
        self._counted = self.rows
        if len(self._labels) <= index_fields.MOST_LABELS:
            self._labels.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))

    def _close(self) -> None:
        self._parts.append(self._open.digest()[: index_fields.SUM].hex())
        self._open, self._room = hashlib.sha256(), PART

    def describe(self) -> dict[str, Any]:
        """Return the fields of the index; to be called once, after the last row."""
        if self._room < PART:
            self._close()
        if self._uncounted:
            self._count()
        found = {"samples_parts": {"rows": PART, "sha256": "".join(self._parts)}}
        if len(self._labels) > index_fields.MOST_LABELS:
            return found
        return found | {"label_counts": {str(k): n for k, n in sorted(self._labels.items())}}


class IndexWriter:
    """The index of complete shards, which are added in the order of their samples."""

    def __init__(self, target: Path, table: BinaryIO) -> None:
        self.shards: list[Shard] = []
        self._target, self._table, self._sums = target, table, Sums()
        self._fields: set[str] = set()
        write_head(table, 0)

    def add(self, shard: Shard, rows: NDArray[np.void], field: str) -> None:
        """Add a shard, its rows of the table, and the format of its images; "" if it has none."""
        self.shards.append(shard)
        self._fields |= {field} - {""}
        self._sums.add(rows)
        self._table.write(rows.tobytes())

    def finish(
        self,
        folder: Path | str,
        shape: tuple[int, int, int],
        made_by: dict[str, Any],
        *,
        elsewhere: bool = False,
    ) -> None:
        """Write the table, then the index; the arguments are those of ``write_index``.

        Raises:
            DataError: there are no images.
        """
        if not self._fields:
            raise DataError(f"{folder}: the shards hold no images.")
        self._table.seek(0)
        write_head(self._table, self._sums.rows)
        self._table.flush()
        os.fsync(self._table.fileno())
        partial = Path(self._table.name)
        digest = sha256_of(partial)
        os.replace(partial, self._target.with_name(table_of(self._target.name)))
        sync_folder(self._target.parent)
        document = {
            "__kind__": KIND,
            "wids_version": 1,
            "field": self._fields.pop() if len(self._fields) == 1 else MIXED,
            "shape": list(shape),
            "samples_sha256": digest,
            "made_by": made_by,
            "shardlist": [_entry(shard) for shard in self.shards],
            **self._sums.describe(),
        }
        place = {"shards_at": str(folder)} if elsewhere else {}
        write_document(self._target, document | place, indent=1)


def _entry(shard: Shard) -> dict[str, Any]:
    return {key: value for key, value in asdict(shard).items() if key not in ("folder", "field")}


def write_head(file: BinaryIO, rows: int) -> None:
    """Write the npy header of a table, which has the same length for any number of rows."""
    descr = dtype_to_descr(ROW)
    write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (rows,)})


@contextlib.contextmanager
def index_writer(target: Path) -> Iterator[IndexWriter]:
    """Open the index file ``target`` for writing; without ``finish`` nothing is left of it."""
    name = f"{table_of(target.name)}.{os.getpid()}.tmp"
    partial = target.with_name(name)
    try:
        with new_file(partial) as table:
            yield IndexWriter(target, table)
    finally:
        partial.unlink(missing_ok=True)


def write_index(
    folder: Path | str,
    scans: Iterable[tuple[Shard, NDArray[np.void], str, *tuple[Any, ...]]],
    shape: tuple[int, int, int],
    made_by: dict[str, Any],
    file: Path | None = None,
    *,
    elsewhere: bool = False,
) -> Index:
    """Write the index of complete shards, and read it.

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
    target = Path(folder) / INDEX_NAME if file is None else file
    with index_writer(target) as writer:
        for shard, rows, field, *_ in scans:
            writer.add(shard, rows, field)
        writer.finish(folder, shape, made_by, elsewhere=elsewhere)
    return read_index(str(target))


def upgrade(location: str) -> str:
    """Add what an index of an earlier version lacks: checksums of parts, numbers of labels.

    Tars and table stay as they are, and so do fingerprint, ids and labels. The index is replaced
    by a rename: whenever this ends, it is the old or the new one.

    Args:
        location: folder or index file.

    Returns:
        a line for the user.

    Raises:
        DataError: there is no index, it is behind a URL, damaged, or cannot be written.
    """
    if is_url(location):
        raise DataError(f"--upgrade ({location}): must be here. Upgrade a copy, and upload it.")
    found = read_manifest(location, "--size 64", "--upgrade")
    folder, name = folder_and_index(location)
    path, table = Path(folder) / name, Path(found.table)
    if found.document["parts"] is not None:
        return f"{path}: has all that this version writes, nothing to do"
    sums, digest = Sums(), hashlib.sha256()
    try:
        with open_regular(table) as file:
            size = os.fstat(file.fileno()).st_size
            head = os.pread(file.fileno(), index_fields.LONGEST_NPY_HEADER, 0)
            count = int(found.within.starts[-1])
            digest.update(file.read(index_fields.npy_head(head, size, ROW, count)))
            while content := file.read(COLUMN * ROW.itemsize):
                digest.update(content)
                rows = np.frombuffer(content, ROW)
                index_fields.check_rows(rows, found.within, sums.rows)
                sums.add(rows)
        if digest.hexdigest() != found.document["samples_sha256"]:
            raise ValueError("its checksum differs from the index")
        write_document(path, read_document(path) | sums.describe(), indent=1)
    except ValueError as error:
        raise found.damaged(error) from None
    except OSError as error:
        raise DataError(
            f"--upgrade ({location}): {error.filename or path}: {error.strerror}. "
            f"{remedy_of_file(error)}. The set can be used as it is."
        ) from None
    return f"{path}: upgraded; its {sums.rows} samples are those of before"
