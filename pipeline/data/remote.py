"""Read files behind URLs, and download them, with retries when the network fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, TypeVar

from pipeline.runtime.errors import DataError
from pipeline.runtime.signals import Stopped, never_stop

FETCH_ATTEMPTS = 4
FETCH_PAUSE = 0.5
"""Seconds; doubled before each further attempt."""
IDLE_SECONDS = 30.0
"""An http connection that brings no byte for so long has failed."""
SLOWEST = 1024
"""Bytes per second; after IDLE_SECONDS a transfer that is slower has failed."""
CHUNK = 1 << 20
PASSING = (408, 425, 429)
"""The status codes from 400 to 499 that another attempt may not meet."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


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
                raise DataError(
                    f"{url}: refused by the server ({error.code} {error.reason}). Give a URL that "
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
        file = opened.open()
    except FileNotFoundError:
        raise DataError(f"{url}: not found.") from None
    with file:
        yield file


def pieces(source: IO[bytes]) -> Iterator[bytes]:
    """Yield the bytes of an open file as they arrive.

    Raises:
        TimeoutError: it brings fewer than ``SLOWEST`` bytes per second.
    """
    start, received = time.monotonic(), 0
    while True:
        # An http response gives what is there; its ``read`` alone waits for all of a MiB.
        ready = len(source.peek()) if isinstance(source, HTTPResponse) else CHUNK
        if not (piece := source.read(ready or CHUNK)):
            return
        received += len(piece)
        yield piece
        if time.monotonic() - start > IDLE_SECONDS + received / SLOWEST:
            raise TimeoutError(f"slower than {SLOWEST} bytes per second")


def with_retries(url: str, transfer: Callable[[], T], stop: Callable[[], bool] = never_stop) -> T:
    """Return ``transfer()``, which is tried again when the network fails.

    Raises:
        DataError: ``transfer`` raised it, or all attempts failed.
        Stopped: ``transfer`` raised it, or ``stop`` returned True between two attempts.
        OSError: the disk is full.
    """
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(FETCH_PAUSE * 2.0**attempt)
            if stop():
                raise Stopped
        try:
            return transfer()
        except (DataError, Stopped):
            raise
        except Exception as error:  # each scheme has network errors of its own
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            reason = repr(error)
    raise DataError(f"{url}: cannot be fetched: {reason}.") from None


def fetch(
    url: str,
    target: Path,
    sha256: str,
    *,
    size: int | None = None,
    stop: Callable[[], bool] = never_stop,
) -> None:
    """Download a file; ``target`` appears only when all of it is on disk with the right checksum.

    Args:
        url: where the file is.
        target: its name here, in a folder that exists. Downloads in progress have names like
            ``TARGET.*.tmp``.
        sha256: the hex digest of its bytes.
        size: its number of bytes; None = unknown.
        stop: called whenever some bytes have arrived; the download ends when it returns True.

    Raises:
        DataError: it cannot be fetched, or has another checksum.
        OSError: it cannot be written.
        Stopped: ``stop`` returned True.
    """
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")

    def transfer() -> str:
        digest = hashlib.sha256()
        out.seek(0)
        out.truncate()
        with open_url(url) as source:
            for piece in pieces(source):
                if stop():
                    raise Stopped
                digest.update(piece)
                out.write(piece)
                if size is not None and out.tell() > size:
                    raise DataError(
                        f"{url}: longer than the {size} bytes of its index: another file, so "
                        "nothing was kept. Upload the right file there."
                    )
            # A connection may end early without an error; http responses count what is missing.
            missing = getattr(source, "length", 0) if size is None else size - out.tell()
        if missing and missing > 0:
            raise EOFError(f"ended {missing} bytes early")
        return digest.hexdigest()

    try:
        with partial.open("wb") as out:
            found = with_retries(url, transfer, stop)
        if found != sha256:
            raise DataError(
                f"{url}: its sha256 is {found}, must be {sha256}: damaged or another file, so "
                "nothing was kept. Upload the right file there."
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
