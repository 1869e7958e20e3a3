"""Files that are there whole or not at all, and what their bytes are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline.errors import GenerationError


def publish(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_new(path: Path, field: str = "--out") -> None:
    """Refuse a place for a result where something is or nothing can be put, before any work.

    Raises:
        GenerationError: naming the option and the place.
    """
    if path.exists():
        raise GenerationError(f"{field} ({path}): exists already; give another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenerationError(f"{field} ({path}): cannot be written: {error}.") from None
    if not os.access(path.parent, os.W_OK):
        raise GenerationError(f"{field} ({path}): its folder cannot be written to; give another.")


def sync_folder(path: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
