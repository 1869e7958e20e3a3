"""Run tasks in forked worker processes, for commands that read or write many shards."""

from __future__ import annotations

import mmap
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context, parent_process
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from pipeline.runtime.errors import UserError
from pipeline.runtime.host import raise_open_files, remedy_for
from pipeline.runtime.signals import STOP_SIGNALS

Task = TypeVar("Task")
Result = TypeVar("Result")
REPORT_SECONDS = 0.1
CRASHES = tuple(  # Windows lacks SIGBUS
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")
    if hasattr(signal, name)
)

_work: Callable[[int], Any]
"""In a worker process: computes the task of a number."""


def map_in_processes(
    work: Callable[[Task, Callable[[int], None]], Result],
    tasks: Sequence[Task],
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Result]:
    """Return the result of ``work(task, report)`` for each task, in the order of the tasks.

    A worker takes the next task as soon as it is free, so tasks may differ in length. The workers
    end when this function returns or raises, and when this process is killed.

    Args:
        work: called in a worker. ``report(n)`` counts n more items as done. Forked workers share
            the memory of ``work`` and ``tasks``: only results are pickled.
        tasks: what to work on.
        workers: number of processes, at least 1; no more are started than there are tasks.
        advance: called in this process, about ten times a second, with the number of items that
            were reported since the last call.

    Raises:
        UserError: a worker raised it, a worker was killed, or no worker can be started.
        OSError: a worker raised it.
    """
    if not tasks:
        return []
    # Anonymous shared memory: a container's /dev/shm may be tiny. One writer per element.
    reported = np.frombuffer(mmap.mmap(-1, 8 * len(tasks)), np.int64)

    def run(number: int) -> Result:
        def report(n: int) -> None:
            reported[number] += n

        # SIGTERM may end a task, but not the sending of a result: the pool would wait for the rest.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            return work(tasks[number], report)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    futures: list[Future[Result]] = []
    others, processes = set(active_children()), set[Any]()
    count = min(workers, len(tasks))
    raise_open_files()
    with _one_message(count):
        executor = ProcessPoolExecutor(count, get_context("fork"), _start_worker, (run,))
    with _explained(processes, count), executor as pool:
        try:
            # Workers start with the signals blocked, or they would run this process's handlers.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                with _one_message(count):
                    futures += [pool.submit(_run, number) for number in range(len(tasks))]
            finally:
                processes |= set(active_children()) - others
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in futures:
                future.add_done_callback(finished.put)
            left, advanced = len(tasks), 0
            while left:
                with suppress(Empty):
                    finished.get(timeout=REPORT_SECONDS).result()
                    left -= 1
                if left and any(process.exitcode is not None for process in processes):
                    _end_results(pool, processes)
                total = int(reported.sum())
                advance(total - advanced)
                advanced = total
            return [future.result() for future in futures]
        except BaseException:
            for process in processes:  # the pool alone would wait for the tasks under way
                process.terminate()
            while wait(futures, REPORT_SECONDS).not_done:  # they fail when the first process ends
                if any(process.exitcode == -signal.SIGKILL for process in processes):
                    _end_results(pool, processes)
            for process in processes:
                process.kill()
            raise


@contextmanager
def _explained(processes: Iterable[Any], count: int) -> Iterator[None]:
    """Turn the end of a worker into a ``UserError``; the block must have waited for all of them."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError(_why_broken(processes, count)) from None


def _why_broken(processes: Iterable[Any], count: int) -> str:
    signals = [-(process.exitcode or 0) for process in processes]
    crashed = [number for number in signals if number in CRASHES]
    if crashed:
        return (
            f"a worker process crashed ({signal.Signals(crashed[0]).name}), most often in the "
            "decoder of a damaged image, which is in one of the shards that are missing. Finished "
            "shards are kept."
        )
    return (
        "a worker process was killed, most often for lack of memory. Run the same command again "
        f"with fewer --workers than {count}; finished shards are kept."
    )


@contextmanager
def _one_message(count: int) -> Iterator[None]:
    """Turn the failure to start a pool into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workers ({count}): cannot be started ({error.strerror}): "
            f"{remedy_for(error) or 'remove the cause'}, or give fewer --workers."
        ) from None


def _end_results(pool: ProcessPoolExecutor, processes: Iterable[Any]) -> None:
    """Close the pipe of results after a worker was killed.

    It may have been killed amid a result. The pool would wait for the rest, as long as any process
    could still write it.
    """
    for process in processes:
        process.kill()
    writer = getattr(getattr(pool, "_result_queue", None), "_writer", None)
    if writer is not None and not writer.closed:
        writer.close()


def _start_worker(work: Callable[[int], Any]) -> None:
    """Prepare a worker process that was just forked."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent acts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow warns about odd metadata, once per image
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Workers forked later hold this worker's pipe to the parent too: the last one ends first.
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run(number: int) -> Any:
    return _work(number)
