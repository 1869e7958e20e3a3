"""Read files behind URLs, and download them, with retries when the network fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event
from typing import IO, TypeVar

from pipeline.runtime.errors import DataError
from pipeline.runtime.signals import Stopped, requested
from pipeline.runtime.text import printable

FETCH_ATTEMPTS = 4
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
PASSING = (408, 425, 429)
"""The status codes from 400 to 499 that another attempt may not meet."""
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


@contextlib.contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """Open a URL for reading: http(s) with the standard library, other schemes with fsspec.

    Raises:
        DataError: the file does not exist, or the library for the scheme is not installed.
        OSError: the network failed; another attempt may succeed.
    """
    scheme = url.split("://")[0]
    if scheme in ("http", "https"):
        try:
            # Quotes spaces and the like in the names of files, but no escapes of the user.
            quoted = urllib.parse.quote(url, safe="%:/?#[]@!$&'()*+,;=~")
            response = urllib.request.urlopen(quoted, timeout=IDLE_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise DataError(f"{url}: not found.") from None
            if error.code < 500 and error.code not in PASSING:
                reason = printable(" ".join(str(error.reason).split()))[:LONGEST_REASON]
                raise DataError(
                    f"{url}: refused by the server ({error.code} {reason}). Give a URL that "
                    "can be read without a login or a redirection to another scheme."
                ) from None
            raise
        with response:
            yield response
        return
    import fsspec  # only remote data pays for it

    try:
        opened = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: cannot open {scheme}:// ({error}). Use http(s), s3 or gs; s3 and gs need "
            "pip install -e '.[s3]' or '.[gs]'."
        ) from None
    try:
        if scheme == "file" and not stat.S_ISREG(Path(opened.path).stat().st_mode):
            raise DataError(f"{url}: is no regular file.")
        file = opened.open()
    except FileNotFoundError:
        raise DataError(f"{url}: not found.") from None
    with file:
        yield file


class Transfer:
    """The bytes of a URL, read by a thread of its own so that every wait for them is bounded.

    No timeout of a library bounds all of its waits: a name server, headers that drip, a client with
    retries of its own. The thread is left behind when it brings nothing for too long or a stop is
    requested. It ends as soon as its own wait ends, and does not keep the process alive.
    """

    def __init__(self, url: str) -> None:
        self.url, self.missing = url, 0
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
                received, last = received + len(piece), now
                yield piece
                if now - start > IDLE_SECONDS + received / SLOWEST:
                    raise TimeoutError(f"slower than {SLOWEST} bytes per second")
        finally:
            self._left.set()

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def _read(self) -> None:
        try:
            with open_url(self.url) as source:
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
    url: str, transfer: Callable[[], T], stop: Callable[[], bool] = raise_on_stop
) -> T:
    """Return ``transfer()``, which is tried again when the network fails.

    Raises:
        DataError: ``transfer`` raised it, or all attempts failed.
        Stopped: ``transfer`` raised it, or ``stop`` returned True between two attempts.
        OSError: a file cannot be written.
    """
    for attempt in range(FETCH_ATTEMPTS):
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
    raise DataError(
        f"{url}: cannot be fetched: {reason}. See that its server answers, then run the same "
        "command again."
    ) from None


def fetch(
    url: str,
    target: Path,
    sha256: str,
    *,
    size: int | None = None,
    stop: Callable[[], bool] = raise_on_stop,
) -> None:
    """Download a file; ``target`` appears only when all of it is on disk with the right checksum.

    Args:
        url: where the file is.
        target: its name here, in a folder that exists. Downloads in progress have names like
            ``TARGET.*.tmp``.
        sha256: the hex digest of its bytes.
        size: its number of bytes; None = unknown.
        stop: called about five times a second; the download ends when it returns True.

    Raises:
        DataError: it cannot be fetched, or has another checksum.
        OSError: it cannot be written.
        Stopped: ``stop`` returned True.
    """
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")

    most = LARGEST if size is None else size

    def transfer() -> str:
        digest, source = hashlib.sha256(), Transfer(url)
        out.seek(0)
        out.truncate()
        for piece in source.pieces(stop):
            digest.update(piece)
            out.write(piece)
            if out.tell() > most:
                raise DataError(
                    f"{url}: longer than the {most} bytes of its index: another file, so "
                    "nothing was kept. Upload the right file there."
                )
        if missing := max(0, source.missing if size is None else size - out.tell()):
            raise EOFError(f"ended {missing} bytes early")
        return digest.hexdigest()

    try:
        with partial.open("wb") as out:
            found = with_retries(url, transfer, stop)
            out.flush()
            os.fsync(out.fileno())  # a power cut would leave a file of this size without content
        if found != sha256:
            raise DataError(
                f"{url}: its sha256 is {found}, must be {sha256}: damaged or another file, so "
                "nothing was kept. Upload the right file there."
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
