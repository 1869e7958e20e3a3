"""Print lines and progress to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from pipeline.runtime.log_file import write_line
from pipeline.runtime.text import printable as printable
from pipeline.runtime.text import printable_lines


def say(text: str) -> None:
    """Print a line to stderr, above the progress bar if one is shown, and to the run's log.txt.

    Names from outside cannot reach the terminal as escape codes; newlines and tabs stay.
    """
    write_line(text)
    tqdm.write(printable_lines(text), file=sys.stderr)
    sys.stderr.flush()


FIRST_LINE = 10.0
"""Seconds after which a task without a terminal says for the first time how far it is."""
MORE_LINES = 60.0
"""Seconds between two such lines."""


@contextlib.contextmanager
def progress(task: str, total: int, unit: str = " images") -> Iterator[Callable[[int], None]]:
    """Show the progress of a task; yields ``advance(n)``, which counts n more units as done.

    On a terminal this is a bar with the time left. Elsewhere it is a line after ten seconds and
    then one a minute.
    """
    if sys.stderr.isatty():
        tqdm.monitor_interval = 0  # tqdm's thread would be alive in a process that forks
        with tqdm(total=total, desc=task, unit=unit, smoothing=0.1, dynamic_ncols=True) as bar:
            yield lambda n: bar.update(n) and None
        return
    due, done = time.monotonic() + FIRST_LINE, 0
    first: tuple[float, int] | None = None  # a first call may tell what was done before

    def advance(n: int) -> None:
        nonlocal due, done, first
        now, done = time.monotonic(), done + n
        first = first or (now, done)
        if now >= due and done > first[1]:
            due = now + MORE_LINES
            rate = (done - first[1]) / max(now - first[0], 1e-3)
            left = eta((total - done) / rate)
            line = f"{task}: {done} of {total}{unit}, {rate:.3g}/s, {left}"
            print(line, file=sys.stderr, flush=True)

    yield advance


def eta(seconds: float) -> str:
    """Return the time left as text: ``eta 1:05:09``, in hours, minutes and seconds."""
    left = max(0, round(seconds))
    return f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
