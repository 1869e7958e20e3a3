"""Stop signals in one process: the flag, the exit of commands, the agreement of ranks."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import pytest
import torch.distributed as dist

from pipeline.runtime import signals

SENT = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]
PR_GET_PDEATHSIG = 2


def unhandled(number: int, _: FrameType | None) -> None:
    raise AssertionError(f"signal {number} reached the handler from before")


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No signal received yet, and a signal that is not handled fails the test, not pytest."""
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "_requested", bytearray(1))
    before = {number: signal.signal(number, unhandled) for number in SENT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)  # Python runs the handler before the next line


@pytest.mark.parametrize("number", SENT)
def test_a_stop_signal_sets_the_flag(number: signal.Signals) -> None:
    """And does nothing else; the first one is the one named."""
    signals.install()
    assert signals.received() is None
    send(number)
    assert signals.received() == number.name
    send(signal.SIGTERM)
    assert signals.received() == number.name


def test_the_second_interrupt_from_the_keyboard_is_immediate() -> None:
    """The first sets the flag; the second raises at once."""
    signals.install()
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_hang_up_stays_ignored_under_nohup(capsys: pytest.CaptureFixture[str]) -> None:
    """By the flag and by a command's work."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install()
    send(signal.SIGHUP)
    with signals.exit_on_interrupt("unused"):
        send(signal.SIGHUP)
    assert signals.received() is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert capsys.readouterr().err == ""


def signal_at_the_parents_death() -> int:
    """What the kernel has been asked for; asks it to forget that."""
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number))
    ctypes.CDLL(None).prctl(signals.PR_SET_PDEATHSIG, 0)
    return number.value


@pytest.fixture
def parent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The id of a process with the words of a launcher (or others), which passes for our parent."""
    words = [sys.executable, "-c", "print(flush=True); input()", *request.param]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has its own words now, no longer ours
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield process.pid
        process.kill()


@pytest.mark.parametrize(
    ("parent", "number"),
    [
        (["-m", "torch.distributed.run", "--nproc_per_node=2", "x.py"], signal.SIGTERM),
        (["/usr/bin/accelerate", "launch", "x.py"], signal.SIGTERM),
        (["bash", "torchrun.txt", "no torchrun"], 0),
    ],
    indirect=["parent"],
)
@pytest.mark.usefixtures("parent")
def test_the_kernel_is_asked_for_a_signal_when_a_launcher_dies(number: int) -> None:
    """Of no other parent: a shell may end."""
    signals.install()
    assert signal_at_the_parents_death() == number
    assert signals.received() is None


@pytest.mark.parametrize("parent", [["torchrun"]], indirect=True)
def test_a_launcher_that_died_at_once_is_noticed(
    parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the kernel was asked: the process has another parent by then."""
    ids = iter([parent, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(ids))
    signals.install()
    signal_at_the_parents_death()
    assert signals.received() == "SIGTERM"


def test_a_parent_that_cannot_be_looked_at_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc is hidden or missing."""
    monkeypatch.setattr(os, "getppid", lambda: -1)
    signals.install()
    assert (signal_at_the_parents_death(), signals.received()) == (0, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_exits_with_one_line(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 128 + n, whatever error a library makes of it; the handlers from before come back."""
    before = signal.getsignal(number)

    def library() -> None:
        try:
            send(number)
        except KeyboardInterrupt:
            raise OSError("cut short") from None

    with pytest.raises(SystemExit) as ended, signals.exit_on_interrupt("nothing was written"):
        library()
    assert ended.value.code == 128 + number
    assert capsys.readouterr() == ("", "nothing was written.\n")
    assert signal.getsignal(number) == before


def test_a_signal_from_before_the_work_prevents_it(capsys: pytest.CaptureFixture[str]) -> None:
    """It came while the command was starting; the first one decides the exit code."""
    signals.install()
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, signals.exit_on_interrupt("nothing was written"):
        pytest.fail("the work began")
    assert ended.value.code == 128 + signal.SIGUSR1
    assert capsys.readouterr().err == "nothing was written.\n"


def test_an_impatient_user_does_not_lose_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals that arrive while the line is written are ignored, and the line is flushed."""

    class Slow(io.StringIO):
        flushed = ""

        def write(self, text: str) -> int:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            return super().write(text)

        def flush(self) -> None:
            self.flushed = self.getvalue()

    monkeypatch.setattr(sys, "stderr", Slow())
    with pytest.raises(SystemExit), signals.exit_on_interrupt("nothing was written"):
        send(signal.SIGINT)
    assert isinstance(sys.stderr, Slow)
    assert sys.stderr.flushed == "nothing was written.\n"


def test_work_without_a_signal_ends_as_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Its result and its errors pass; the handlers from before come back."""
    before = [signal.getsignal(number) for number in SENT]
    with signals.exit_on_interrupt("unused"):
        assert signal.getsignal(signal.SIGTERM) not in before
    with pytest.raises(OSError, match="full"), signals.exit_on_interrupt("unused"):
        raise OSError("full")
    assert [signal.getsignal(number) for number in SENT] == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("variable", "code"), [(None, 0), ("", 0), ("75", 75), ("-1", 0), ("soon", 0)]
)
def test_a_stopped_job_exits_with_the_code_that_was_asked_for(
    variable: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 0 if none was; a finished one exits with 0 in any case."""
    monkeypatch.delenv("STOPPED_EXIT_CODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("STOPPED_EXIT_CODE", variable)
    assert signals.exit_code(finished=False) == code
    assert signals.exit_code(finished=True) == 0


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_one_process_agrees_with_itself_at_once() -> None:
    """Without a process group, in the same call."""
    agreement = signals.Agreement(1)
    assert agreement.agree(True) == (True, False)
    for stop in (False, True):
        for also in (True, False):
            assert agreement.agree(stop, also) == (stop, also)
    agreement.close()


@pytest.mark.usefixtures("group")
def test_ranks_know_the_answer_one_call_later() -> None:
    """The all-reduce runs while the step computes; `close` waits for the last one."""
    agreement = signals.Agreement(2)
    assert agreement.agree(True, False) == (False, False)
    assert agreement.agree(False, True) == (True, False)
    assert agreement.agree(False, False) == (False, True)
    assert agreement.agree(True, True) == (False, False)
    agreement.close()
    assert agreement.agree(False, False) == (False, False), "the exchange before is over"
    agreement.close()


@pytest.mark.usefixtures("group")
def test_ranks_agree_in_a_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over gloo, whatever the devices use, beside other collectives, with the time limit given."""
    made: list[dict[str, object]] = []
    groups: list[dist.ProcessGroup] = []
    used: list[dist.ProcessGroup] = []
    new_group: Callable[..., dist.ProcessGroup] = dist.new_group
    all_reduce: Callable[..., dist.Work] = dist.all_reduce

    def noted_group(**options: object) -> dist.ProcessGroup:
        made.append(options)
        groups.append(new_group(**options))
        return groups[-1]

    def noted_reduce(*arguments: object, **options: object) -> dist.Work:
        used.append(options["group"])
        return all_reduce(*arguments, **options)

    monkeypatch.setattr(dist, "new_group", noted_group)
    monkeypatch.setattr(dist, "all_reduce", noted_reduce)
    agreement = signals.Agreement(2, timedelta(seconds=77))
    agreement.agree(True, False)
    agreement.close()
    assert made == [{"backend": "gloo", "timeout": timedelta(seconds=77)}]
    assert used == groups
