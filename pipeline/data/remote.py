"""Bytes behind a URL: opened through fsspec, tried again when the network fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import IO, TypeVar

from pipeline.runtime.errors import DataError
from pipeline.runtime.signals import Stopped

FETCH_ATTEMPTS = 4
FETCH_PAUSE = 0.5
T = TypeVar("T")


@contextlib.contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """A file to read from, closed with the block.

    Raises:
        DataError: a scheme that is not installed, or nothing there.
        ConnectionError: the network failed; another try may succeed.
    """
    import fsspec  # only remote data pays for it

    scheme = url.split("://")[0]
    try:
        opened = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: cannot open {scheme}:// ({error}); use http(s), s3 or gs and install the "
            "extra for it: pip install -e '.[http]', '.[s3]' or '.[gs]'."
        ) from None
    try:
        file = opened.open()
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec says "not found" for every failure of http too
        network = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
        if network and getattr(cause, "status", 0) != 404:
            raise ConnectionError(str(cause)) from None
        raise DataError(f"{url}: not found.") from None
    with file:
        yield file


def with_retries(url: str, transfer: Callable[[], T]) -> T:
    """Try a transfer again when the network fails; a ``DataError`` is final, and so is a stop."""
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(FETCH_PAUSE * 2.0**attempt)
        try:
            return transfer()
        except (DataError, Stopped):
            raise
        except Exception as error:  # each scheme has network errors of its own
            reason = repr(error)
    raise DataError(f"{url}: cannot be fetched: {reason}.") from None
