"""Tell whether the files of a folder are still those that were packed.

The digest of a source has the names and sizes of its files. An edit may keep both, so a shard also
records the times of change of its files, and their contents. Contents are compared only where times
differ: on some clusters users touch their files, and copies have other times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.pictures import DecodeError
from pipeline.data.source import Source, Stored, gone
from pipeline.data.source_files import read_file

TIMES, CONTENTS = "times", "contents"
"""Keys of a record: digests of the times of change, and of the contents, of some files."""
DIGITS = 16


class Record:
    """The record of the files of some rows, made while they are read in this order.

    Args:
        source: of any kind; only a folder's files are recorded: the digests of the others have
            the contents.
        rows: the rows.
    """

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self._times = _times(source, rows) if source.kind == "folder" else ""
        self._digest = hashlib.sha256()

    def add(self, stored: Stored) -> None:
        """Take the content of the next file."""
        if self._times and isinstance(stored, bytes):
            self._digest.update(hashlib.sha256(stored).digest())

    def describe(self) -> dict[str, str]:
        """Return the record, {} for a source that needs none."""
        return (
            {TIMES: self._times, CONTENTS: self._digest.hexdigest()[:DIGITS]} if self._times else {}
        )


def is_record(value: object) -> bool:
    """Return whether a value, which may come from anywhere, is what ``Record.describe`` returns."""
    return (
        isinstance(value, dict)
        and set(value) in (set(), {TIMES, CONTENTS})
        and all(isinstance(digest, str) for digest in value.values())
    )


def is_stale(source: Source, rows: Sequence[int], found: Mapping[str, str]) -> bool:
    """Return whether files of some rows are others than a record says; {} says nothing."""
    if not found or found[TIMES] == _times(source, rows):
        return False
    return found[CONTENTS] != _contents(source, rows)


def _times(source: Source, rows: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        try:
            time = _path(source, row).stat().st_mtime_ns
        except OSError:  # gone, or a link to nothing: it is listed in skipped.txt
            time = -1
        digest.update(b"%d " % time)
    return digest.hexdigest()[:DIGITS]


def _contents(source: Source, rows: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        try:
            content = read_file(_path(source, row))
        except DecodeError:  # no regular file
            content = b""
        except OSError as error:
            raise gone(source, row, error) from None
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:DIGITS]


def _path(source: Source, row: int) -> Path:
    return Path(source.location).expanduser() / source.names[row]
