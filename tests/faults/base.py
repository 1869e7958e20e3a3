"""Run the real commands on a tiny world that may be harmed, and give each case a verdict.

This process imports torch once. Each command runs in a fork of it, as ``__main__`` would run it, so
that a case takes a part of a second. It never computes with torch itself: a fork of a process with
threads may hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import secrets
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from world import World

TESTS = Path(__file__).resolve().parents[1]
REPO = TESTS.parent
COMMANDS = {
    name: f"pipeline.{name}" for name in ("train", "prepare", "evaluate", "generate", "doctor")
}
HEAVY = (
    *("pipeline.training.run", "pipeline.training.gan", "pipeline.evaluation.run_scores"),
    *("pipeline.evaluation.scorer", "pipeline.evaluation.candidates", "pipeline.data.loader"),
    *("pipeline.generation.image_sets", "pipeline.generation.figures", "pipeline.runs.preflight"),
    *("pipeline.generation.export", "webdataset", "torch_fidelity", "torchvision", "fsspec"),
    *("fsspec.implementations.local", "scipy.linalg", "tiny_extractor", "torch._dynamo"),
)
DEADLINE = 60.0
"""Seconds; a command takes less than one of them on an idle core."""
MEMORY = 3 << 30
"""Bytes that a process may allocate; a command needs a tenth of it, and torch 0.4 GB of code."""
RESIDENT = 3 << 29
"""Bytes; a process that was larger has allocated what a file asked for."""
SECRET_NAME = "DEPLOY_TOKEN"
SECRET = f"planted-{secrets.token_hex(8)}"
BAD = (
    *("names no file", "silent", "traceback", "hang, signal, memory", "secret or escape code"),
    "half-written",
)
GOOD = ("detected", "harmless")


@dataclass(frozen=True)
class Verdict:
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """One harm. ``run`` does it in a fresh world; ``name`` and the seed reproduce it."""

    part: str
    harm: str
    name: str
    run: Callable[[World, Random], Verdict]


@dataclass
class Ended:
    """How a command ended: exit code or minus signal, output, peak memory in bytes."""

    code: int
    output: str
    resident: int
    late: bool = False


def warm_up() -> None:
    """Import what the commands import, before the first fork."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    sys.path[:0] = [str(TESTS)]
    for name in (*COMMANDS.values(), *HEAVY):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class Process:
    """A command in a fork of this process, with a session of its own."""

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        *,
        limits: dict[int, int] | None = None,
        prepare: Callable[[], None] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self._out, output = os.pipe()  # no file: its size may be limited
        os.set_blocking(self._out, False)
        self._said = bytearray()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, cwd, output, limits or {}, prepare, env or {})
        os.close(output)
        self._ended: Ended | None = None

    def poll(self) -> bool:
        """Return whether it has ended."""
        if self._ended is None:
            self._listen()
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._end(status, usage)
        return self._ended is not None

    def wait(self, deadline: float = DEADLINE) -> Ended:
        """Wait for its end, which is a SIGKILL after ``deadline`` seconds."""
        end, pause = time.monotonic() + deadline, 0.001
        while not self.poll():
            if time.monotonic() > end:
                self.kill()
                assert self._ended is not None
                self._ended.late = True
            time.sleep(pause)
            pause = min(0.02, pause * 1.5)
        assert self._ended is not None
        return self._ended

    def signal(self, number: int) -> None:
        """Send a signal to the command alone, unless it has ended."""
        if not self.poll():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the command and every process of its session."""
        if self._ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            self._end(status, usage)

    def _listen(self) -> None:
        """Read what it has said, so that it never waits for a reader."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._out, 1 << 16):
                self._said += piece

    def _end(self, status: int, usage: resource.struct_rusage) -> None:
        with contextlib.suppress(ProcessLookupError):  # workers that outlived it
            os.killpg(self.pid, signal.SIGKILL)
        self._listen()
        os.close(self._out)
        text = self._said.decode(errors="backslashreplace")
        code = os.waitstatus_to_exitcode(status)
        self._ended = Ended(code, text, usage.ru_maxrss * 1024)


def _become(
    words: Sequence[str],
    cwd: Path,
    output: int,
    limits: dict[int, int],
    prepare: Callable[[], None] | None,
    env: dict[str, str],
) -> None:
    """Run a command in this new process, and end it."""
    code: object = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the suite
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.chdir(cwd)
        sys.path.insert(0, str(cwd))  # as `python -m` does
        _set_environment(cwd, env)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        from pipeline.runtime import signals, startup

        signals.install()
        startup.prepare()
        sys.argv = list(words)
        module = sys.modules[COMMANDS[words[0]]]
        for limit, value in ({resource.RLIMIT_DATA: MEMORY} | limits).items():
            resource.setrlimit(limit, (value, value))
        if prepare is not None:
            prepare()
        module.main()
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _set_environment(cwd: Path, env: dict[str, str]) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    home = cwd / "home" if (cwd / "home").is_dir() else cwd.parent / "home"
    os.environ.clear()
    os.environ |= kept | {"HOME": str(home), "TMPDIR": str(home), SECRET_NAME: SECRET} | env
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing leaves this machine
    tempfile.tempdir = None


def check_always(at: Path, ended: Ended, began: float) -> Verdict | None:
    """Return the verdict on what no command may ever do; None if it did nothing of it."""
    output = ended.output
    tail = last_line(output)
    if ended.late:
        return Verdict("hang, signal, memory", f"no end in time: {tail}")
    if ended.code < 0:
        return Verdict("hang, signal, memory", f"{signal.Signals(-ended.code).name}: {tail}")
    if ended.resident > RESIDENT:
        return Verdict("hang, signal, memory", f"{ended.resident >> 20} MiB: {tail}")
    if "Traceback (most recent" in output:
        return Verdict("traceback", tail)
    if SECRET in output:
        return Verdict("secret or escape code", "secret in the output")
    if any(ord(c) < 32 and c not in "\n\t\r" for c in output):
        return Verdict("secret or escape code", f"raw control code printed: {tail!r}")
    if (at / "owned").exists() or (at / "run" / "owned").exists():
        return Verdict("secret or escape code", "code of the file was run")
    for path in at.rglob("*"):
        status = path.lstat()
        new = stat.S_ISREG(status.st_mode) and status.st_mtime >= began - 2
        if new and status.st_size < 1 << 24 and SECRET.encode() in path.read_bytes():
            return Verdict("secret or escape code", f"secret in {path.relative_to(at)}")
    return None


def last_line(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]
    return (errors or lines or ["nothing"])[-1][:300]
