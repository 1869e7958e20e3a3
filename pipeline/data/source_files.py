"""Read files and members of zip archives that may be anything: with limits, and without waiting.

A source comes from outside. A picture in it may be a link to /dev/zero, a FIFO, or a member that
unpacks to terabytes. Each function here reads at most ``LARGEST_FILE`` bytes of a regular file.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from pipeline.data.pictures import DecodeError, reason
from pipeline.runtime.documents import NOT_DAMAGE, DamagedFile, open_regular

LARGEST_FILE = 256 << 20
"""Bytes of the largest stored image that is read: a worker holds one in memory."""
METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
"""Methods whose unpacked size can be limited; zipfile unpacks whole pieces of the others."""
BROKEN_ZIP = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(NotImplementedError, ValueError, OverflowError),
)


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file; links are followed.

    Raises:
        DecodeError: it is no regular file, larger than ``LARGEST_FILE``, or gone.
        OSError: it cannot be read, which is no damage.
    """
    return read_span(path, 0, None)


def read_span(path: Path, offset: int, length: int | None) -> bytes:
    """Return ``length`` bytes of a regular file from an offset; None: all.

    Raises:
        DecodeError: it is no regular file, the span is larger than ``LARGEST_FILE``, or it is gone.
        OSError: it cannot be read, which is no damage.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a device may set it going
            raise DecodeError("is no regular file")
        if (size := status.st_size if length is None else length) > LARGEST_FILE:
            raise DecodeError(f"has {size} bytes; at most {LARGEST_FILE} are read")
        with open_regular(path) as file:
            file.seek(offset)
            return _bounded(file, LARGEST_FILE + 1 if length is None else length)
    except DamagedFile as error:
        raise DecodeError(str(error).removeprefix(f"{path}: ")) from None
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise
        raise DecodeError(str(error.strerror)) from None


def parts_of(name: str) -> list[str]:
    """Return the folders and the name of a file: a fast ``PurePosixPath.parts``."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ["/", *parts] if name.startswith("/") else parts


def suffix_of(name: str) -> str:
    """Return the ending of a file's name with its dot, "" for none: ``PurePosixPath.suffix``."""
    stem, _, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending}" if stem and ending else ""


def is_hidden(name: str) -> bool:
    """Return whether a file of an archive is hidden, or one of those that macOS adds."""
    return any(part.startswith(".") or part == "__MACOSX" for part in parts_of(name))


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive.

    Raises:
        DamagedFile: it is no readable archive.
        OSError: it cannot be read, which is no damage.
    """
    open_regular(path).close()  # not a FIFO, which zipfile would wait for
    try:
        return zipfile.ZipFile(path)
    except BROKEN_ZIP as error:
        raise DamagedFile(f"not a readable zip archive: {reason(error)}") from None


def read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return the bytes of a member of a zip archive.

    Raises:
        DecodeError: it is damaged, larger than ``LARGEST_FILE``, or packed by an unusual method.
        OSError: the archive cannot be read, which is no damage.
    """
    if entry.compress_type not in METHODS:
        raise DecodeError(f"packed by method {entry.compress_type}; unpack the archive first")
    if entry.file_size > LARGEST_FILE:
        raise DecodeError(f"has {entry.file_size} bytes; at most {LARGEST_FILE} are read")
    try:
        with archive.open(entry) as member:
            return _bounded(member, LARGEST_FILE + 1)
    except RuntimeError as error:  # encrypted, though the directory of the archive denies it
        raise DecodeError(reason(error)) from None
    except BROKEN_ZIP as error:
        raise DecodeError(reason(error)) from None


def _bounded(file: IO[bytes], length: int) -> bytes:
    """Return up to ``length`` bytes; more than ``LARGEST_FILE`` raise ``DecodeError``."""
    content = file.read(min(length, LARGEST_FILE + 1))
    if len(content) > LARGEST_FILE:
        raise DecodeError(f"has more than {LARGEST_FILE} bytes, which are not read")
    return content
