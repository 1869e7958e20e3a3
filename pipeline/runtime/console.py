"""Print lines and progress to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm


def say(text: str) -> None:
    """One line to stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


REPORT_SECONDS = 0.1


@contextlib.contextmanager
def progress(doing: str, total: int, unit: str = " images") -> Iterator[Callable[[int], None]]:
    """A function to call with n more: a bar with the time left, or four lines in a log file."""
    if sys.stderr.isatty():
        tqdm.monitor_interval = 0  # its thread would live in a process that forks
        with tqdm(total=total, desc=doing, unit=unit, smoothing=0.1, mininterval=0.2) as bar:
            yield lambda n: bar.update(n) and None
        return
    start, done, said = time.monotonic(), 0, 0

    def update(n: int) -> None:
        nonlocal done, said
        done += n
        if total and (quarter := 4 * done // total) > said:
            said, seconds = quarter, time.monotonic() - start
            left = seconds / done * (total - done)
            line = f"{doing}: {done} of {total}{unit}, {done / max(seconds, 1e-3):.0f}/s"
            print(f"{line}, {left:.0f} s left", file=sys.stderr, flush=True)

    yield update
