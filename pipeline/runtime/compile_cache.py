"""A cache of compiled networks that a killed process cannot spoil.

A kill inside ``torch.compile`` leaves files of 0 bytes in the cache, and torch fails at them in
every later process: "file too short" (pytorch#102539). Here each run has a cache of its own on each
node, and a process uses only what processes wrote that ended by themselves.

BASE/<run>/ lock  users/<pid>  whole.json (digest of each file of a whole cache)  cache/
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from pipeline.runtime.locks import FileLock
from pipeline.runtime.startup import can_be_written, own_temporary_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use(run_dir: Path, node: str) -> str:
    """Let torch cache what it compiles for a run in a folder of its own; call it before compiling.

    Args:
        run_dir: the run folder. All ranks of a run on one node share the cache.
        node: name of this node, because nodes may share the folder but not what was compiled.

    Returns:
        A line for the user if the folder that TORCHINDUCTOR_CACHE_DIR names cannot be used; or "".
    """
    given, line = os.environ.get(VARIABLE, ""), ""
    # When torch is imported it sets the variable itself, to torchinductor_<user>.
    base = Path(given) if given and not Path(given).name.startswith("torchinductor_") else None
    if base is not None and not can_be_written(base):
        line = f"{VARIABLE} ({base}): cannot be written; "
        base = None
    try:
        if base is None:
            base = Path(own_temporary_folder()) / "compiled"
        identity = hashlib.sha256(f"{run_dir.resolve()}\n{node}".encode()).hexdigest()
        cache = _Cache(base / f"{run_dir.name[:40]}-{identity[:12]}")
    except OSError as error:  # torch's own default stays
        return f"{base}: no cache for compiled networks ({error.strerror})"
    atexit.register(cache.leave)
    os.environ[VARIABLE] = str(cache.files)
    return f"{line}compiled networks are cached in {base}" if line else ""


class _Cache:
    """The cache of one run on this node, in use by this process until ``leave``."""

    def __init__(self, folder: Path) -> None:
        self.files, self._whole, self._users = (
            folder / "cache",
            folder / "whole.json",
            folder / "users",
        )
        self._users.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        if self._lock.acquire(wait=False):  # nobody else uses it
            if any(self._users.iterdir()) or not self._is_whole():
                for leftover in (self.files, self._users):
                    shutil.rmtree(leftover, ignore_errors=True)
                self._users.mkdir(exist_ok=True)
            self._whole.unlink(missing_ok=True)
        self._lock.acquire(shared=True)
        self.files.mkdir(exist_ok=True)
        self._mine = self._users / str(os.getpid())
        self._mine.touch()

    def leave(self) -> None:
        """Sign the cache as whole, as the last of its processes and if none of them failed."""
        if hasattr(sys, "last_type") or int(self._mine.name) != os.getpid():
            return  # an error without a message of ours, perhaps of the compiler; or a forked child
        try:
            self._mine.unlink(missing_ok=True)
            self._lock.release()
            if self._lock.acquire(wait=False) and not any(self._users.iterdir()):
                self._whole.write_text(json.dumps(self._digests()))
        except OSError:  # the next process finds no signature and compiles anew
            return

    def _is_whole(self) -> bool:
        try:
            return bool(json.loads(self._whole.read_text()) == self._digests())
        except (OSError, ValueError):
            return False

    def _digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by its path in the cache."""
        digests = {}
        for path in sorted(self.files.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                digests[str(path.relative_to(self.files))] = digest
        return digests
