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
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from pipeline.runtime.errors import UserError
from pipeline.runtime.signals import STOP_SIGNALS

Task = TypeVar("Task")


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
