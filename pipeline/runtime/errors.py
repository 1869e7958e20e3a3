"""What went wrong, said once: the errors a user can cause, and how an entry point ends on one.

Every error here carries one message that names the field or file, the value found, what is
required and what to do. Entry points print it without a traceback and exit with code 2; a traceback
is kept for faults of our own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake in the input: configuration, data, files or launch."""

    raised_on_all = False
    """Whether every rank has raised this very error: rank 0 speaks for all."""


class LaunchError(UserError):
    """What was launched does not fit the machine it runs on; each node may say so."""


class ConfigError(UserError):
    """One or more faults in a configuration; the message lists them all."""


class DataError(UserError):
    """Shards or their index are missing, incomplete or do not fit together."""


class CorruptSample(DataError):
    """A sample cannot be decoded; the message names shard, key and offset."""


class CheckpointError(UserError):
    """No usable checkpoint, or one that does not belong to this run."""


class RunFolderError(UserError):
    """The run folder is locked by another run, read-only or full."""


class EvaluationError(UserError):
    """Weights, reference, images or settings from which no comparable score can be computed."""


class GenerationError(UserError):
    """Images, films or exports that cannot be made or written as asked."""


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite; no optimizer step was taken with it."""


SHARED = (ConfigError, CheckpointError, RunFolderError, EvaluationError, GenerationError)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with exit code 2 and the message alone when a ``UserError`` escapes.

    In a distributed run every rank fails on the same input with the same message. So ranks other
    than 0 stay silent when all ranks can see the fault, and all but the first of a node when it is
    the node's. A process that is no rank of a launch always speaks, whatever RANK says.
    """
    from pipeline.runtime.environment import is_rank_of_a_launch

    try:
        yield
    except UserError as error:
        speaker = "0"
        if is_rank_of_a_launch():
            if isinstance(error, LaunchError):
                speaker = os.environ.get("LOCAL_RANK", "0")
            elif error.raised_on_all or isinstance(error, SHARED):
                speaker = os.environ.get("RANK", "0")
        if speaker == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT_CODE)
