"""Sets of files that are written part by part, and continued after an interruption."""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.locks import FileLock

SETTINGS_NAME = "settings.json"


class FolderInUse(UserError):
    """Another process is writing the same set."""


class WorkFolder:
    """The records of a set of files while it is written: its settings and its finished parts.

    The folder holds ``settings.json``, a lock file and a marker file for each finished part. A
    marker is written after its part, so the same command, run again after an interruption, writes
    only the parts without a marker.

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
        """Whether a command has recorded its settings here."""
        return self._file.exists()

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
            write_atomic(self._file, json.dumps(self.settings, indent=1).encode())
            return
        try:
            found = json.loads(self._file.read_text())
            if not isinstance(found, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise UserError(
                f"{self._file}: is damaged. Remove {self.path.parent} and run the same command."
            ) from None
        self.refuse_differences(found, self.path.parent, self.free)

    def refuse_differences(
        self, found: dict[str, Any], folder: Path, free: Collection[str] = ()
    ) -> None:
        """Raise ``UserError`` if the settings of the set in ``folder`` are not those of this one.

        Args:
            found: the settings of that set.
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
                f"--out ({self.out}): was made with other settings:\n  "
                + "\n  ".join(differing)
                + f"\nGive another --out, or remove {folder} to make the set anew."
            )

    def marker(self, part: str) -> Path:
        """Return the marker file of a part; it exists if the part is finished."""
        return self.path / part

    def mark(self, part: str, content: bytes = b"") -> None:
        """Mark a part as finished; ``content`` is what the end of the set needs of it."""
        write_atomic(self.marker(part), content)

    def unfinished(self, parts: Iterable[str]) -> list[str]:
        """Return those of the parts that have no marker."""
        return [part for part in parts if not self.marker(part).exists()]

    def unwritable(self, error: OSError) -> UserError:
        """Return the message for an error of the file system."""
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        return UserError(
            f"--out ({self.out}): cannot be written: {reason}. Make room or change the "
            "permissions, then run the same command: it continues with the parts that are missing."
        )
