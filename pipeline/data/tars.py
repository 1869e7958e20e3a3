"""Read the headers of a tar that may be damaged or made to do harm.

The standard library reads headers of any length, follows chains of them by recursion and keeps all
members in memory. Here a member has few bytes of headers, and none is kept.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tarfile import BLOCKSIZE, ReadError, TarInfo

from pipeline.runtime.documents import DamagedFile, naming, open_regular

LONGEST_HEADER = 16 << 10
"""Bytes of one pax header or long name; two paths of 4096 bytes fit."""
LONGEST_HEADERS = 64 << 10
"""Bytes of all headers of one member."""
MOST_GLOBAL_HEADERS = 1000
LONGEST_PADDING = 16 << 20
"""Bytes after the end mark; tools pad to whole records."""
PAX, LONG_NAMES = (b"x", b"g", b"X"), (b"L", b"K")
"""Types of members whose content belongs to the headers of the next one."""
RECORD_LENGTH = re.compile(rb"([0-9]{1,5}) ")
LONG_NUMBER = re.compile(rb"[0-9]{4096}")
"""The standard library searches for one in a time that grows with the square of its length."""


class Tar:
    """The members of an open tar, in order.

    Args:
        file: the file that holds it.
        start, size: the span of a tar in a tar, in bytes; offsets of members count from ``start``.
    """

    def __init__(self, file: BufferedReader, start: int = 0, size: int | None = None) -> None:
        self._file, self._start = file, start
        self._end = os.fstat(file.fileno()).st_size if size is None else start + size
        self._headers = _Headers(file, start)
        self._tar = tarfile.TarFile(fileobj=self._headers)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[TarInfo]:
        """Yield each member.

        Raises:
            ReadError: a header is damaged or too long.
        """
        last = -1
        while True:
            self._headers.left = LONGEST_HEADERS
            self._tar.members.clear()  # type: ignore[attr-defined]
            if (member := self._tar.next()) is None:
                return
            if member.size < 0 or member.offset_data <= last:
                raise ReadError(f"a member of {member.size} bytes at {member.offset_data}")
            if len(self._tar.pax_headers) > MOST_GLOBAL_HEADERS:
                raise ReadError(f"more than {MOST_GLOBAL_HEADERS} global headers")
            last = member.offset_data
            yield member

    def content(self, member: TarInfo, limit: int) -> bytes:
        """Return the content of a small member.

        Raises:
            ReadError: it has more than ``limit`` bytes, or the file is cut.
        """
        if member.size > limit:
            raise ReadError(f"has {member.size} bytes, at most {limit} are read")
        content = os.pread(self._file.fileno(), member.size, self._start + member.offset_data)
        if len(content) < member.size:
            raise ReadError("is cut short")
        return content

    def require_end(self) -> None:
        """Raise ``ReadError`` unless an end mark follows the members, and little after it.

        tarfile reads a damaged header, or a cut between two members, as the end of the archive.
        """
        ends_at, descriptor = self._start + self._tar.offset, self._file.fileno()
        if os.pread(descriptor, BLOCKSIZE, ends_at) != bytes(BLOCKSIZE):
            raise ReadError(f"byte {ends_at} begins neither a member nor the end mark")
        more = self._end - ends_at
        if more > LONGEST_PADDING:
            raise ReadError(f"{more} bytes follow the last member, as if tars were joined")


class _Headers:
    """A file of which only headers are read."""

    def __init__(self, file: BufferedReader, start: int) -> None:
        self._start = start
        self._file, self.left, self._kind = file, LONGEST_HEADERS, b""

    def read(self, size: int = -1) -> bytes:
        self.left -= size
        if not 0 <= size <= LONGEST_HEADER or self.left < 0:
            raise ReadError("a header is too long")
        content = self._file.read(size)
        before, self._kind = self._kind, b""
        if before in PAX:
            _check_pax(content)
        elif before not in LONG_NAMES and size == BLOCKSIZE:
            self._kind = content[156:157]
        return content

    def seek(self, position: int) -> int:
        return self._file.seek(self._start + position) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start


def _check_pax(content: bytes) -> None:
    """Check that records fill a pax header; the standard library passes over what is damaged."""
    content, at = content.rstrip(b"\0"), 0
    while at < len(content):
        length = RECORD_LENGTH.match(content, at)
        end = at + int(length[1]) if length else at
        if end == at or content[end - 1 : end] != b"\n":
            raise ReadError("a pax header is damaged")
        at = end
    if LONG_NUMBER.search(content):
        raise ReadError("a pax header has too long a number")


@contextmanager
def open_tar(path: Path, start: int = 0, size: int | None = None) -> Iterator[Tar]:
    """Open a plain tar, or one in it; any fault of its bytes is a ``ReadError`` in the block.

    Raises:
        ReadError: it is no regular file, compressed, damaged or cut.
        OSError: it cannot be read, which is no damage.
    """
    try:
        with open_regular(path) as file, naming(path):
            file.seek(start)
            yield Tar(file, start, size)
    except tarfile.TarError as error:
        raise ReadError(str(error)) from None
    except DamagedFile as error:
        raise ReadError(str(error).removeprefix(f"{path}: ")) from None
    except FileNotFoundError:
        raise ReadError("is missing") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ReadError(error.strerror or "cannot be read") from None  # a seek to an odd offset
    except RecursionError:
        raise ReadError("headers are chained too deeply") from None
    except (ValueError, OverflowError, TypeError, KeyError, IndexError, EOFError) as error:
        raise ReadError(f"a header is damaged: {error}") from None
