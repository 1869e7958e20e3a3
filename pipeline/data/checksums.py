"""Compare shards with the checksums of their index, and remember which bytes were compared.

A file that was compared is known by its size, times and inode. The record is kept in the memory of
the process, which forked processes inherit, and for a copy of a remote shard also in a small file
beside it. What differs from its record, or has none, is compared again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path

from pipeline.data.index import Index, Shard
from pipeline.data.locations import INDEX_NAME, is_url
from pipeline.runtime.documents import (
    DamagedFile,
    open_regular,
    parse_json,
    read_bytes,
    sealed,
    write_document,
)
from pipeline.runtime.errors import DataError
from pipeline.runtime.host import SCARCE_FILES, remedy_of_file
from pipeline.runtime.signals import Stopped, never_stop

CHUNK = 1 << 20
LARGEST_RECORD = 4096
Marks = tuple[int, ...]
_compared: dict[str, tuple[str, Marks]] = {}
"""Checksum and marks of each file, by its absolute path."""


def marks(status: os.stat_result) -> Marks:
    """Return what differs when a file was changed or replaced; ctime cannot be set by a user."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def is_compared(path: Path, sha256: str, *, record: bool = False) -> bool:
    """Return whether these very bytes of a file were compared with a checksum.

    Args:
        path: the file; False if there is none.
        sha256: the checksum.
        record: believe the record beside the file too.

    Raises:
        OSError: it cannot be found out, which is no damage.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    key, found = str(path.absolute()), (sha256, marks(status))
    if _compared.get(key) == found:
        return True
    if not record or not stat.S_ISREG(status.st_mode):
        return False
    name = record_of(path)
    try:
        stored = parse_json(read_bytes(name, LARGEST_RECORD), name)
    except DamagedFile:
        return False
    except OSError as error:
        if error.errno in SCARCE_FILES:
            raise
        return False
    if stored != _record(*found):
        return False
    _compared[key] = found
    return True


def remember(path: Path, sha256: str, *, record: bool = False) -> None:
    """Remember that a file has this checksum; with ``record`` also for other processes."""
    found = (sha256, marks(path.stat()))
    _compared[str(path.absolute())] = found
    if record:
        with contextlib.suppress(OSError):  # without it the next process compares again
            write_document(record_of(path), _record(*found))


def record_of(path: Path) -> Path:
    """Return the path of the record beside a file."""
    return path.with_name(f"{path.name}.verified")


def _record(sha256: str, found: Marks) -> dict[str, object]:
    names = ("size", "mtime_ns", "ctime_ns", "inode")
    return sealed({"sha256": sha256} | dict(zip(names, found, strict=True)))


def open_shard(path: Path, shard: Shard) -> BufferedReader:
    """Open a shard that has the size which the index says.

    Raises:
        DataError: it is missing, no regular file, or has another size.
        OSError: too many files are open.
    """
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: missing, but listed in {INDEX_NAME}.") from None
    except DamagedFile as error:
        raise DataError(f"{path}: cannot be read: {_reason(error, path)}. Restore it.") from None
    except OSError as error:
        if error.errno in SCARCE_FILES:
            raise
        raise unreadable(path, error) from None
    if (found := os.fstat(file.fileno()).st_size) != shard.filesize:
        file.close()
        raise DataError(
            f"{path}: {found} bytes, the index says {shard.filesize}: truncated or changed since "
            "it was indexed. Restore it, or prepare the set again."
        )
    return file


def unreadable(path: Path | str, error: OSError) -> DataError:
    """Return the message for a shard that cannot be read, which may be whole."""
    return DataError(f"{path}: cannot be read: {error.strerror}. {remedy_of_file(error)}.")


def _reason(error: DamagedFile, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


def fault_of(path: Path, shard: Shard, stop: Callable[[], bool] = never_stop) -> str:
    """Return what is wrong with the bytes of a shard, or "".

    Args:
        path: the file.
        shard: what the index says about it.
        stop: called for each MiB.

    Raises:
        OSError: it cannot be read, which is no damage.
        Stopped: ``stop`` returned True.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return "is missing"
    except DamagedFile as error:
        return _reason(error, path)
    with file:
        before = os.fstat(file.fileno())
        if before.st_size != shard.filesize:
            return f"has {before.st_size} bytes, the index says {shard.filesize}"
        digest, buffer = hashlib.sha256(), bytearray(CHUNK)
        while length := file.readinto(buffer):
            if stop():
                raise Stopped
            digest.update(memoryview(buffer)[:length])
        if marks(os.fstat(file.fileno())) != marks(before):
            return "was changed while its checksum was computed"
    return "" if digest.hexdigest() == shard.sha256 else "its checksum differs from the index"


def changes(index: Index, tars: Sequence[str]) -> str:
    """Return how the tars that are there differ from those of an index, "" if they do not.

    Args:
        index: of local or remote tars; the latter are compared by name alone.
        tars: their paths or URLs.
    """
    listed = {shard.url: shard for shard in index.shards}
    names = [tar.rpartition("/")[2] for tar in tars]
    if other := sorted(set(names) ^ set(listed)):
        return f"{other[0]} is {'new' if other[0] in names else 'missing'}"
    for tar, name in zip(tars, names, strict=True):
        if not is_url(tar) and (fault := fault_of(Path(tar), listed[name])):
            return f"{name}: {fault}"
    return ""


def check_bytes(path: Path, shard: Shard, stop: Callable[[], bool] = never_stop) -> None:
    """Compare every byte of a local shard with the index, once in the life of this process.

    Raises:
        DataError: it is missing, truncated, changed, or cannot be read.
        Stopped: ``stop`` returned True.
    """
    try:
        if is_compared(path, shard.sha256):
            return
        open_shard(path, shard).close()
        if fault := fault_of(path, shard, stop):
            raise DataError(
                f"{path}: {fault}: it was changed since it was indexed. Restore it. List the "
                f"damage with: python -m pipeline.prepare --verify {path.parent}"
            )
        remember(path, shard.sha256)
    except OSError as error:
        raise unreadable(path, error) from None
