"""Work spread over processes, for the commands that read or write whole shard sets.

A task is worked on by one process and reports through its own pipe, so results never depend on the
number of processes. A worker whose parent was killed ends by itself; a worker that dies (out of
memory) ends the command with one clear message; nothing here outlives the command.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.signals import STOP_SIGNALS

Task = TypeVar("Task")
REPORT_SECONDS = 0.1


def spread(
    tasks: Sequence[Task], workers: int, work: Callable[[Task], Iterable[Any]]
) -> Iterator[Any]:
    """Every message that ``work(task)`` yields, for all tasks, in the order of arrival.

    Raises:
        UserError: raised by ``work`` itself, or a worker was killed.
        OSError: raised by ``work`` itself.
    """
    # Forked workers share the listing and the pixels in memory instead of unpickling them.
    context = multiprocessing.get_context("fork")
    processes = []
    pipes: dict[Any, Any] = {}
    try:
        for number in range(min(workers, len(tasks))):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker, args=(tasks[number::workers], work, sender, os.getpid())
            )
            # A signal between the fork and the worker's own handlers would run the parent's.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                process.start()
                processes.append(process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            sender.close()
            pipes[receiver] = process
        while pipes:
            for receiver in cast(list[Any], wait(list(pipes))):
                try:
                    message = receiver.recv()
                except EOFError:
                    _check_end(pipes.pop(receiver))
                    continue
                if isinstance(message, Exception):
                    raise message
                yield message
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _worker(
    tasks: Sequence[Task], work: Callable[[Task], Iterable[Any]], pipe: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent acts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    warnings.simplefilter("ignore")  # Pillow warns about odd metadata, once per image
    try:
        for task in tasks:
            for message in work(task):
                if os.getppid() != parent:
                    return
                pipe.send(message)
    except BrokenPipeError:
        return
    except (UserError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(error)


def _check_end(process: Any) -> None:
    process.join()
    if process.exitcode < 0:
        raise UserError(
            f"a worker was killed by signal {-process.exitcode}, most often for lack of memory; "
            "run the same command again with fewer --workers: finished shards are kept."
        )
    if process.exitcode:
        raise RuntimeError("a worker failed; its traceback is above")


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
