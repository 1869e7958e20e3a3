"""What lies around a run: its output, home folder, W&B, caches, folder and the other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import REPO, TIMEOUT, command, environment

pytestmark = [pytest.mark.slow, pytest.mark.faults]
Settings = Callable[..., list[str]]
# Root without its rights to write, but with that to read: Python may be installed in a home folder.
NOBODY = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
NOBODY += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]


@pytest.fixture
def words(tiny_config: Path, training_settings: list[str], tmp_path: Path) -> Settings:
    """The command of a training in ``tmp_path/run``."""

    def of(*more: str, processes: int = 1) -> list[str]:
        folder = f"run.dir={tmp_path / 'run'}"
        return command(processes, tiny_config, *training_settings, folder, *more)

    return of


def in_shell(line: str, words: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which ``"$@"`` is the command."""
    return subprocess.run(
        ["bash", "-c", line, "bash", *words],
        cwd=REPO,
        env=environment() | env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


# -- output -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "redirection",
    [
        '"$@" 2>&1 | head -1; exit "${PIPESTATUS[0]}"',
        '"$@" 2>&1 | true; exit "${PIPESTATUS[0]}"',
        '"$@" 2>&-',
        '"$@" >&- 2>&- <&-',
        '"$@" >/dev/full 2>&1',
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_outlives_its_output(
    redirection: str, processes: int, words: Settings, tmp_path: Path
) -> None:
    """A closed pipe, a stream closed from the start and a full disk cost lines of output only."""
    result = in_shell(redirection, words("tracking.wandb=offline", processes=processes))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "FINISHED").read_text() == "24"
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("redirection", ['"$@" >/dev/full', '"$@" >&-', '"$@" 2>&1 | head -1'])
@pytest.mark.parametrize("name", ["train", "prepare", "evaluate", "generate", "doctor"])
def test_lost_output_is_no_failure_of_any_command(name: str, redirection: str) -> None:
    """Also what Python writes when it ends: the exit code is that of the work, not 120."""
    line = f'{redirection}; exit "${{PIPESTATUS[0]}}"'
    result = in_shell(line, [sys.executable, "-m", f"pipeline.{name}", "--help"])
    assert result.returncode == 0, result.stderr
    assert "Error" not in result.stderr


def test_a_mistake_keeps_its_exit_code_without_output(words: Settings) -> None:
    for redirection in (">&- 2>&-", ">/dev/full 2>&1"):
        assert in_shell(f'"$@" {redirection}', words("optim.g_lr=fast")).returncode == 2


def test_a_pipe_that_does_not_block_loses_nothing(words: Settings) -> None:
    """Another program at the pipe may have made it so; a reader that is late gets every line."""
    script = "import os, sys; from pipeline.runtime import startup; startup.guard_output()"
    script += "; os.set_blocking(1, False); [print('x' * 99) for _ in range(20_000)]"
    result = in_shell('"$@" | (sleep 1; cat)', [sys.executable, "-c", script])
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("x" * 99 + "\n") * 20_000


# -- home folder --------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> list[str]:
    """Words before a command that run it as a user without a name and without rights."""
    probe = [*NOBODY, sys.executable, "-c", "import torch"]
    if os.geteuid() != 0 or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("becoming another user needs root and setpriv")
    return NOBODY


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can write; those of pytest are for their owner."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("home", ["unset", "empty", "missing", "read-only"])
def test_a_run_needs_no_home(home: str, words: Settings, nobody: list[str], public: Path) -> None:
    """W&B logs without one, and one line says where libraries cache; none of theirs follows."""
    line = {
        "unset": 'unset HOME; "$@"',
        "empty": 'HOME= "$@"',
        "missing": 'HOME=/nonexistent "$@"',
        "read-only": 'HOME=/proc "$@"',
    }[home]
    settings = ("tracking.wandb=offline", "train.total_steps=5", f"run.dir={public}/run")
    result = in_shell(line, [*nobody, *words(*settings)], TMPDIR=str(public))
    assert result.returncode == 0, result.stderr
    assert (public / "run" / "FINISHED").exists()
    assert len(list((public / "run").glob("wandb/offline-run-*/*.wandb"))) == 1, result.stderr
    line = f"cannot be written; libraries cache in {public}/dcgan-pipeline-12345"
    assert result.stderr.count(line) == 1, result.stderr
    for word in ("ERROR", "INFO", "arning", "ermission", "Traceback"):
        assert word not in result.stderr, result.stderr


def test_a_cache_that_somebody_else_made_is_not_used(nobody: list[str], public: Path) -> None:
    """Files there could be another user's; a folder of that name with other owner is passed by."""
    (public / "dcgan-pipeline-12345").mkdir()
    run = [*nobody, sys.executable, "-m", "pipeline.train", "--help"]
    result = in_shell('HOME=/nonexistent "$@"', run, TMPDIR=str(public))
    assert result.returncode == 0, result.stderr
    assert f"{public}/dcgan-pipeline-12345-" in result.stderr


def test_no_temporary_folder_is_refused(words: Settings, nobody: list[str], public: Path) -> None:
    """As in a container with a read-only root, where PyTorch cannot even be imported."""
    mounts = (
        f"mount --bind {public} /mnt && mount --bind /tmp /tmp && mount -o remount,bind,ro /tmp"
    )
    mounts += " && mount -t tmpfs -o ro none /var/tmp"
    if in_shell('unshare -m bash -c "$1"', [mounts]).returncode:
        pytest.skip("a read-only /tmp needs the right to mount")
    run = words("tracking.wandb=auto", "train.total_steps=5", "run.dir=/mnt/run")
    line = f'unset HOME TMPDIR; unshare -m bash -c \'{mounts} && exec "$@"\' bash "$@"'
    result = in_shell(line, [*nobody, *run])
    assert result.returncode == 2
    assert "error: No usable temporary directory found in" in result.stderr
    assert "set TMPDIR to a folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (public / "run").exists()
    result = in_shell(line.replace("TMPDIR;", "TMPDIR; export TMPDIR=/mnt;"), [*nobody, *run])
    assert result.returncode == 0, result.stderr
    assert (public / "run" / "FINISHED").exists()
