"""Keep the lines that a command prints in the log.txt of its run."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import deque
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import TextIO

from pipeline.runtime.text import printable_lines

_early: deque[str] = deque(maxlen=200)
_file: TextIO | None = None


class Printable(logging.Formatter):
    """A formatter of messages for a terminal, without escape codes and credentials."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return printable_lines(super().format(record))


class Recorder(logging.Handler):
    """A handler that writes log records to log.txt."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as its formatter shows it."""
        write_line(self.format(record))


def open_log(path: Path) -> None:
    """Append all lines from now on, and those that came before, to a file.

    Raises:
        OSError: the file cannot be written, or it is a link.
    """
    global _file
    file = BufferedWriter(open_to_append(path))
    _file = TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True)
    while _early:
        _write(_early.popleft())


def open_to_append(path: Path) -> FileIO:
    """Open a file for appending, without a buffer.

    A link is refused: in a folder of somebody else it may lead to any file of the user. So is what
    is no regular file, such as a FIFO, which nobody may ever read.

    Raises:
        OSError: it cannot be opened.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "is a link or no regular file; remove it", str(path))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    return FileIO(path, "ab", opener=lambda name, _: os.open(name, flags, 0o666))


def write_line(text: str) -> None:
    """Write a line with the time to the open log, or keep it until one is open."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable_lines(text)}\n"
    if _file is None:
        _early.append(line)
    else:
        _write(line)


def _write(line: str) -> None:
    global _file
    assert _file is not None
    try:
        _file.write(line)
    except OSError:  # a full disk: what matters more, such as a checkpoint, says so
        _file = None
