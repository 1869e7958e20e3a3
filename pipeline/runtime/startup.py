"""Make a command independent of what it was started with: its output, its home folder.

Output is for the user's eyes and caches save time; a run does not end because it loses one of them.
The module imports nothing heavy: it runs before everything else.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO


def prepare() -> None:
    """Guard stdout and stderr, and give libraries a folder that they can write."""
    guard_output()
    try:
        line = find_home()
    except FileNotFoundError as error:  # torch could not be imported either
        line = f"error: {error.strerror}; set TMPDIR to a folder that can be written."
    if line and os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if line.startswith("error"):
        sys.exit(2)


def guard_output() -> None:
    """Let a stdout or stderr that cannot be written lose its lines instead of raising OSError.

    The reader of a pipe may end (``2>&1 | head -1``), the disk under a log file may be full, and
    ``2>&-`` closes the stream before the command starts.
    """
    for descriptor in (0, 1, 2):  # a file opened later would get a free number and take the output
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest free number
    sys.stdout = _guarded(1, sys.stdout)
    sys.stderr = _guarded(2, sys.stderr)


def _guarded(descriptor: int, before: TextIO | None) -> TextIO:
    """Return a text stream with the settings of ``before``, which is None for a closed stream."""
    if not isinstance(before, io.TextIOWrapper):
        return Path(os.devnull).open("w")
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        before.encoding,
        before.errors,
        # An unbuffered Python (-u) writes through; a line at a time is as good to a reader.
        line_buffering=before.line_buffering or before.write_through,
    )


class _Output(io.FileIO):
    """A descriptor whose writes do not fail."""

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, or drop it; a full pipe of a slow reader is waited for."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # another process made the pipe non-blocking
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            if error.errno == errno.EPIPE:  # for ever; child processes are spared a SIGPIPE
                with contextlib.suppress(OSError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self.fileno())
                    os.close(nowhere)
        return size


def find_home() -> str:
    """Let libraries cache in a temporary folder if they cannot in the user's; "" or a line.

    Without it, they fail or fill stderr: W&B, matplotlib and the hubs of models. HOME may be unset
    with a user id that has no name, as in a container, or be read-only, as on compute nodes.

    Raises:
        FileNotFoundError: no folder for temporary files can be written either.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
        with contextlib.suppress(RuntimeError):
            os.environ["HOME"] = str(Path.home())  # by the name of the user
    home = os.environ.get("HOME", "")
    cache = os.environ.get("XDG_CACHE_HOME") or (home and f"{home}/.cache")
    if cache and can_be_written(Path(cache)):
        return ""
    folder = own_temporary_folder()
    os.environ.setdefault("HOME", folder)
    os.environ["XDG_CACHE_HOME"] = folder
    for name in ("MPLCONFIGDIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, folder)
    where = f"XDG_CACHE_HOME or HOME ({cache})" if cache else "HOME (unset)"
    return f"{where}: cannot be written; libraries cache in {folder}"


def can_be_written(folder: Path) -> bool:
    """Return whether a folder, or the nearest parent that exists, can be written."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError:  # a parent that may not be searched
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def own_temporary_folder() -> str:
    """Return a folder for this user; a new one if somebody else has made that of this name."""
    folder = Path(tempfile.gettempdir()) / f"dcgan-pipeline-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return str(folder)
    return tempfile.mkdtemp(prefix=f"{folder.name}-")
