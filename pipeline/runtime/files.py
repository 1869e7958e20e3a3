"""Write files atomically, check output paths and hash files."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.runtime.errors import GenerationError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file through a temporary one and a rename: complete or absent after a power cut."""
    partial = _temporary(path)
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
    """Return the absolute path of a result; raise before any work if it cannot be written.

    Args:
        path: as the user gave it. ``~`` is expanded, links are followed, its folder is created.
        field: the command-line option that it came from, for messages.
        replace: allow a file that exists.
        reuse: allow anything that exists; the caller checks it.
        option: the command-line option that replaces a file, for messages.

    Raises:
        GenerationError: the path exists already or cannot be written.
    """
    try:
        path = path.expanduser().resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary(path).exists()  # raises if the name is too long
        found, is_file = path.exists(), path.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user, or a loop of links
        raise GenerationError(f"{field} ({path}): cannot be written: {error}.") from None
    if found and not (reuse or (replace and is_file)):
        remedy = "give another name" + (f", or {option}" if option and is_file else "")
        raise GenerationError(f"{field} ({path}): exists already; {remedy}.")
    if not (found and reuse) and not os.access(path.parent, os.W_OK):
        raise GenerationError(f"{field} ({path}): its folder cannot be written to; give another.")
    return path


def write_results(files: Mapping[Path, bytes], *, replace: bool = False) -> None:
    """Write all files, or none of them.

    All contents are written to temporary files first; then the files are renamed one by one. If a
    rename fails, new files are removed again, but files that were replaced are not restored.

    Args:
        files: content by path.
        replace: replace files that exist, also those created since ``check_output_path``.

    Raises:
        GenerationError: a file exists (without ``replace``) or cannot be written.
    """
    partials = {path: _temporary(path) for path in files}
    created: list[Path] = []
    try:
        for path, partial in partials.items():
            _write(partial, files[path])
        for path, partial in partials.items():
            if replace:
                os.replace(partial, path)
            else:
                _rename_new(partial, path)
                created.append(path)
    except BaseException as error:  # KeyboardInterrupt too
        for new in created:
            with suppress(OSError):
                new.unlink()
        if not isinstance(error, OSError):
            raise
        exists_now = isinstance(error, FileExistsError)
        reason = "exists now" if exists_now else f"cannot be written: {error}"
        raise GenerationError(f"--out ({path}): {reason}; give another name.") from None
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        with suppress(OSError):  # the files are written already
            sync_folder(folder)


def _temporary(path: Path) -> Path:
    """Return the path of this process's temporary file beside ``path``."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def new_file(path: Path) -> BinaryIO:
    """Open a new file for writing; what has this name is removed first, if it is no folder.

    A FIFO there would be waited for, and a link would be followed.
    """
    path.unlink(missing_ok=True)
    return path.open("xb", buffering=1 << 20)


def _write(path: Path, content: bytes) -> None:
    with new_file(path) as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _rename_new(partial: Path, path: Path) -> None:
    """Rename a file, but never replace one.

    Raises:
        FileExistsError: ``path`` exists.
    """
    try:
        os.link(partial, path)
    except FileExistsError:
        if not path.samefile(partial):  # NFS may report the link it has just made
            raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(str(path)) from None
        os.replace(partial, path)


def sync_folder(path: Path) -> None:
    """Fsync a folder, so that renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal; a FIFO or a device may never end.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        return hashlib.file_digest(file, "sha256").hexdigest()


def nearest_existing(folder: Path) -> Path:
    """Return the folder itself, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if exists(path))


def exists(path: Path) -> bool:
    """Return whether a path exists; False if the file system refuses to tell."""
    try:
        return path.exists()
    except OSError:  # a parent is no folder, or its permissions forbid it
        return False


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; False if the file system refuses to tell."""
    try:
        return path.is_dir()
    except OSError:  # its name is too long, or links form a circle
        return False
