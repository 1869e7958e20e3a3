"""Open files behind URLs: http(s) with logins of ~/.netrc and byte ranges, others with fsspec."""

from __future__ import annotations

import base64
import contextlib
import errno
import netrc
import os
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import IO

from pipeline.runtime.errors import DataError
from pipeline.runtime.text import printable

HTTP = ("http://", "https://")
PASSING = (408, 425, 429)
"""The status codes from 400 to 499 that another attempt may not meet."""
LONGEST_REASON = 300
RANGE_REFUSED = 416
LOGIN = "Put a login into ~/.netrc (machine HOST login USER password PASSWORD)"


@contextlib.contextmanager
def open_url(url: str, timeout: float, offset: int = 0, mark: str = "") -> Iterator[IO[bytes]]:
    """Open a URL for reading: http(s) with the standard library, other schemes with fsspec.

    Args:
        url: of the file.
        timeout: seconds that an http server may be silent.
        offset: where to begin, if an http server does that; see ``open_http``.
        mark: of the file whose bytes before ``offset`` are here.

    Raises:
        DataError: the file does not exist, or the library for the scheme is not installed.
        OSError: the network failed; another attempt may succeed.
    """
    scheme = url.split("://")[0]
    if url.startswith(HTTP):
        with open_http(url, offset, mark, timeout) as response:
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


def open_http(url: str, offset: int, mark: str, timeout: float) -> HTTPResponse:
    """Return the response to a GET.

    Args:
        url: spaces and the like in it are quoted, escapes of the user are not.
        offset: bytes that are here already; 0 = ask for the whole file.
        mark: what ``mark_of`` returned for the response that brought them. If the file is another
            now, the server sends the whole of it.
        timeout: seconds that the server may be silent.

    Raises:
        DataError: the server refuses the request, and would refuse it again.
        OSError: the network failed; another attempt may succeed.
    """
    request = urllib.request.Request(urllib.parse.quote(url, safe="%:/?#[]@!$&'()*+,;=~"))
    if login := _login_for(request.host):
        # Not sent to another host that the server may redirect to.
        request.add_unredirected_header("Authorization", f"Basic {login}")
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", mark)
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == RANGE_REFUSED and offset:
            return open_http(url, 0, "", timeout)
        if error.code == 404:
            raise DataError(f"{url}: not found.") from None
        if error.code < 500 and error.code not in PASSING:
            reason = printable(" ".join(str(error.reason).split()))[:LONGEST_REASON]
            raise DataError(
                f"{url}: refused by the server ({error.code} {reason}). {LOGIN}, or give a URL "
                "that can be read without a login or a redirection to another scheme."
            ) from None
        raise
    return response


def first_byte(response: HTTPResponse, offset: int) -> int:
    """Return the place in the file of the first byte of a response: ``offset``, or 0.

    Raises:
        OSError: the response has bytes from another place.
    """
    if response.status != 206:
        return 0
    if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise OSError("the server sent other bytes than it was asked for")
    return offset


def mark_of(response: HTTPResponse) -> str:
    """Return what tells this version of a file from others, "" if the server says nothing."""
    tag = str(response.headers.get("ETag", ""))
    return tag if tag.startswith('"') else str(response.headers.get("Last-Modified", ""))


def refuse_web_page(url: str, head: bytes) -> None:
    """Raise ``DataError`` if a file begins like HTML, which no file of a shard set does."""
    if head[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"{url}: the server sent a web page in its place, as for a login or an error. {LOGIN}, "
            "or give a URL that can be read without a login."
        )


def _login_for(host: str) -> str:
    """Return "user:password" of a host in the file $NETRC or ~/.netrc, in base64; "" if none."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entries = netrc.netrc(str(path)).hosts
    except FileNotFoundError:
        return ""
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # it says nothing about the file
        reason = error.msg if isinstance(error, netrc.NetrcParseError) else str(error)
        raise DataError(
            f"{path}: cannot be read: {printable(reason)}. Mend or remove it."
        ) from None
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    user, _, password = entries.get(host) or entries.get(name) or ("", None, None)
    return base64.b64encode(f"{user}:{password}".encode()).decode() if password else ""
