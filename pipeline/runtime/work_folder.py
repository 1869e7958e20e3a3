"""Sets of files that are written part by part, and continued after an interruption."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os.path import lexists
from pathlib import Path
from typing import Any, TypeVar

from pipeline.runtime.console import say
from pipeline.runtime.documents import (
    DamagedFile,
    digest_of,
    open_regular,
    read_document,
    set_file_aside,
    write_document,
)
from pipeline.runtime.errors import UserError
from pipeline.runtime.host import remedy_of_file
from pipeline.runtime.locks import FileLock

Part = TypeVar("Part")
CONTINUE = "Finished parts are kept; run the same command again to continue."
SETTINGS_NAME = "settings.json"
FileSum = list[Any]
"""Size in bytes and SHA-256 in hexadecimal of a file, as JSON keeps them."""


class FolderInUse(UserError):
    """Another process is writing the same set."""


class WorkFolder:
    """The records of a set of files while it is written: its settings and its finished parts.

    The folder holds ``settings.json``, a lock file and a marker file for each finished part. A
    marker is written after its part, so the same command, run again after an interruption, writes
    only the parts without a marker. A marker has the sizes and checksums of its part's files and a
    checksum of its own. A part whose marker or files differ is set aside and made again.

    Args:
        path: the folder, e.g. ``OUT/.prepare``.
        out: the set as the user named it with ``--out``.
        settings: everything that decides the bytes of the set, as JSON.
        free: keys of ``settings`` that may differ between the commands that write one set.
    """

    def __init__(
        self, path: Path, out: Path, settings: dict[str, Any], free: Collection[str] = ()
    ) -> None:
        self.path, self.out, self.settings, self.free = path, out, settings, free
        self._file = path / SETTINGS_NAME

    @property
    def begun(self) -> bool:
        """Whether a command has recorded its settings here; a record may be damaged."""
        return lexists(self._file)

    @contextmanager
    def hold(self, *, shared: bool = False) -> Iterator[None]:
        """Make the folder and hold its lock.

        Args:
            shared: together with other processes that share it; wait while one holds it alone.

        Raises:
            FolderInUse: it is not ``shared`` and another process holds the lock.
            UserError: the folder cannot be made or locked.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "lock")
        except OSError as error:
            raise self.unwritable(error) from None
        with lock:
            try:
                held = lock.acquire(shared=shared, wait=shared)
            except OSError as error:
                raise self.unwritable(error) from None
            if not held:
                raise FolderInUse(
                    f"--out ({self.out}): another process is writing there. Wait for it to end, or "
                    "give another --out."
                )
            yield

    def begin(self) -> None:
        """Record the settings of a new set, or compare them with those of a set that was begun.

        Raises:
            UserError: they differ, or the record is damaged.
            OSError: they cannot be read or written.
        """
        if not self.begun:
            write_document(self._file, self.settings, indent=1)
            return
        try:
            found = read_document(self._file, must_be_sealed=True)
        except DamagedFile as error:
            raise UserError(
                f"{error}. Remove {self.path.parent} and run the same command."
            ) from None
        self.refuse_differences(found, self._file.name, self.path.parent, self.free)

    def refuse_differences(
        self, found: dict[str, Any], source: str, folder: Path, free: Collection[str] = ()
    ) -> None:
        """Raise ``UserError`` if the settings of the set in ``folder`` are not those of this one.

        Args:
            found: the settings of that set.
            source: the name of the file that has them.
            folder: what to remove to make the set anew.
            free: keys that may differ.
        """
        differing = [
            f"{key}: was {found.get(key)}, is now {value}"
            for key, value in self.settings.items()
            if key not in free and found.get(key) != value
        ]
        if differing:
            raise UserError(
                f"--out ({self.out}): was made with other settings, says {source}:\n  "
                + "\n  ".join(differing)
                + f"\nGive another --out, or remove {folder} to make the set anew."
            )

    def mark(
        self, part: str, files: Mapping[str, FileSum], document: Mapping[str, Any] | None = None
    ) -> None:
        """Mark a part as finished.

        Args:
            part: the name of its marker.
            files: what ``sum_of`` returned for each of its files, by the path below ``root``.
            document: what the end of the set needs of the part.
        """
        head = {"part": part, "settings": self._settings_digest, "files": dict(files)}
        write_document(self.path / part, head | dict(document or {}))

    def unfinished(self, parts: Iterable[str]) -> list[str]:
        """Return those of the parts that have no marker."""
        return [part for part in parts if not (self.path / part).exists()]

    def finished(
        self,
        parts: Iterable[str],
        root: Path,
        parse: Callable[[dict[str, Any]], Part],
        *,
        whole: bool = True,
    ) -> dict[str, Part]:
        """Return what the markers of the finished parts say, after reading all of their files.

        What differs from its checksum is renamed to ``NAME.damaged`` and said; its part is then
        unfinished.

        Args:
            parts: names of markers.
            root: the folder of the parts' files.
            parse: returns what is wanted of a marker's document; what it raises is damage.
            whole: False = compare the sizes of the files alone.

        Raises:
            OSError: a file cannot be read, which is no damage.
        """
        names = list(parts)
        with ThreadPoolExecutor(8) as pool:
            checks = list(pool.map(lambda part: self._check(part, root, parse, whole), names))
        for name, (_, faults) in zip(names, checks, strict=True):
            for path, fault in faults.items():
                aside = f"set aside as {set_file_aside(path).name}, " if lexists(path) else ""
                say(f"warning: {fault}: {aside}its part is made again")
            if faults:
                (self.path / name).unlink(missing_ok=True)  # it describes what is gone
        return {
            name: found for name, (found, _) in zip(names, checks, strict=True) if found is not None
        }

    def _check(
        self, part: str, root: Path, parse: Callable[[dict[str, Any]], Part], whole: bool
    ) -> tuple[Part | None, dict[Path, str]]:
        """Return what a marker says, None if its part is not finished, and each damaged file."""
        marker = self.path / part
        try:
            document = read_document(marker, must_be_sealed=True)
            if (document.get("part"), document.get("settings")) != (part, self._settings_digest):
                raise DamagedFile(f"{marker}: belongs to another set or part")
            try:
                files = {
                    _plain(name): (size, sha) for name, (size, sha) in document["files"].items()
                }
                found = parse(document)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise DamagedFile(f"{marker}: is no marker of a part: {error}") from None
        except FileNotFoundError:
            return None, {}
        except DamagedFile as error:
            return None, {marker: str(error)}
        faults = {
            root / name: fault_of(root / name, size, sha if whole else None)
            for name, (size, sha) in files.items()
        }
        damaged = {path: fault for path, fault in faults.items() if fault}
        return (None if damaged else found), damaged

    @property
    def _settings_digest(self) -> str:
        """The checksum of what decides the bytes of the set."""
        return digest_of({k: v for k, v in self.settings.items() if k not in self.free})

    def unwritable(self, error: OSError) -> UserError:
        """Return the message for an error of the file system."""
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        return UserError(
            f"--out ({self.out}): cannot be read or written: {reason}. {remedy_of_file(error)}: it "
            "continues with the parts that are missing."
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder that is no longer needed; say so if it stays."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        say(f"warning: {folder}: could not be removed ({error.strerror}); remove it by hand")


def _plain(name: str) -> str:
    """Return a name after checking that it leads to no other folder."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no plain name of a file")
    return name


def sum_of(path: Path) -> FileSum:
    """Return size and SHA-256 of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it is no regular file.
        OSError: it cannot be read, which is no damage.
    """
    with open_regular(path) as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def fault_of(path: Path, size: int, sha256: str | None) -> str:
    """Return what is wrong with a file, with its path; "" if it is the one that was written.

    Without a checksum only its size is compared.

    Raises:
        OSError: it cannot be read, which is no damage.
    """
    try:
        if path.stat().st_size != size:  # before a file that was made huge is read
            return f"{path}: has {path.stat().st_size} bytes, not {size}"
        if sha256 is None:
            return "" if path.is_file() else f"{path}: is no regular file"
        return (
            "" if sum_of(path) == [size, sha256] else f"{path}: is damaged (its checksum differs)"
        )
    except FileNotFoundError:
        return f"{path}: is missing"
    except DamagedFile as error:
        return str(error)
