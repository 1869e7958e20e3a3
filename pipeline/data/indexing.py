"""Choose the tars that an index is made of, and read those behind URLs without keeping a copy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.data.locations import expanded, is_url, without_query
from pipeline.data.remote import fetch
from pipeline.runtime.errors import DataError, UserError

T = TypeVar("T")


def tars_of(source: str) -> list[str]:
    """Return the paths or URLs of the tars that SOURCE names, sorted.

    Args:
        source: a folder, a tar, or several with braces: ``s3://bucket/train-{000..127}.tar``.

    Raises:
        UserError: it names no tars, or tars of several folders.
    """
    folder = Path(source)
    if not is_url(source) and folder.is_dir():
        return sorted(str(path) for path in folder.glob("[!.]*.tar"))
    tars = sorted(set(expanded(source, "SOURCE")))
    if not all(without_query(tar).endswith(".tar") for tar in tars):
        raise UserError(
            f"SOURCE ({source}): with --index it must be a folder of tars, or name tars: "
            "s3://bucket/train-{000..127}.tar"
        )
    if any(without_query(tar) != tar for tar in tars):
        raise UserError(
            f"SOURCE ({source}): has a query, which the index would have to store. Make the index "
            "from a copy of the tars, upload it beside them, and give data.shards its URL."
        )
    if len({folder_of(tar) for tar in tars}) > 1:
        raise UserError(
            f"SOURCE ({source}): names tars of several folders. Make an index of each, and list "
            "them in data.shards."
        )
    if missing := [tar for tar in tars if not is_url(tar) and not Path(tar).is_file()]:
        raise UserError(
            f"SOURCE ({source}): {len(missing)} of its {len(tars)} tars do not exist, e.g. "
            f"{missing[0]}. Name those that do."
        )
    return tars


def folder_of(tar: str) -> str:
    """Return the absolute folder, or the URL, that a tar lies in."""
    return tar.rpartition("/")[0] if is_url(tar) else str(Path(tar).absolute().parent)


def survey_tar(tar: str, survey: Callable[[Path], T], name: Callable[[T, str, str], None]) -> T:
    """Return ``survey`` of a tar; one behind a URL is downloaded, and removed afterwards.

    Args:
        tar: path or URL.
        survey: reads a local tar.
        name: is called with the result, the path of a download, and the URL that messages are to
            name in its place.
    """
    if not is_url(tar):
        return survey(Path(tar))
    with tempfile.TemporaryDirectory(prefix="dcgan-index-") as folder:
        path = Path(folder) / tar.rpartition("/")[2]
        try:
            fetch(tar, path, None)
        except OSError as error:
            raise DataError(
                f"{tar}: cannot be kept in {folder} while it is read: {error.strerror}. Set TMPDIR "
                "to a folder with room for a tar for each of --workers."
            ) from None
        found = survey(path)
        name(found, str(path), tar)
        return found
