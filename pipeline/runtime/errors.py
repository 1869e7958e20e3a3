"""Errors that a user can cause, and how a command ends on one.

The message of each error names the field or file, its value, what is required and what to do. A
command prints it without a traceback and exits with code 2. Other exceptions keep their traceback:
they are bugs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake in the configuration, the data, the files or the launch."""

    raised_on_all = False
    """Whether all ranks raised this error, so that only rank 0 prints it."""


class LaunchError(UserError):
    """The launch does not fit a node; one process of each such node prints the message."""


class ConfigError(UserError):
    """One or more faults in a configuration; the message lists them all."""


class DataError(UserError):
    """Shards or their index are missing, incomplete or do not belong together."""


class CorruptSample(DataError):
    """A sample cannot be decoded; the message names shard, key and offset."""


class CheckpointError(UserError):
    """No usable checkpoint, or one that does not belong to this run."""


class RunFolderError(UserError):
    """The run folder is locked by another run, read-only or full."""


class EvaluationError(UserError):
    """No comparable score can be computed from these weights, images or settings."""


class GenerationError(UserError):
    """Images, animations or exports cannot be made or written as requested."""


class NonFiniteLoss(UserError):
    """A loss or weight became NaN or infinite; no checkpoint holds it."""


SEEN_BY_ALL_RANKS = (ConfigError, CheckpointError, RunFolderError, EvaluationError, GenerationError)


@contextmanager
def exit_on_user_error(memory_advice: str = "") -> Iterator[None]:
    """Print the message of a ``UserError`` and exit with code 2, without a traceback.

    Running out of memory ends the same way. In a distributed run all ranks raise the errors in
    ``SEEN_BY_ALL_RANKS`` and those marked ``raised_on_all``: rank 0 prints them. The first process
    of each node prints a ``LaunchError``. Every other error is printed by the rank that raised it.
    A process that is no rank of a launch always prints, whatever RANK says.

    Args:
        memory_advice: which setting to lower when memory runs out, with its value.
    """
    from pipeline.runtime.environment import is_rank_of_a_launch

    try:
        yield
    except UserError as error:
        speaker = "0"
        if is_rank_of_a_launch():
            if isinstance(error, LaunchError):
                speaker = os.environ.get("LOCAL_RANK", "0")
            elif error.raised_on_all or isinstance(error, SEEN_BY_ALL_RANKS):
                speaker = os.environ.get("RANK", "0")
        if speaker == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
    except (MemoryError, RuntimeError) as error:
        if is_lost_rank(error):
            _say_lost_rank(error)
            sys.exit(1)
        if not is_out_of_memory(error):
            raise
        advice = memory_advice or "Start fewer processes, or use a machine with more memory."
        detail = str(error).partition("\n")[0] or "no more memory for Python"
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"error: out of memory{rank}: {detail}. {advice}", file=sys.stderr, flush=True)
    else:
        return
    sys.exit(USER_ERROR_EXIT_CODE)


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone or out of reach; needs no torch."""
    return type(error).__name__ == "DistBackendError" or "/gloo/transport/" in str(error)


def _say_lost_rank(error: BaseException) -> None:
    detail = str(error).partition("\n")[0].partition("] ")[2] or str(error).partition("\n")[0]
    rank = os.environ.get("RANK", "0")
    print(
        f"error: rank {rank} does not reach another rank: {detail.partition('. ')[0]}. The first "
        "failure of the other ranks' logs is the cause. Checkpoints are kept: run the same command "
        "again on all nodes.",
        file=sys.stderr,
        flush=True,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the host or a GPU is out of memory; needs no torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
