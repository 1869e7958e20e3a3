"""Hand rows to a daemon thread, so that what it writes to cannot delay or end a run."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]


class RowQueue:
    """A bounded queue of rows and the thread that takes them; without ``start`` it does nothing.

    ``dropped`` counts the rows that found the queue full.

    Args:
        most: rows that the queue holds.
    """

    def __init__(self, most: int) -> None:
        self._rows: queue.Queue[Row | None] = queue.Queue(most)
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def start(self, work: Callable[[], None], name: str) -> None:
        """Start the thread, which calls ``take`` until that returns None."""
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the thread was started and ``close`` was not called."""
        return self._thread is not None

    def put(self, row: Row) -> None:
        """Queue a row. Drops it if the queue is full; never waits."""
        if self._thread is None:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self.dropped += 1

    def take(self) -> Row | None:
        """Return the next row, in the thread; None: there will be no more."""
        return self._rows.get()

    def close(self, seconds: float, give_up: Callable[[], None] | None = None) -> bool:
        """Wait until all rows are taken and the thread has ended; return whether it did in time.

        Args:
            seconds: how long to wait.
            give_up: called when the time is over; the thread then has two more seconds.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        deadline = time.monotonic() + seconds
        if thread.is_alive():  # it has ended if it failed
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=seconds)
        thread.join(max(0.0, deadline - time.monotonic()))
        in_time = not thread.is_alive()
        if not in_time and give_up is not None:
            give_up()
            thread.join(2.0)
        return in_time
