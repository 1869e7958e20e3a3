"""Stop requests: a handler that only sets a flag, and ranks that agree on it once a step.

Slurm sends SIGUSR2 before the time limit and SIGTERM on preemption or scancel; NCCL may use
SIGUSR1, so it is handled but never asked for. Imports nothing heavy: ``install`` runs as the first
line of an entry point, because a signal during the seconds of importing torch must not be lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import timedelta

    import torch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends work that has no state to save."""
LAUNCHERS = (
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)
PR_SET_PDEATHSIG = 1
_received: list[str] = []


class Stopped(Exception):
    """A stop signal came; raised on all ranks at the same place."""


def install() -> None:
    """Turn SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, the first Ctrl-C and a launcher's death into a flag.

    SIGHUP stays ignored where it is ignored, as under nohup.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, _note)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _note)
    _stop_with_the_launcher()


def _stop_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher that started this process dies.

    ``accelerate launch`` does not pass a SIGTERM on, and no launcher can pass on a SIGKILL: the
    ranks would train on as orphans. Linux only. The kernel watches the thread that started this
    process, which in both launchers is the main thread. Other parents, such as a shell, may end.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return
    if any(Path(word).name in LAUNCHERS for word in words):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was asked
            _note(signal.SIGTERM, None)


def received() -> str | None:
    """Name of the first stop signal this process got, or None."""
    return _received[0] if _received else None


def never() -> bool:
    """For work that nothing but a kill ends."""
    return False


@contextmanager
def exit_on_interrupt(said: str) -> Iterator[None]:
    """End the process at the first SIGINT or SIGTERM, for work that leaves nothing to agree on.

    Exit code 128 + n and one line. An error that the interruption caused in a library is not shown.

    Args:
        said: the line, with what is true of the files then.
    """
    came = [signal.Signals[name] for name in _received]  # while the command was starting

    def interrupt(number: int, _: FrameType | None) -> None:
        came.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # as SIGHUP under nohup
    }
    try:
        if came:
            raise KeyboardInterrupt
        yield
    except (KeyboardInterrupt, Exception):
        if not came:
            raise
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        print(f"{said}.", file=sys.stderr, flush=True)
        sys.exit(128 + came[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(finished: bool) -> int:
    """Of a job that finished, or was stopped and is to be started again.

    Kubernetes takes 0 for completed and would not start a stopped job again: its image asks for
    another code in STOPPED_EXIT_CODE. Behind a launcher every code but 0 becomes 1.
    """
    asked = os.environ.get("STOPPED_EXIT_CODE", "")
    return 0 if finished or not asked.isdecimal() else int(asked)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
    if number == signal.SIGINT:  # a second Ctrl-C means now
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Agreement:
    """What any rank wants, known to all ranks at the same step.

    The all-reduce runs over gloo on the CPU while the step computes, and its result is read one
    step later: no wait for the device, none for the network. ``patience``: how long ranks may take
    to find each other.
    """

    def __init__(self, world_size: int, patience: timedelta | None = None) -> None:
        self._group: Any = None
        self._work: Any = None
        self._flags: torch.Tensor | None = None
        if world_size > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=patience)

    def agree(self, stop: bool, also: bool) -> tuple[bool, bool]:
        """(stop, also): whether any rank asked, in this call (one process) or the one before.

        Args:
            stop: this rank wants all to stop.
            also: whatever else the caller shares: a checkpoint that is due, a failure.
        """
        if self._group is None:
            return stop, also
        import torch
        import torch.distributed as dist

        agreed = self._read()
        self._flags = torch.tensor([int(stop), int(also)])
        self._work = dist.all_reduce(
            self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def close(self) -> None:
        """Finish the exchange under way; every rank calls it after the same step."""
        self._read()
        self._work = None

    def _read(self) -> tuple[bool, bool]:
        if self._work is None or self._flags is None:
            return False, False
        self._work.wait()
        stop, also = self._flags.tolist()
        return bool(stop), bool(also)
