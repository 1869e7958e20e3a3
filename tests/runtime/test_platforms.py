"""The commands in a Python that lacks what only Linux has.

No Mac and no Windows machine was available. These tests take the names that CPython's documentation
gives to Linux alone (for Windows: to Unix alone) out of the standard library of every process, and
hide /proc from our own code. So they show that no code of ours needs them. They don't show what
another kernel, its PyTorch, its fork or its file systems do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPO, TIMEOUT, environment

from pipeline.runs.step_folders import committed, step_of

COMMANDS = ("train", "prepare", "evaluate", "generate", "doctor")
HIDE = """
import builtins, io, os, pathlib, select, signal, sys

def hide(module, names):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

hide(os, "sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise copy_file_range splice "
    "memfd_create eventfd pidfd_open O_DIRECT O_PATH O_TMPFILE setns unshare getrandom")
hide(signal, "sigwaitinfo sigtimedwait SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL")
hide(select, "epoll")

def ours():
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename in (pathlib.__file__, __file__):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PIPELINE)

def without_proc(function):
    def call(path=".", *args, **options):
        if not isinstance(path, int) and str(path).startswith(("/proc", "/dev/shm")) and ours():
            raise FileNotFoundError(2, "hidden by a test", str(path))
        return function(path, *args, **options)
    return call

builtins.open = io.open = without_proc(open)
os.scandir, os.listdir, os.stat = map(without_proc, (os.scandir, os.listdir, os.stat))
"""
HIDE_UNIX = """
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
hide(signal, "SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGKILL SIGALRM SIGPIPE SIGBUS sigwait setitimer "
    "pthread_sigmask pthread_kill")
hide(os, "fork forkpty register_at_fork sysconf getuid geteuid getpgid setsid killpg statvfs "
    "pread pwrite mkfifo")
"""


def without(tmp_path: Path, *hidden: str) -> dict[str, str]:
    """The environment in which each Python process begins with this code."""
    (tmp_path / "sitecustomize.py").write_text(
        f"PIPELINE = {str(REPO)!r} + '/pipeline/'\n" + "".join(hidden)
    )
    return environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}


def run(env: dict[str, str], *words: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("hidden", [(HIDE,), (HIDE, HIDE_UNIX)], ids=["macOS", "Windows"])
def test_help_is_shown_everywhere(hidden: tuple[str, ...], command: str, tmp_path: Path) -> None:
    """``--help`` of each command; nothing that it imports needs Linux or Unix."""
    code, output = run(without(tmp_path, *hidden), f"pipeline.{command}", "--help")
    assert code == 0, output
    assert output.startswith("usage: ")
    assert "Traceback" not in output


@pytest.mark.parametrize("command", COMMANDS)
def test_without_unix_a_command_says_so(command: str, tmp_path: Path, tiny_config: Path) -> None:
    """One line in place of a traceback, and the exit code of a user's mistake."""
    words = {
        "train": ("--config", tiny_config, f"run.dir={tmp_path / 'run'}"),
        "prepare": (tmp_path, "--out", tmp_path / "shards"),
        "evaluate": ("--run", tmp_path / "run"),
        "generate": ("grid", "--run", tmp_path / "run", "--out", tmp_path / "image.png"),
        "doctor": ("--config", tiny_config),
    }[command]
    code, output = run(without(tmp_path, HIDE, HIDE_UNIX), f"pipeline.{command}", *words)
    assert (code, output) == (
        2,
        "error: this needs Linux or macOS. On Windows use WSL 2 or Docker.\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.faults)])
def test_one_process_trains_and_goes_on_without_linux(
    workers: int, training_shards: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Prepare's index, a training in two halves and its samples, on the CPU."""
    env = without(tmp_path, HIDE)
    copy = tmp_path / "set"
    copy.mkdir()
    for tar in training_shards.glob("*.tar"):
        (copy / tar.name).write_bytes(tar.read_bytes())
    assert run(env, "pipeline.prepare", copy)[0] == 0
    code, output = run(env, "pipeline.prepare", "--verify", copy)
    assert code == 0, output
    run_dir = tmp_path / "run"
    settings = (f"data.shards={copy}", f"run.dir={run_dir}", f"data.workers={workers}")
    for steps in (5, 8):
        words = ("--config", tiny_config, *settings, f"train.total_steps={steps}")
        code, output = run(env, "pipeline.train", *words)
        assert code == 0, output
        assert "Traceback" not in output
        assert step_of(committed(run_dir)[-1]) == steps
    out = tmp_path / "images.npz"
    draw = ("images", "--run", run_dir, "--num", 4, "--format", "npz", "--out", out)
    code, output = run(env, "pipeline.generate", *draw)
    assert code == 0, output
    env["PYTHONPATH"] += f"{os.pathsep}{REPO / 'tests'}"
    small = ("eval.extractor=tiny_extractor:Tiny", "eval.num_images=50")
    code, output = run(
        env, "pipeline.evaluate", "--run", run_dir, *small, f"eval.cache_dir={tmp_path / 'refs'}"
    )
    assert code == 0, output
    assert "Traceback" not in output
