"""Forked workers: who takes which task, and how they end."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.runtime.errors import DataError, UserError
from pipeline.runtime.process_pool import map_in_processes

Report = Callable[[int], None]


def wait_for(ready: Callable[[], object], seconds: float = 60) -> None:
    """Wait until ``ready`` is true; only a broken test waits as long as ``seconds``."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.01)


def test_results_come_in_the_order_of_the_tasks_with_any_number_of_workers() -> None:
    for workers in (1, 2, 9):
        results = map_in_processes(lambda task, _: (task, os.getpid()), "abcde", workers)
        assert [task for task, _ in results] == list("abcde")
        assert os.getpid() not in {pid for _, pid in results}
    assert map_in_processes(lambda task, _: task, [], 2) == []


def test_a_long_task_keeps_no_other_task_waiting(tmp_path: Path) -> None:
    """The first of six tasks lasts until the others are done, so one worker does all the others."""

    def work(task: int, _: Report) -> int:
        if task == 0:
            wait_for(lambda: len(list(tmp_path.iterdir())) == 5)
        else:
            (tmp_path / str(task)).touch()
        return os.getpid()

    first, *others = map_in_processes(work, range(6), 2)
    assert len(set(others)) == 1
    assert first not in others


def test_progress_moves_within_a_task(tmp_path: Path) -> None:
    """A task that ends only when its first half was shown; every item is counted once."""
    shown: list[int] = []

    def advance(n: int) -> None:
        shown.append(n)
        if sum(shown) >= 50:
            (tmp_path / "half").touch()

    def work(_: int, report: Report) -> None:
        for _ in range(50):
            report(1)
        wait_for((tmp_path / "half").exists)
        report(50)

    map_in_processes(work, [0], 1, advance)
    assert sum(shown) == 100


@pytest.mark.parametrize("kind", [DataError, OSError, ZeroDivisionError])
def test_an_error_ends_the_tasks_under_way(tmp_path: Path, kind: type[Exception]) -> None:
    """The error is raised as it is; the other worker is ended within its task."""

    def work(task: int, _: Report) -> None:
        if task:
            (tmp_path / "pid").write_text(str(os.getpid()))
            (tmp_path / "begun").touch()
            time.sleep(120)
            (tmp_path / "finished").touch()
        wait_for((tmp_path / "begun").exists)
        raise kind("task 0 failed")

    with pytest.raises(kind, match="task 0 failed"):
        map_in_processes(work, range(3), 2)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert not (tmp_path / "finished").exists()


def test_a_killed_worker_is_one_message_with_the_remedy() -> None:
    def work(task: int, _: Report) -> None:
        if task == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"lack of memory\. Run .* fewer --workers than 2"):
        map_in_processes(work, range(4), 2)


def test_a_worker_that_crashes_is_not_called_a_lack_of_memory() -> None:
    """A decoder of a damaged image may end its process."""

    def work(task: int, _: Report) -> None:
        if task == 1:
            faulthandler.disable()  # pytest's
            os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(UserError, match=r"a worker process crashed \(SIGSEGV\)"):
        map_in_processes(work, range(4), 2)


KILLED_AMID_A_RESULT = """
import os, signal, sys, threading, time
from pathlib import Path
from pipeline.runtime.errors import UserError
from pipeline.runtime.process_pool import map_in_processes

sender = Path(sys.argv[1])

def received():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

def work(task, report):
    if task:
        time.sleep(600)
    sender.write_text(str(os.getpid()))
    return bytes(1 << 30)

def kill_the_sender():
    before = received()
    while received() - before < 16 << 20:
        time.sleep(0.001)
    os.kill(int(sender.read_text()), signal.SIGKILL)

threading.Thread(target=kill_the_sender, daemon=True).start()
try:
    map_in_processes(work, range(2), 2)
except UserError as error:
    print(error)
"""


def test_a_worker_killed_amid_a_result_is_one_message_too(tmp_path: Path) -> None:
    """Some MiB of 1 GiB had come; the pool does not wait for the rest, which nobody will send."""
    words = [sys.executable, "-c", KILLED_AMID_A_RESULT, str(tmp_path / "pid")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as pool:
        try:
            output, _ = pool.communicate(timeout=120)
        finally:
            if pool.poll() is None:
                os.killpg(pool.pid, signal.SIGKILL)
    assert output.startswith("a worker process was killed, most often for lack of memory.")


LARGE_RESULTS = """
from pipeline.runtime.process_pool import map_in_processes

def work(task, report):
    report(1)
    return bytes(20_000)

def advance(n):
    if n:
        raise KeyError

for _ in range(12):
    try:
        map_in_processes(work, range(3000), 2, advance)
    except KeyError:
        print("ended")
"""


def test_an_error_while_results_are_sent_ends_the_workers() -> None:
    """A worker ended in the middle of a message would leave the parent waiting for its end."""
    words = [sys.executable, "-c", LARGE_RESULTS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("ended\n" * 12, "")


FOREVER = """
import os, sys, time
from pathlib import Path
from pipeline.runtime.process_pool import map_in_processes
from pipeline.runtime.signals import exit_on_interrupt

def work(task, report):
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(600)

with exit_on_interrupt("interrupted"):
    map_in_processes(work, range(5), 3)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_command(tmp_path: Path, number: signal.Signals) -> None:
    """Workers end within their tasks when the command is killed or interrupted."""
    words = [sys.executable, "-c", FOREVER, str(tmp_path)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as command:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
        workers = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
        command.send_signal(number)
        _, errors = command.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=60)[1]
    if number == signal.SIGKILL:
        assert command.returncode == -signal.SIGKILL
    else:
        assert (command.returncode, errors) == (128 + number, "interrupted.\n")
