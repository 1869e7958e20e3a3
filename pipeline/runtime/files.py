"""Files that are there whole or not at all, and what their bytes are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.runtime.errors import GenerationError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    partial = _aside(path)
    try:
        _write(partial, content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_output_path(
    path: Path,
    field: str = "--out",
    *,
    replace: bool = False,
    reuse: bool = False,
    option: str = "",
) -> Path:
    """The absolute path of a result; refused, before any work, where it could not be put.

    Args:
        path: as the user wrote it; ``~`` is expanded, links are followed, its folder is made.
        field: the option it came from.
        replace: a file that is there may be replaced.
        reuse: what is there is looked at by the caller.
        option: which makes the command replace a file.

    Raises:
        GenerationError: something is there, or nothing can be put there.
    """
    try:
        path = path.expanduser().resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        _aside(path).exists()  # a name may be too long
        there, is_file = path.exists(), path.is_file()
    except (OSError, RuntimeError) as error:  # the latter: no such user, or links in a circle
        raise GenerationError(f"{field} ({path}): cannot be written: {error}.") from None
    if there and not (reuse or (replace and is_file)):
        remedy = "give another name" + (f", or {option}" if option and is_file else "")
        raise GenerationError(f"{field} ({path}): exists already; {remedy}.")
    if not (there and reuse) and not os.access(path.parent, os.W_OK):
        raise GenerationError(f"{field} ({path}): its folder cannot be written to; give another.")
    return path


def write_results(files: Mapping[Path, bytes], *, replace: bool = False) -> None:
    """Publish all of these files, or none; one that has appeared meanwhile is not replaced unasked.

    What was replaced is not brought back when a later one fails.

    Raises:
        GenerationError: one of them cannot be written.
    """
    partials = {path: _aside(path) for path in files}
    made: list[Path] = []
    try:
        for path, partial in partials.items():
            _write(partial, files[path])
        for path, partial in partials.items():
            if replace:
                os.replace(partial, path)
            else:
                _rename_new(partial, path)
                made.append(path)
    except BaseException as error:  # an interruption too
        for done in made:
            with suppress(OSError):
                done.unlink()
        if not isinstance(error, OSError):
            raise
        there = isinstance(error, FileExistsError)
        reason = "exists now" if there else f"cannot be written: {error}"
        raise GenerationError(f"--out ({path}): {reason}; give another name.") from None
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        with suppress(OSError):  # the files are there
            sync_folder(folder)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _rename_new(partial: Path, path: Path) -> None:
    """As ``os.rename``, but a file that is there stays.

    Raises:
        FileExistsError: there is one.
    """
    try:
        os.link(partial, path)
    except FileExistsError:
        if not path.samefile(partial):  # as NFS may say of what it has just linked itself
            raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(str(path)) from None
        os.replace(partial, path)


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


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if exists(path))


def exists(path: Path) -> bool:
    """Whether it exists, as far as one may look."""
    try:
        return path.exists()
    except OSError:  # below a folder that may not be looked into
        return False
