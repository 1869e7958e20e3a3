"""Write and show the list of the images that could not be read, ``skipped.txt``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.console import printable, say
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import write_atomic

SKIPPED_NAME = "skipped.txt"
MOST_LISTED = 10
"""Unreadable images named in the warning; ``skipped.txt`` lists all of them."""


def write_list(out: Path, skipped: Sequence[tuple[str, str]]) -> str | None:
    """Write (name, reason) of each image, if there is one; return the SHA-256 of the file.

    Raises:
        OSError: it cannot be written.
    """
    if not skipped:
        return None
    lines = [f"{printable(name)}\t{printable(why)}\n" for name, why in skipped]
    content = "".join(lines).encode()
    write_atomic(out / SKIPPED_NAME, content)
    return hashlib.sha256(content).hexdigest()


def report(skipped: int, out: Path, strict: bool, sha256: str | None) -> None:
    """Warn about images that could not be read, or raise ``DataError`` if ``strict``.

    Args:
        skipped: their number.
        out: the folder of the list.
        strict: whether they are an error.
        sha256: of the list, if it is known.
    """
    if not skipped:
        return
    file, lines = out / SKIPPED_NAME, list[str]()
    try:
        content = read_bytes(file)
    except FileNotFoundError:
        say(f"warning: {file}: is missing, which listed the images that cannot be read")
    except DamagedFile as error:
        say(f"warning: {error}")
    else:
        lines = content.decode(errors="replace").splitlines()
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            say(f"warning: {file}: was changed since it was written (its checksum differs)")
    more = [f"... {len(lines) - MOST_LISTED} more in {file}"] if len(lines) > MOST_LISTED else []
    text = f"{skipped} images cannot be read, listed in {file}:\n  " + "\n  ".join(
        [line.replace("\t", ": ") for line in lines[:MOST_LISTED]] + more
    )
    if strict:
        raise DataError(f"--strict: {text}\nRepair or remove them, or leave out --strict.")
    say(f"warning: {text}")
