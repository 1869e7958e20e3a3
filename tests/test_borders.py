"""What lies around a run: its output, home folder, W&B, caches, folder and the other ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import (
    REPO,
    TIMEOUT,
    command,
    environment,
    free_port,
    kill,
    start,
    wait_for,
)

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
        timeout=4 * TIMEOUT,  # compiling takes minutes on a busy machine
        check=False,
    )


# -- output -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "redirection"),
    [
        (2, '"$@" 2>&1 | head -1; exit "${PIPESTATUS[0]}"'),
        (1, '"$@" 2>&1 | true; exit "${PIPESTATUS[0]}"'),
        (1, '"$@" 2>&-'),
        (2, '"$@" >&- 2>&- <&-'),
        (1, '"$@" >/dev/full 2>&1'),
    ],
)
def test_a_run_outlives_its_output(
    processes: int, redirection: str, words: Settings, tmp_path: Path
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


# -- W&B's variables ----------------------------------------------------------------------------


def synced(folder: Path) -> dict[str, Any]:
    """The run of a folder as ``wandb sync`` will send it."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    lines = subprocess.run(
        [wandb, "leet", "inspect", "--json", file],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return next(record["run"] for record in records if record["type"] == "run")


GIVEN = {
    "WANDB_PROJECT": "faces",
    "WANDB_NAME": "named",
    "WANDB_RUN_GROUP": "grouped",
    "WANDB_ENTITY": "team",
    "WANDB_TAGS": "one, two,",
    "WANDB_NOTES": "why",
    "WANDB_MODE": "offline",
}
BRIEF = ("train.total_steps=1", "tracking.wandb=auto")


def test_variables_of_wandb_count_where_the_configuration_is_silent(
    words: Settings, tmp_path: Path
) -> None:
    """And only there; the folder of W&B's files is the run's."""
    result = in_shell('"$@"', words(*BRIEF), **GIVEN, WANDB_DIR=str(tmp_path / "other"))
    assert result.returncode == 0, result.stderr
    assert "WANDB_DIR: not used" in result.stderr
    assert not (tmp_path / "other").exists()
    found = synced(tmp_path / "run")
    names = ("project", "display_name", "run_group", "entity", "tags", "notes")
    expected = ("faces", "named", "grouped", "team", ["one", "two"], "why")
    assert tuple(found[name] for name in names) == expected
    own = ["project=p", "name=n", "group=g", "entity=e", "tags=[t]"]
    own = [*(f"tracking.{word}" for word in own), f"run.dir={tmp_path / 'own'}"]
    assert in_shell('"$@"', words(*BRIEF, *own), **GIVEN).returncode == 0
    found = synced(tmp_path / "own")
    assert tuple(found[name] for name in names[:5]) == ("p", "n", "g", "e", ["t"])


def test_wandb_disabled_is_obeyed_unless_the_configuration_names_a_mode(
    words: Settings, tmp_path: Path
) -> None:
    for wandb, there in (("auto", False), ("offline", True)):
        settings = words("train.total_steps=1", f"tracking.wandb={wandb}")
        assert in_shell('"$@"', settings, WANDB_DISABLED="true").returncode == 0
        assert (tmp_path / "run" / "wandb").exists() == there
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("sweep", ["", "4f7c2a1b"])
def test_one_id_is_never_that_of_two_folders(sweep: str, words: Settings, tmp_path: Path) -> None:
    """A sweep's id is that of a new folder; a second folder, or one with an id, has its own.

    Outside a sweep, where the variable may be left over in a shell, no folder gets it.
    """
    env = {"WANDB_RUN_ID": "q1w2e3r4", "WANDB_RESUME": "must"}
    env |= {"WANDB_SWEEP_ID": sweep} if sweep else {}
    lines = {}
    for name in ("before", "a", "b"):
        one = {} if name == "before" else env
        more = ("train.total_steps=1", "tracking.wandb=offline", f"run.dir={tmp_path / name}")
        lines[name] = in_shell('"$@"', words(*more), **one).stderr
        if name == "before":
            shutil.rmtree(tmp_path / name / "wandb")
            lines[name] = in_shell('"$@"', words(*more), **env).stderr
    ids = {n: json.loads((tmp_path / n / "run.json").read_text())["id"] for n in lines}
    assert (ids["a"] == "q1w2e3r4") is bool(sweep)
    assert len(set(ids.values())) == 3
    assert {name: synced(tmp_path / name)["run_id"] for name in ids} == ids
    if sweep:
        assert f"WANDB_RUN_ID: not used; {tmp_path / 'a'} is that run" in lines["b"]
    assert "WANDB_RUN_ID, WANDB_RESUME: not used; the run folder's W&B run is" in lines["before"]
    assert ("WANDB_RUN_ID" not in lines["a"]) is bool(sweep)


def test_names_that_wandb_would_refuse_at_the_sync_are_refused_at_the_start(
    words: Settings, tmp_path: Path
) -> None:
    """All of them in one message, before there is a folder; values of variables are not shown."""
    wrong = [f"tracking.{name}={'x' * 129}" for name in ("name", "group")]
    wrong += ["tracking.project=a/b", f"tracking.tags=[{'y' * 65}]"]
    result = in_shell('"$@"', words("tracking.wandb=offline", *wrong))
    assert result.returncode == 2
    for key in ("name", "group", "project", "tags"):
        assert f"tracking.{key} (" in result.stderr
    env = {"WANDB_NAME": "x" * 129, "WANDB_RUN_GROUP": "x" * 129, "WANDB_PROJECT": "a:b"}
    env |= {"WANDB_TAGS": "ok," + "x" * 65, "WANDB_RUN_ID": "a/b", "WANDB_MODE": "of"}
    result = in_shell('"$@"', words("tracking.wandb=auto"), **env)
    assert result.returncode == 2
    for name in env:
        assert f"{name} (of the environment): " in result.stderr
    assert "xxx" not in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


# -- the run folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["moved", "removed", "lock removed", "second trainer"])
def test_a_run_ends_when_its_folder_is_no_longer_its_own(
    damage: str, words: Settings, tmp_path: Path
) -> None:
    """By one message at the next row or checkpoint, and it leaves nothing new at the old place."""
    folder = tmp_path / "run"
    settings = ("train.total_steps=100000", "train.log_every=10", "tracking.wandb=disabled")
    process = start(words(*settings))
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists(), "metrics.jsonl")
        if damage == "moved":
            folder.rename(tmp_path / "elsewhere")
        elif damage == "removed":
            while folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
        else:
            (folder / ".lock").unlink()
        if damage == "second trainer":
            (folder / ".lock").touch()
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        kill(process)
    assert process.returncode == 2, output
    assert output.count("error: ") == 1, output
    assert f"run.dir ({folder}): the folder was moved or removed, or its .lock" in output
    assert "Traceback" not in output
    assert folder.exists() == ("lock" in damage or "second" in damage), output


# -- other ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "number"), [(1, "SIGKILL"), (1, "SIGSTOP"), (0, "SIGSTOP")])
def test_a_rank_that_is_lost_ends_the_others_within_the_limit(
    victim: int, number: str, words: Settings, tmp_path: Path
) -> None:
    """Two processes without a launcher, as on two nodes: a message with bound and key, no trace."""
    folder, steps = tmp_path / "run", ("train.total_steps=100000", "train.rank_timeout=10")
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [start(words(*steps), **group, RANK=str(r), LOCAL_RANK=str(r)) for r in (0, 1)]
    try:
        wait_for(lambda: (folder / "progress").is_file(), "checkpoint")
        ranks[victim].send_signal(getattr(signal, number))
        output, _ = ranks[1 - victim].communicate(timeout=TIMEOUT)
    finally:
        for process in ranks:
            kill(process)
    assert ranks[1 - victim].returncode == 2, output
    assert output.count("error: ") == 1, output
    assert "lost another rank, or waited for it for 10 s: " in output
    assert "raise train.rank_timeout" in output
    assert "Traceback" not in output
    done = int((folder / "progress").read_text())
    again = words(f"train.total_steps={done + 5}", "train.micro_batch=8")
    code, output = (result := in_shell('"$@"', again)).returncode, result.stderr
    assert code == 0, output
    assert (folder / "FINISHED").read_text() == str(done + 5)


# -- compiled networks --------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_spoiled_cache_of_compiled_networks_is_made_anew(words: Settings, tmp_path: Path) -> None:
    """Files of 0 bytes, as a kill leaves them; a whole cache is used again."""
    cache = tmp_path / "cache"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    compiled = lambda: {p: p.stat().st_mtime_ns for p in cache.rglob("*.so")}  # noqa: E731

    def go_on(steps: int) -> None:
        result = in_shell('"$@"', words("train.compile=true", f"train.total_steps={steps}"), **env)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "run" / "progress").read_text() == str(steps)

    go_on(1)
    before = compiled()
    go_on(2)
    assert compiled() == before
    for path in list(before)[::3]:
        os.truncate(path, 0)
    go_on(3)
    assert all(path.stat().st_size for path in cache.rglob("*.so"))
