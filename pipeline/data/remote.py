"""Read files behind URLs, and download them, with retries when the network fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event
from typing import TypeVar

from pipeline.data.url_files import HTTP, first_byte, mark_of, open_url, refuse_web_page
from pipeline.runtime.errors import DataError
from pipeline.runtime.signals import Stopped, requested
from pipeline.runtime.text import printable

FETCH_ATTEMPTS = 4
"""After so many in a row that brought nothing new, a file cannot be fetched."""
FETCH_PAUSE = 0.5
"""Seconds; doubled before each further attempt."""
IDLE_SECONDS = 30.0
"""A transfer that brings no byte for so long has failed."""
OTHER_IDLE = 4
"""Times as long for other schemes than http, which read ahead in blocks of MiB."""
POLL_SECONDS = 0.2
SLOWEST = 1024
"""Bytes per second; after IDLE_SECONDS a transfer that is slower has failed."""
CHUNK = 1 << 20
LOCAL_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
"""Faults of this machine, which no other attempt mends."""
QUEUED = 8
LARGEST = 16 << 30
"""Bytes of the largest file of unknown size."""
LONGEST_REASON = 300
STOP_SECONDS = 10.0
"""How long a running training waits for a shard after a stop request."""
T = TypeVar("T")


def raise_on_stop() -> bool:
    """Raise ``DataError`` after a stop signal: for callers without a stop function of their own.

    Returns:
        False, as long as there was none.
    """
    if requested():
        raise DataError(
            "a stop was requested while a server was waited for: run the same command again."
        )
    return False


class Patience:
    """The stop function of downloads amid a training, which may bring its last step to an end."""

    def __init__(self) -> None:
        self._since = 0.0

    def __call__(self) -> bool:
        if not requested():
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > STOP_SECONDS


class Transfer:
    """The bytes of a URL, read by a thread of its own so that every wait for them is bounded.

    No timeout of a library bounds all of its waits: a name server, headers that drip, a client with
    retries of its own. The thread is left behind when it brings nothing for too long or a stop is
    requested. It ends as soon as its own wait ends, and does not keep the process alive.

    Args:
        url: of the file.
        offset: bytes that are here already; ``start`` says whether the server goes on behind them.
        mark: of the file that they are of, as an earlier transfer had it.
    """

    def __init__(self, url: str, offset: int = 0, mark: str = "") -> None:
        self.url, self.missing = url, 0
        self.start, self.mark, self._asked = 0, "", (offset, mark)
        self._pieces: Queue[bytes | BaseException] = Queue(QUEUED)
        self._left = Event()

    def pieces(self, stop: Callable[[], bool]) -> Iterator[bytes]:
        """Yield the bytes as they arrive.

        Raises:
            DataError: the file does not exist, or cannot be opened with this URL.
            TimeoutError: no byte came for ``IDLE_SECONDS``, or fewer than ``SLOWEST`` a second.
            Stopped: ``stop`` returned True.
            OSError: the network failed.
        """
        if stop():
            raise Stopped
        threading.Thread(target=self._read, daemon=True, name=f"read {self.url}").start()
        start = last = time.monotonic()
        received = 0
        try:
            while True:
                if stop():
                    raise Stopped
                now = time.monotonic()
                try:
                    piece = self._pieces.get(timeout=POLL_SECONDS)
                except Empty:
                    if now - last > IDLE_SECONDS * (1 if self._is_http else OTHER_IDLE):
                        raise TimeoutError(f"no byte for {now - last:.0f} seconds") from None
                    continue
                if isinstance(piece, BaseException):
                    raise piece
                if not piece:
                    return
                if not received and self._is_http and not self.start:
                    refuse_web_page(self.url, piece)
                received, last = received + len(piece), now
                yield piece
                if now - start > IDLE_SECONDS + received / SLOWEST:
                    raise TimeoutError(f"slower than {SLOWEST} bytes per second")
        finally:
            self._left.set()

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(HTTP)

    def _read(self) -> None:
        try:
            with open_url(self.url, IDLE_SECONDS, *self._asked) as source:
                if isinstance(source, HTTPResponse):
                    self.start, self.mark = first_byte(source, self._asked[0]), mark_of(source)
                # An http response gives what is there; its ``read`` waits for all of a MiB.
                read = source.read1 if isinstance(source, HTTPResponse) else source.read
                while self._put(piece := read(CHUNK)) and piece:
                    pass
                # A connection may end early without an error.
                self.missing = getattr(source, "length", 0) or 0
            self._put(b"")
        except BaseException as error:
            self._put(error)

    def _put(self, piece: bytes | BaseException) -> bool:
        """Hand a piece over; return False if nobody waits for it any more."""
        while not self._left.is_set():
            with contextlib.suppress(Full):
                self._pieces.put(piece, timeout=POLL_SECONDS)
                return True
        return False


def read_url(url: str, limit: int, stop: Callable[[], bool] = raise_on_stop) -> bytes:
    """Return all bytes of a small file behind a URL.

    Raises:
        DataError: it cannot be read, or has more than ``limit`` bytes.
        Stopped: ``stop`` returned True.
    """

    def transfer() -> bytes:
        source, content = Transfer(url), bytearray()
        for piece in source.pieces(stop):
            content += piece
            if len(content) > limit:
                raise DataError(
                    f"{url}: has more than {limit} bytes, which is too much for this file. Upload "
                    "the right file there."
                )
        if source.missing:
            raise EOFError(f"ended {source.missing} bytes early")
        return bytes(content)

    return with_retries(url, transfer, stop)


def with_retries(
    url: str,
    transfer: Callable[[], T],
    stop: Callable[[], bool] = raise_on_stop,
    arrived: Callable[[], int] = int,
) -> T:
    """Return ``transfer()``, which is tried again when the network fails.

    Args:
        url: for messages.
        transfer: the work.
        stop: see ``fetch``.
        arrived: returns the most bytes that were here at a time. As long as they grow from attempt
            to attempt, further ones are made.

    Raises:
        DataError: ``transfer`` raised it, or all attempts failed.
        Stopped: ``transfer`` raised it, or ``stop`` returned True between two attempts.
        OSError: a file cannot be written.
    """
    attempt, before = 0, -1
    while attempt < FETCH_ATTEMPTS:
        if attempt:
            pause = time.monotonic() + FETCH_PAUSE * 2.0**attempt
            while True:
                if stop():
                    raise Stopped
                if (left := pause - time.monotonic()) <= 0:
                    break
                time.sleep(min(left, POLL_SECONDS))
        try:
            return transfer()
        except (DataError, Stopped, MemoryError):
            raise
        except Exception as error:  # each scheme has network errors of its own
            cause = getattr(error, "reason", error)  # urllib wraps those of sockets
            if isinstance(cause, OSError) and cause.errno in LOCAL_ERRORS:
                raise cause from None
            reason = printable(repr(error)[:LONGEST_REASON])
        attempt = attempt + 1 if arrived() <= before else 1
        before = arrived()
    raise DataError(
        f"{url}: cannot be fetched: {reason}. See that its server answers, then run the same "
        "command again."
    ) from None


def fetch(
    url: str,
    target: Path,
    sha256: str | None,
    *,
    size: int | None = None,
    stop: Callable[[], bool] = raise_on_stop,
) -> None:
    """Download a file; ``target`` appears only when all of it is on disk with the right checksum.

    A transfer that ends early goes on where it ended, if the server knows byte ranges and says that
    the file is still the same.

    Args:
        url: where the file is.
        target: its name here, in a folder that exists. Downloads in progress have names like
            ``TARGET.*.tmp``.
        sha256: the hex digest of its bytes; None = unknown.
        size: its number of bytes; None = unknown.
        stop: called about five times a second; the download ends when it returns True.

    Raises:
        DataError: it cannot be fetched, or has another checksum.
        OSError: it cannot be written.
        Stopped: ``stop`` returned True.
    """
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")

    most = LARGEST if size is None else size
    digest, mark, furthest = hashlib.sha256(), "", 0

    def transfer() -> str:
        nonlocal digest, mark, furthest
        source, begun = Transfer(url, out.tell() if mark else 0, mark), False
        try:
            for piece in source.pieces(stop):
                if not begun and source.start != out.tell():
                    digest = hashlib.sha256()
                    out.seek(0)
                    out.truncate()
                begun = True
                digest.update(piece)
                out.write(piece)
                furthest = max(furthest, out.tell())
                if out.tell() > most:
                    raise DataError(
                        f"{url}: longer than the {most} bytes of its index: another file, so "
                        "nothing was kept. Upload the right file there."
                    )
        finally:
            mark = source.mark if begun else mark
        if missing := max(0, source.missing if size is None else size - out.tell()):
            raise EOFError(f"ended {missing} bytes early")
        return digest.hexdigest()

    try:
        with partial.open("wb") as out:
            found = with_retries(url, transfer, stop, lambda: furthest)
            out.flush()
            os.fsync(out.fileno())  # a power cut would leave a file of this size without content
        if sha256 not in (None, found):
            raise DataError(
                f"{url}: its sha256 is {found}, must be {sha256}: damaged or another file, so "
                "nothing was kept. Upload the right file there."
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
