"""Say what became of every file of a source, and list the images that could not be read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.pictures import MISSING, UNENDED
from pipeline.data.squares import ENLARGED
from pipeline.runtime.console import printable, say
from pipeline.runtime.documents import DamagedFile, read_bytes
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import write_atomic

SKIPPED_NAME = "skipped.txt"
SKIPPED_SUM = "skipped_sha256"
"""Key of the index: the checksum of ``skipped.txt``, None if there is none."""
MOST_TYPES = 10
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


def listed_types(left_out: Mapping[str, int]) -> str:
    """Return the most frequent reasons for which files are left out, with their numbers."""
    found = Counter(left_out).most_common(MOST_TYPES + 1)
    types = [
        f"{n} {printable(suffix[:60])}"
        + (f" (pip install {MISSING[suffix]})" if suffix in MISSING else "")
        for suffix, n in found[:MOST_TYPES]
    ]
    return ", ".join([*types, *(["..."] if len(found) > MOST_TYPES else [])])


def account_of(counts: Mapping[str, Any], images: int) -> str:
    """Return in one line what became of every file of a source with ``images`` images."""
    skipped, left_out = counts.get("skipped", 0), counts.get("left_out", {})
    done = {what: n for what, n in counts.get("done", {}).items() if n}
    what_became = [f"{images - skipped} used"]
    what_became += [f"{n} of them {what}" for what, n in done.items()]
    what_became += [f"{skipped} cannot be read"] * bool(skipped)
    if left_out:
        what_became.append(f"{sum(left_out.values())} not used: {listed_types(left_out)}")
    return f"{images + sum(left_out.values())} files: {'; '.join(what_became)}"


def account(counts: dict[str, Any], images: int, out: Path, strict: bool) -> None:
    """Say in one line what became of every file of the source.

    Raises:
        DataError: ``strict``, and a file is not an image that is used as it is stored.
    """
    line, skipped, left_out = (
        account_of(counts, images),
        counts.get("skipped", 0),
        counts.get("left_out"),
    )
    done = {what: n for what, n in counts.get("done", {}).items() if n}
    if strict and skipped:
        _report(skipped, out, strict, counts.get(SKIPPED_SUM))
    if strict and (left_out or counts.get("said") or done.keys() - {ENLARGED, UNENDED}):
        more = "".join(f"\n  {line}" for line in counts.get("said", []))
        raise DataError(
            f"--strict: {line}{more}\nGive a source in which every file is an image that is "
            "used as it is stored, or leave out --strict."
        )
    _report(skipped, out, strict, counts.get(SKIPPED_SUM))
    say(f"note: {line}")


def _report(skipped: int, out: Path, strict: bool, sha256: str | None) -> None:
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
