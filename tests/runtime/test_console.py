"""Progress of a long task: a bar in a terminal, lines with the time left elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from launching import environment

from pipeline.runtime import console


def test_elsewhere_there_is_a_line_after_ten_seconds_and_then_one_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that the test moves on; what was done before is no part of the speed."""
    clock = iter([0.0, 1.0, 5.0, 11.0, 30.0, 80.0, 101.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("pack", 1000) as advance:
        for n in (500, 40, 60, 190, 200, 10):
            advance(n)
    assert capsys.readouterr().err.splitlines() == [
        "pack: 600 of 1000 images, 10/s, eta 0:00:40",
        "pack: 990 of 1000 images, 6.2/s, eta 0:00:02",
    ]


def test_a_short_task_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("pack", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar() -> None:
    """With the name of the task, the count and the unit."""
    code = """if True:
        from pipeline.runtime.console import progress
        with progress("score", 8, " tars") as advance:
            advance(3)
            advance(5)
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.run([sys.executable, "-c", code], env=environment(), stderr=theirs)
    os.close(theirs)
    shown = ""
    with suppress(OSError):  # at the end
        while True:
            shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0
    assert re.search(r"score: 100%.*8/8 .*tars/s", shown)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (-3, "0:00:00"), (59.6, "0:01:00"), (90061, "25:01:01")]
)
def test_the_time_left_is_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert console.eta(seconds) == f"eta {text}"
