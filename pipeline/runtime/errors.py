"""Errors that a user can cause, and how a command ends on one.

The message of each error names the field or file, its value, what is required and what to do. A
command prints it without a traceback and exits with code 2. Other exceptions keep their traceback:
they are bugs.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.runtime.help_links import link_of
from pipeline.runtime.host import remedy_of_file
from pipeline.runtime.log_file import write_line
from pipeline.runtime.text import printable_lines

USER_ERROR_EXIT_CODE = 2
COLLAPSED_EXIT_CODE = 3


class UserError(Exception):
    """A mistake in the configuration, the data, the files or the launch."""

    raised_on_all = False
    """Whether all ranks raised this error, so that only rank 0 prints it."""
    exit_code = USER_ERROR_EXIT_CODE


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


class DamagedSnapshot(CheckpointError):
    """A snapshot is not what was exported."""


class RunFolderError(UserError):
    """The run folder is locked by another run, read-only or full."""


class EvaluationError(UserError):
    """No comparable score can be computed from these weights, images or settings."""


class GenerationError(UserError):
    """Images, animations or exports cannot be made or written as requested."""


class NonFiniteLoss(UserError):
    """A loss or weight became NaN or infinite; no checkpoint holds it."""


class Collapsed(UserError):
    """A training ended because G or D has collapsed: no mistake, so it has its own exit code."""

    exit_code = COLLAPSED_EXIT_CODE


SEEN_BY_ALL_RANKS = (ConfigError, CheckpointError, RunFolderError, EvaluationError, GenerationError)


@contextmanager
def exit_on_user_error(memory_advice: str = "") -> Iterator[None]:
    """Print the message of a ``UserError`` and exit with its code, without a traceback.

    What ``as_user_error`` knows and the loss of another rank end the same way. In a
    distributed run all ranks raise the errors in ``SEEN_BY_ALL_RANKS`` and those marked
    ``raised_on_all``: rank 0 prints them. The first process of each node prints a ``LaunchError``.
    Every other error is printed by the rank that raised it. A process that is no rank of a launch
    always prints, whatever RANK says.

    Args:
        memory_advice: which setting to lower when memory runs out, with its value.
    """
    from pipeline.runtime.environment import is_rank_of_a_launch

    if not hasattr(os, "fork"):
        print("error: this needs Linux or macOS. On Windows use WSL 2 or Docker.", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    code = USER_ERROR_EXIT_CODE
    try:
        yield
    except UserError as error:
        speaker, code = "0", error.exit_code
        if is_rank_of_a_launch():
            if isinstance(error, LaunchError):
                speaker = os.environ.get("LOCAL_RANK", "0")
            elif error.raised_on_all or isinstance(error, SEEN_BY_ALL_RANKS):
                speaker = os.environ.get("RANK", "0")
        if speaker == "0":
            _tell(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        if is_lost_rank(error):
            _report_lost_rank(error)
        elif (known := as_user_error(error, memory_advice)) is None:
            raise
        else:
            write_line("".join(traceback.format_exception(error)).rstrip())
            rank = f"rank {os.environ['RANK']}: " if is_rank_of_a_launch() else ""
            _tell(f"{rank}{known}")
    else:
        return
    sys.exit(code)


def as_user_error(error: BaseException, memory_advice: str = "") -> UserError | None:
    """Return the message for an error that the machine causes; None for another, which is a bug.

    The machine causes every ``OSError``, an allocation that fails and a data worker that dies.
    """
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        advice = memory_advice or "Start fewer processes, or use a machine with more memory."
        detail = str(error).partition("\n")[0] or "no more memory for Python"
        return UserError(f"out of memory: {detail}. {advice}")
    if isinstance(error, OSError):
        return UserError(f"{_describe(error)}: {remedy_of_file(error)}.")
    if type(error) is RuntimeError and "DataLoader worker" in str(error):
        return UserError(
            "a data worker was killed, most often for lack of memory. The last checkpoint is "
            "intact: lower data.workers or data.prefetch, and run the same command again."
        )
    return None


def _describe(error: OSError) -> str:
    """Return ``FILE: reason`` as far as the error has both."""
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{names}: {reason}" if names else reason


def _tell(message: str) -> None:
    message += link_of(message)
    write_line(f"error: {message}")
    print(f"error: {printable_lines(message)}", file=sys.stderr, flush=True)


NO_MEMORY = (
    *("DefaultCPUAllocator: can't allocate memory", "could not create a primitive"),  # torch's
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the host or a GPU is out of memory; needs no torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY))
    )


rank_timeout = "600 s"
"""How long a collective may take, and the key that says so; ``make_accelerator`` sets it."""
GLOO = ("gloo/transport", "[Rank ", "Timed out waiting", "Connection closed by peer")


def is_lost_rank(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone or does not answer."""
    name = type(error).__name__
    if name in ("DistNetworkError", "DistStoreError"):
        return True
    return name in ("DistBackendError", "RuntimeError") and any(w in str(error) for w in GLOO)


def _report_lost_rank(error: BaseException) -> None:
    """Print what happened, once where possible.

    Rank 0 speaks first, then the first rank of each other node. A launcher that sees a rank leave
    ends the other ranks of its node, which then need not speak.
    """
    from pipeline.runtime import signals

    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    time.sleep(0 if rank == "0" else 3 if local == "0" else 6)
    if rank != "0" and signals.received():
        return
    detail = (
        str(error).strip().partition("\n")[0].rpartition("] ")[2].partition(". This is")[0][:200]
    )
    print(
        f"error: rank {rank} lost another rank, or waited for it for {rank_timeout}: {detail}. "
        "See the end of the other ranks' output, then run the same command again on all "
        "nodes: training resumes from its last checkpoint. If a rank is only slow, raise "
        f"train.rank_timeout.{link_of('lost another rank')}",
        file=sys.stderr,
        flush=True,
    )
