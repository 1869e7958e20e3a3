"""Tests of names from outside that are printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.runtime.console import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("\x9b2J\x7f\x85", r"\x9b2J\x7f\x85"),
        ("a\nb\tc\r", r"a\x0ab\x09c\x0d"),
        ("\u202egnp.exe\u2066\u2028", r"\u202egnp.exe\u2066\u2028"),
        (os.fsdecode(b"x\xff.png"), r"x\udcff.png"),
        ("Größe 大小 🦊 é", "Größe 大小 🦊 é"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text, shown):
    assert printable(text) == shown
    printable(text).encode()


SCRIPT = """
import sys
from pathlib import Path
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError, exit_on_user_error
from pipeline.runtime.log_file import open_log
name = "x\\x1b]0;title\\x07\\udcff.png"
open_log(Path(sys.argv[1]))
say(f"two lines:\\n\\t{name}")
with exit_on_user_error():
    raise UserError(f"two lines:\\n\\t{name}: damaged")
"""


def test_messages_and_the_log_hold_no_escape_codes(tmp_path):
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", SCRIPT, str(log)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    for text in (done.stderr, log.read_text()):
        assert text.count("two lines:\n\tx\\x1b]0;title\\x07\\udcff.png") == 2
        assert "\x1b" not in text


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_log_that_is_no_file_of_the_run_is_refused(tmp_path, kind):
    """A FIFO without a reader would hang the run; a link could lead to ~/.bashrc."""
    log, target = tmp_path / "log.txt", tmp_path / "mine"
    target.write_text("mine")
    if kind == "link":
        log.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(log)
    else:
        log.mkdir()
    code = SCRIPT.replace("open_log(", "with exit_on_user_error(): open_log(")
    command = [sys.executable, "-c", code, str(log)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert f"error: {log}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert target.read_text() == "mine"
