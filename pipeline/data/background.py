"""Compare the shards of a large set with their checksums while a run trains on them.

A set that is too large to be hashed before a run is hashed during it, by one process per node, in
the order in which the run reads the shards. The process takes a hundredth of the cores, and those
only where they are idle, so the run loses next to nothing. The loader asks for its result with
every batch, and waits for it, at full speed, before the last checkpoint is written.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import process_time

import numpy as np
from numpy.typing import NDArray

from pipeline.data.checksums import check_bytes
from pipeline.data.locations import is_url
from pipeline.data.order import Order
from pipeline.data.shards import Index
from pipeline.runtime.errors import DataError, UserError, as_user_error
from pipeline.runtime.host import cores
from pipeline.runtime.signals import HANDLED, Stopped

TO_DO, RIGHT, FAULTY = 0, 1, 2
LONGEST_MESSAGE = 8192
POSITIONS = 1 << 16
"""Positions of the data order that are looked at together."""
POLL_SECONDS = 0.2
SHARE, LARGEST_SHARE = 0.01, 0.1
"""Share of the cores, and of one core, that hashing may take while the run goes on."""


class BackgroundCheck:
    """A process that hashes shards; make it where the data workers are forked.

    Args:
        index: the shard set, in a local folder.
        order: the data order of the run.
        start: the position in the order at which the run begins.
    """

    def __init__(self, index: Index, order: Order, start: int) -> None:
        self.index, self.order, self.start = index, order, start
        self._states = np.frombuffer(mmap.mmap(-1, max(1, len(index.shards))), np.uint8)
        self._message, self._in_haste = mmap.mmap(-1, LONGEST_MESSAGE), mmap.mmap(-1, 1)
        self._parent = os.getpid()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._work, daemon=True, name="checksums")
        self._process.start()
        self.close = weakref.finalize(self, _end, self._process, self._parent)

    def raise_if_faulty(self) -> None:
        """Raise ``DataError`` if a shard was found to differ from the index."""
        if FAULTY in self._states:
            text = self._message[:].rstrip(b"\0").decode(errors="replace")
            raise DataError(
                f"{text} Training had begun: remove the checkpoints that were written since this "
                "start, or give a new run.dir."
            )

    def finish(self, end: int, stop: Callable[[], bool]) -> None:
        """Wait until every shard is compared that the run read before a position.

        Raises:
            DataError: one differs.
            Stopped: ``stop`` returned True.
        """
        self._hurry()
        for number in first_uses(self.index, self.order, self.start, end):
            while self._states[number] == TO_DO and self._process.is_alive():
                self.raise_if_faulty()
                if stop():
                    raise Stopped
                time.sleep(POLL_SECONDS)
            if self._states[number] == TO_DO:  # the process was killed
                self._check(number, stop)
            self.raise_if_faulty()

    def left(self, end: int) -> int:
        """Return how many shards the run read before a position that are not compared yet."""
        used = first_uses(self.index, self.order, self.start, end)
        return sum(1 for number in used if self._states[number] == TO_DO)

    def _hurry(self) -> None:
        """Let the process compute like any other from now on."""
        self._in_haste[0] = 1
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setscheduler(self._process.pid or 0, os.SCHED_OTHER, os.sched_param(0))

    def _check(self, number: int, stop: Callable[[], bool]) -> None:
        shard = self.index.shards[number]
        try:
            if not is_url(self.index.folder_of(shard)):  # ``Cache`` compares copies of others
                check_bytes(Path(self.index.place_of(shard)).expanduser(), shard, stop)
        except (UserError, OSError, MemoryError) as error:
            text = str(as_user_error(error) or error).encode()[:LONGEST_MESSAGE]
            self._message[: len(text)] = text
            self._states[number] = FAULTY
        else:
            self._states[number] = RIGHT

    def _work(self) -> None:
        """Hash the shards in the order of their first use, in the process that was forked."""
        leave_signals_to_parent()
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except (AttributeError, OSError):  # macOS, or a sandbox that forbids it
            os.nice(19)
        share, began, used = min(LARGEST_SHARE, SHARE * cores()), time.monotonic(), process_time()

        def pause() -> bool:
            """Wait until the share is not exceeded; return whether the training process is gone."""
            while not self._in_haste[0] and os.getppid() == self._parent:
                ahead = (process_time() - used) / share - (time.monotonic() - began)
                if ahead <= 0:
                    break
                time.sleep(min(ahead, POLL_SECONDS))
            return os.getppid() != self._parent

        with contextlib.suppress(Stopped):
            for number in first_uses(self.index, self.order, self.start):
                self._check(number, pause)
                if self._states[number] == FAULTY:
                    return


def _end(process: BaseProcess, parent: int) -> None:
    if os.getpid() == parent:  # not in a data worker, which has a copy of the object
        if process.is_alive():
            process.terminate()
        process.join()


def first_uses(index: Index, order: Order, start: int, end: int | None = None) -> Iterable[int]:
    """Yield the number of each shard that has samples, in the order in which a run reads them.

    Args:
        index: the shard set.
        order: the data order.
        start: the first position that the run reads.
        end: the position before which it stops; None = two epochs later, of which one is whole.
    """
    starts = index.starts
    last = start + 2 * order.num_samples
    last = last if end is None else min(last, end)
    left = {number for number, size in enumerate(index.sizes) if size}
    for begin in range(start, last, POSITIONS):
        ids: NDArray[np.int64] = order.ids(np.arange(begin, min(last, begin + POSITIONS)))
        numbers = np.searchsorted(starts, ids, side="right") - 1
        found, places = np.unique(numbers, return_index=True)
        for number in found[np.argsort(places)].tolist():
            if number in left:
                left.remove(number)
                yield number
        if not left:
            return


# -- processes of a rank --------------------------------------------------------------------------


@contextmanager
def signals_left_to_the_parent() -> Iterator[None]:
    """Block stop signals while processes are forked. They keep them blocked; the parent acts.

    DataLoader's handler of SIGCHLD is undone. It would raise wherever the main thread is when a
    worker dies, also inside a checkpoint. Without it the next batch raises.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    on_child_death = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child_death)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_: int = 0) -> None:
    """End this forked process on a SIGTERM of its parent, and of no other process."""
    threading.Thread(target=_exit_on_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    """Wait for a SIGTERM of the training process, and of no other; end the worker on it.

    The worker itself may be inside a slow download then.
    """
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
    else:  # macOS cannot tell who sent it
        signal.sigwait({signal.SIGTERM})
    os._exit(0)
