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
from pipeline.data.source import Source
from pipeline.data.source_files import read_file

TIMES, CONTENTS = "times", "contents"
"""Keys of a record: digests of the times of change, and of the contents, of some files."""
DIGITS = 16


def record(source: Source, rows: Sequence[int]) -> dict[str, str]:
    """Return the record of the files of some rows; {} for sources whose digest has the contents."""
    if source.kind != "folder":
        return {}
    return {TIMES: _times(source, rows), CONTENTS: _contents(source, rows)}


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
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:DIGITS]


def _path(source: Source, row: int) -> Path:
    return Path(source.location).expanduser() / source.names[row]
