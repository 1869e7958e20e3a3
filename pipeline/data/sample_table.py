"""Read the table of a large set in parts: each is compared with its checksum when it is first used.

The table of a billion samples has 16 GB. A process opens it and reads the rows of its batches; the
processes of a node share what the system keeps of the file in memory. It is read with ``pread`` and
not mapped, as shards are (``reader``). A part that was compared is known by the size, times and
inode of the file: as soon as these differ, every part is compared again before it is used.
"""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.checksums import Marks, is_compared, marks, remember, unreadable
from pipeline.data.index import COLUMN, ROW, Table
from pipeline.data.index_fields import (
    LONGEST_NPY_HEADER,
    SUM,
    Bounds,
    Parts,
    check_rows,
    npy_head,
)
from pipeline.data.remote import POLL_SECONDS, fetch
from pipeline.runtime.documents import open_regular
from pipeline.runtime.errors import DataError
from pipeline.runtime.host import remedy_of_file
from pipeline.runtime.locks import FileLock
from pipeline.runtime.signals import Stopped

ATTEMPTS = 3


class SampleTable:
    """The rows of a set (``index.Table``), read from its file as they are used.

    Args:
        path: of the file.
        parts: the checksums of its parts.
        within: what its rows must be within.
        remedy: what to do about a damaged one, for messages.

    Raises:
        ValueError: its header is not that of this index.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, parts: Parts, within: Bounds, remedy: str) -> None:
        self.path, self._parts, self._within, self._remedy = path, parts, within, remedy
        with open_regular(path) as file:
            # Shared with forked processes, as ``pread`` has no position.
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size
        head = os.pread(self._descriptor, LONGEST_NPY_HEADER, 0)
        self._begin = npy_head(head, self._size, ROW, len(self))
        self._marks: Marks = ()
        self._compared = np.zeros(len(parts.sums) // SUM, bool)

    def __len__(self) -> int:
        return int(self._within.starts[-1])

    def __getitem__(self, wanted: Any, /) -> Any:
        """Return the rows of a slice or of an array of ids, a row, or a whole column by its name.

        Raises:
            DataError: a part is damaged, or the file was cut, or cannot be read.
        """
        try:
            if isinstance(wanted, str):
                starts = range(0, len(self), COLUMN)
                return np.concatenate([self[k : k + COLUMN][wanted] for k in starts])
            if isinstance(wanted, slice):
                return self._span(*wanted.indices(len(self)))
            ids = np.asarray(wanted)
            return self._rows(ids) if ids.ndim else self._rows(ids[None])[0]
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _span(self, first: int, last: int, step: int) -> NDArray[np.void]:
        rows = self._parts.rows
        parts = range(first // rows, -(-max(first, last) // rows))
        self._look()
        found = np.concatenate([np.empty(0, ROW), *map(self._part, parts)])
        return found[first - parts.start * rows : last - parts.start * rows : step]

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.void]:
        parts = np.unique(ids // self._parts.rows)
        begin, width = self._begin, ROW.itemsize
        for _ in range(ATTEMPTS):
            if (found := self._look()) != self._marks:
                self._compared[:] = False
                self._marks = found
            for k in parts[~self._compared[parts]].tolist():
                self._part(k)
                self._compared[k] = True
            read = [os.pread(self._descriptor, width, begin + width * k) for k in ids.tolist()]
            if self._look() == found:  # else it was written to meanwhile
                return np.frombuffer(b"".join(read), ROW)
        raise DataError(f"{self.path}: is written to while it is read. Let nothing change the set.")

    def _look(self) -> Marks:
        found = marks(os.fstat(self._descriptor))
        if found[0] != self._size:
            raise self._damaged(f"it has {found[0]} bytes and had {self._size} when it was opened")
        return found

    def _part(self, k: int) -> NDArray[np.void]:
        """Return the rows of part k, compared with its checksum and within their shards."""
        first = k * self._parts.rows
        count = min(self._parts.rows, len(self) - first)
        width, wanted = ROW.itemsize, self._parts.sums[SUM * k : SUM * (k + 1)]
        content = os.pread(self._descriptor, count * width, self._begin + first * width)
        if hashlib.sha256(content).digest()[:SUM] != wanted:
            last = first + count - 1
            raise self._damaged(f"the checksum of rows {first} to {last} differs from the index")
        rows = np.frombuffer(content, ROW)
        try:
            check_rows(rows, self._within, first)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        return rows

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path}: damaged or not of this index ({why}). {self._remedy}")


class JoinedTable:
    """The tables of several sets, one after the other (``index.Table``)."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *map(len, tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, wanted: Any, /) -> Any:
        """Return what ``SampleTable`` returns."""
        if isinstance(wanted, str):
            return np.concatenate([table[wanted] for table in self._tables])
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(len(self)))
        ids = np.atleast_1d(np.asarray(wanted))
        sets = np.searchsorted(self._starts, ids, side="right") - 1
        found = np.empty(len(ids), ROW)
        for k in np.unique(sets).tolist():
            mine = sets == k
            found[mine] = self._tables[k][ids[mine] - self._starts[k]]
        return found if np.ndim(wanted) else found[0]


def fetched(url: str, sha256: str, folder: Path, stop: Callable[[], bool]) -> Path:
    """Return the copy of a remote table on this node, which one process downloads.

    Args:
        url: of the table.
        sha256: its checksum.
        folder: of the copies of remote shards; ``data.cache_dir``.
        stop: called while it is waited for.

    Raises:
        DataError: it cannot be downloaded, or the folder cannot be used.
        Stopped: ``stop`` returned True.
    """
    target = folder / f"{sha256[:16]}-samples.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{target.name}.lock") as lock:
            while not lock.acquire(wait=False):
                if stop():
                    raise Stopped
                time.sleep(POLL_SECONDS)
            if not is_compared(target, sha256, record=True):
                fetch(url, target, sha256, stop=stop)
                remember(target, sha256, record=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir ({folder}): cannot be used: {error}. {remedy_of_file(error)}."
        ) from None
    return target
