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


@contextlib.contextmanager
def progress(task: str, total: int, unit: str = " images") -> Iterator[Callable[[int], None]]:
    """Show the progress of a task; yields ``advance(n)``, which counts n more units as done.

    On a terminal this is a bar with the time left. In a log file it is one line per quarter.
    """
    if sys.stderr.isatty():
        tqdm.monitor_interval = 0  # tqdm's thread would be alive in a process that forks
        with tqdm(total=total, desc=task, unit=unit, smoothing=0.1, mininterval=0.2) as bar:
            yield lambda n: bar.update(n) and None
        return
    start, done, quarters = time.monotonic(), 0, 0

    def advance(n: int) -> None:
        nonlocal done, quarters
        done += n
        if total and (quarter := 4 * done // total) > quarters:
            quarters, seconds = quarter, time.monotonic() - start
            left = seconds / done * (total - done)
            line = f"{task}: {done} of {total}{unit}, {done / max(seconds, 1e-3):.0f}/s"
            print(f"{line}, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
