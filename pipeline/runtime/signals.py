"""Handle stop signals: a handler sets a flag, and the ranks agree on it once a step.

Slurm sends SIGUSR2 before the time limit and SIGTERM on preemption or scancel. SIGUSR1 stops a run
too, but our scripts do not send it: NCCL may use it. The module imports nothing heavy, because
entry points call ``install`` before they import torch, which takes seconds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HANDLED = tuple(  # those that exist here: Windows, where only --help works, lacks three of them
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
STOP_SIGNALS = HANDLED[:3]
"""Signals that end a command which has no state to save."""
LAUNCHERS = (
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)
PR_SET_PDEATHSIG = 1
_received: list[str] = []  # names of the signals, in order of arrival
_requested = mmap.mmap(-1, 1)  # shared with forked processes: not 0 after the first signal


class Stopped(Exception):
    """A rank received a stop signal; raised on all ranks at the same place."""


def install() -> None:
    """Let stop signals set the flag that ``received`` reads.

    These are SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, the first Ctrl-C, and the death of a launcher.
    SIGHUP stays ignored where it is ignored, as under nohup.
    """
    for number in HANDLED:
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)
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
    """Return the name of the first stop signal that this process received, or None."""
    return _received[0] if _received else None


def requested() -> bool:
    """Return whether this process, or the one that forked it, received a stop signal.

    Data workers block the signals: only the process that forked them acts.
    """
    return _requested[0] != 0


def never_stop() -> bool:
    """Return False: the ``stop`` function of work that is not to end early."""
    return False


@contextmanager
def exit_on_interrupt(message: str) -> Iterator[None]:
    """Print ``message`` and exit with code 128 + n at SIGINT or SIGTERM (number n).

    For work of one process without a checkpoint. Errors that the interruption causes in a library
    are not shown.

    Args:
        message: one line without a full stop; it says which files exist now.
    """
    numbers = [signal.Signals[name] for name in _received]  # received during the imports

    def interrupt(number: int, _: FrameType | None) -> None:
        numbers.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # as SIGHUP under nohup
    }
    try:
        if numbers:
            raise KeyboardInterrupt
        yield
    except (KeyboardInterrupt, Exception):
        if not numbers:
            raise
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        print(f"{message}.", file=sys.stderr, flush=True)
        sys.exit(128 + numbers[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(finished: bool) -> int:
    """Return the exit code of a job: 0, or STOPPED_EXIT_CODE if it was stopped before its end.

    Kubernetes does not restart a job that exits with 0, so its image sets the variable. A launcher
    (torchrun, accelerate launch) turns every code but 0 into 1.
    """
    code = os.environ.get("STOPPED_EXIT_CODE", "")
    return 0 if finished or not code.isdecimal() else int(code)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
    _requested[0] = 1
    if number == signal.SIGINT:  # the second Ctrl-C raises KeyboardInterrupt at once
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Agreement:
    """Make all ranks agree on stop requests, and on one more flag, at the same step.

    Each call starts an all-reduce over gloo on the CPU, which runs while the device computes, and
    returns the result of the call before. So no rank waits for the device or for the network.

    Args:
        world_size: number of ranks; with 1 there is nothing to exchange.
        timeout: how long ranks may wait for each other; None = ten minutes.
    """

    def __init__(self, world_size: int, timeout: timedelta | None = None) -> None:
        self._group: Any = None
        self._work: Any = None
        self._flags: torch.Tensor | None = None
        if world_size > 1:
            import torch.distributed as dist

            waits = timeout or timedelta(minutes=10)
            self._group = dist.new_group(backend="gloo", timeout=waits)

    def agree(self, stop: bool, flag: bool = False) -> tuple[bool, bool]:
        """Return (stop, flag): True where any rank passed True.

        One process gets the values of this call, several get those of the call before.

        Args:
            stop: whether this rank wants all ranks to stop.
            flag: a second value for the caller's own use, e.g. that a checkpoint is due.
        """
        if self._group is None:
            return stop, flag
        import torch
        import torch.distributed as dist

        agreed = self._wait()
        self._flags = torch.tensor([int(stop), int(flag)])
        self._work = dist.all_reduce(
            self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def close(self) -> None:
        """Wait for the last all-reduce; every rank calls it after the same step."""
        self._wait()
        self._work = None

    def _wait(self) -> tuple[bool, bool]:
        """Return the result of the last all-reduce, (False, False) before the first."""
        if self._work is None or self._flags is None:
            return False, False
        self._work.wait()
        stop, flag = self._flags.tolist()
        return bool(stop), bool(flag)
