"""Keep the lines that a command prints in the log.txt of its run."""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path
from typing import TextIO

_early: deque[str] = deque(maxlen=200)
_file: TextIO | None = None


class Recorder(logging.Handler):
    """A handler that writes log records to log.txt."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as its formatter shows it."""
        write_line(self.format(record))


def open_log(path: Path) -> None:
    """Append all lines from now on, and those that came before, to a file.

    Raises:
        OSError: the file cannot be written.
    """
    global _file
    _file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    while _early:
        _write(_early.popleft())


def write_line(text: str) -> None:
    """Write a line with the time to the open log, or keep it until one is open."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
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
