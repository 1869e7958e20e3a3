"""The folder of a run: one process, one configuration, one id; its markers and checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import STATE

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config, flatten
from pipeline.runs import checkpoint
from pipeline.runs.identity import make_run_id
from pipeline.runs.run_folder import RunFolder, saved_precision
from pipeline.runs.step_folders import (
    CHECKPOINTS,
    SNAPSHOTS,
    committed,
    folder_of,
    step_of,
    steps_set_aside,
)
from pipeline.runtime.documents import read_document, set_file_aside, sign
from pipeline.runtime.errors import CheckpointError, ConfigError, RunFolderError

DAMAGED = ["", "{", "[]", "{}", "null"]


@pytest.fixture(autouse=True)
def outside_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B agent has set an id."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def config_in(folder: Path | str, *overrides: str) -> Config:
    return load("demo.yaml", [f"run.dir={folder}", *overrides])


def save(folder: RunFolder, step: int, config: Config | None, **state: object) -> Path:
    """Save a checkpoint without networks, with what a run writes into state.json."""
    values = STATE | {
        "run_id": folder.identity.id,
        "run_dir": folder.identity.path,
        "inode": folder.identity.inode,
        "config": flatten(config) if config else None,
        "precision": "bf16",
    }
    return checkpoint.save(folder.path, step, {}, {}, values | state)


def hold(folder: Path, holder: str) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock of a run folder until its standard input ends."""
    folder.mkdir()
    (folder / ".lock").write_text(holder)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, 0); print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-S", "-c", code, str(folder / ".lock")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_new_folder_holds_the_configuration_and_the_identity(tmp_path: Path) -> None:
    """Its parents are created. The configuration reads back as it was."""
    path = tmp_path / "a" / "first"
    config = config_in(path)
    folder = RunFolder(config)
    assert folder.path == path
    assert (path / "config.yaml").read_text() == sign(dump(config))
    assert load(path / "config.yaml") == config
    assert read_document(path / "run.json") == {
        "id": folder.identity.id,
        "path": str(path),
        "inode": path.stat().st_ino,
        "origin": None,
    }
    assert re.fullmatch("first-[0-9a-f]{6}", folder.identity.id)
    owner = f"process {os.getpid()} on {socket.gethostname()}\n"
    assert (path / ".lock").read_text() == owner


def test_a_resumed_run_keeps_its_id_and_is_not_preempted(tmp_path: Path) -> None:
    """Other markers stay."""
    config = config_in(tmp_path / "run")
    folder = RunFolder(config)
    folder.mark("PREEMPTED", "")
    folder.mark("progress", "300 \u00e9\n")
    again = RunFolder(config)
    assert again.identity.id == folder.identity.id
    assert not (tmp_path / "run" / "PREEMPTED").exists()
    assert (tmp_path / "run" / "progress").read_text("utf-8") == "300 \u00e9\n"


def test_a_marker_is_removed_and_its_absence_is_no_error(tmp_path: Path) -> None:
    """A marker that is removed twice is gone."""
    folder = RunFolder(config_in(tmp_path / "run"))
    folder.mark("FINISHED", "300")
    folder.unmark("FINISHED")
    folder.unmark("FINISHED")
    assert not (tmp_path / "run" / "FINISHED").exists()


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_identity_is_set_aside(tmp_path: Path, content: str) -> None:
    """The run gets a new id and has no saved precision. The damaged file stays."""
    config = config_in(tmp_path)
    (tmp_path / "run.json").write_text(content)
    assert saved_precision(config) is None
    folder = RunFolder(config)
    assert read_document(tmp_path / "run.json")["id"] == folder.identity.id
    assert (tmp_path / "run.json.damaged").read_text() == content


def test_a_missing_identity_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """state.json of the newest checkpoint has the id too."""
    config = config_in(tmp_path)
    folder = RunFolder(config)
    save(folder, 10, config)
    (tmp_path / "run.json").unlink()
    assert RunFolder(config).identity == folder.identity


def test_the_precision_of_auto_is_that_of_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start without a checkpoint decides nothing. A configured precision takes precedence, and
    ``~`` is the home folder.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    auto = Config()
    auto = auto.__class__(run=type(auto.run)(dir="~/run"))
    assert auto.train.precision == "auto"
    assert saved_precision(auto) is None
    folder = RunFolder(auto)
    assert folder.path == tmp_path / "run"
    assert saved_precision(auto) is None
    save(folder, 7, auto)
    (tmp_path / "run" / "run.json").unlink()
    assert saved_precision(auto) == "bf16"
    assert saved_precision(config_in(tmp_path / "run", "train.precision=fp32")) == "fp32"


@pytest.mark.parametrize(
    ("holder", "name"), [("process 7 on node\n", "process 7 on node"), ("", "another process")]
)
def test_a_folder_in_use_is_a_user_error(tmp_path: Path, holder: str, name: str) -> None:
    """The message names the process that holds it. The folder is not changed."""
    path = tmp_path / "run"
    with hold(path, holder) as process:
        with pytest.raises(RunFolderError) as caught:
            RunFolder(config_in(path))
        process.communicate()
    assert str(caught.value) == (
        f"run.dir ({path}): in use by {name}; "
        "wait for that run to end or choose another folder with run.dir=..."
    )
    assert [entry.name for entry in path.iterdir()] == [".lock"]
    assert (path / ".lock").read_text() == holder


def test_a_refused_folder_leaves_no_open_file(tmp_path: Path) -> None:
    """The lock file of a folder in use is closed again."""
    path = tmp_path / "run"
    with hold(path, "") as process:
        config, before = config_in(path), sorted(Path("/dev/fd").iterdir())
        with pytest.raises(RunFolderError):
            RunFolder(config)
        assert sorted(Path("/dev/fd").iterdir()) == before
        process.communicate()


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    """The message names the field, the folder, the reason and the remedy."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    with pytest.raises(RunFolderError) as caught:
        RunFolder(config_in(path))
    assert str(caught.value) == (
        f"run.dir ({path}): cannot be written (Not a directory); "
        "choose another folder with run.dir=... or give write permission."
    )


def test_checkpoints_tie_a_folder_to_its_configuration(tmp_path: Path) -> None:
    """Every changed value is listed, and the old configuration stays in the folder.

    The checkpoint has the configuration, so config.yaml may be missing.
    """
    old = config_in(tmp_path)
    save(RunFolder(old), 10, old)
    for text in (sign(dump(old)), None):
        if text is None:
            (tmp_path / "config.yaml").unlink()
        with pytest.raises(ConfigError) as caught:
            RunFolder(config_in(tmp_path, "run.seed=3", "model.z_dim=65"))
        assert str(caught.value) == (
            f"run.dir ({tmp_path}) belongs to a run with another configuration:\n"
            "  run.seed: 0 -> 3\n  model.z_dim: 64 -> 65\n"
            "Set the values back to resume it, or start a new run with run.dir=... "
            f"(with run.fork={tmp_path} from this one's newest checkpoint)."
        )
        if text is not None:
            assert (tmp_path / "config.yaml").read_text() == text
    longer = config_in(tmp_path, "train.total_steps=2000")
    RunFolder(longer)
    assert (tmp_path / "config.yaml").read_text() == sign(dump(longer))


def test_accepted_changes_are_said_and_others_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A refusal names the option where it helps; config.yaml accepts nothing for later resumes."""
    old = config_in(tmp_path)
    save(RunFolder(old), 10, old)
    changes = ("optim.d_lr=0.1", "stability.r1_gamma=1", "schedule.warmup=9", "train.mirror=true")
    with pytest.raises(ConfigError, match=r"or run.accept_changes=true to go on with the new ones"):
        RunFolder(config_in(tmp_path, *changes))
    with pytest.raises(ConfigError) as caught:
        RunFolder(config_in(tmp_path, *changes, "run.accept_changes=true", "run.seed=3"))
    assert "configuration:\n  run.seed: 0 -> 3\nSet the values back" in str(caught.value)
    assert "accept_changes" not in str(caught.value)
    capfd.readouterr()
    RunFolder(config_in(tmp_path, *changes, "run.accept_changes=true"))
    said = capfd.readouterr().err
    assert f"{tmp_path}: changed from step 10 on:\n" in said
    assert "optim.d_lr: 0.0002 -> 0.1" in said
    assert load(tmp_path / "config.yaml") == config_in(tmp_path, *changes)


def test_a_folder_without_checkpoints_takes_another_configuration(tmp_path: Path) -> None:
    """Nothing was trained with the first one."""
    other = config_in(tmp_path, "run.seed=3")
    RunFolder(config_in(tmp_path))
    RunFolder(other)
    assert (tmp_path / "config.yaml").read_text() == sign(dump(other))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "evaluations.jsonl", "progress"])
def test_files_that_no_run_wrote_are_not_overwritten(tmp_path: Path, name: str) -> None:
    """Say, ``--config X/config.yaml run.dir=X`` with the user's own file in X."""
    (tmp_path / name).write_text("# mine\n")
    with pytest.raises(RunFolderError, match=f"would overwrite its {name}; choose another folder"):
        RunFolder(config_in(tmp_path))
    assert (tmp_path / name).read_text() == "# mine\n"
    assert {path.name for path in tmp_path.iterdir()} == {name, ".lock"}


def test_a_moved_folder_is_the_same_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its config.yaml means the folder that it lies in now."""
    first = RunFolder(config_in(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    config = load(tmp_path / "b" / "config.yaml")
    assert config.run.dir == str(tmp_path / "b")
    snapshot = folder_of(tmp_path / "b", SNAPSHOTS, 5) / "config.yaml"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_text((tmp_path / "b" / "config.yaml").read_text())
    assert load(snapshot).run.dir == str(tmp_path / "b")
    second = RunFolder(config)
    assert second.identity.id == first.identity.id
    assert second.identity.path == str(tmp_path / "b")
    assert not (tmp_path / "a").exists()
    output = capfd.readouterr().err
    assert f"{tmp_path / 'b'}, where the configuration lies; it says {tmp_path / 'a'}" in output
    assert f"run {first.identity.id} was moved here from {tmp_path / 'a'}" in output


@pytest.mark.parametrize("lost", [[], ["run.json"], ["run.json", "config.yaml"]])
def test_a_copied_folder_is_a_run_of_its_own(
    tmp_path: Path, lost: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its origin is recorded. Its networks are fixed, other keys may change once, with a line."""
    old = config_in(tmp_path / "a")
    first = RunFolder(old)
    save(first, 10, old)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in lost:
        (tmp_path / "b" / name).unlink()
    with pytest.raises(ConfigError, match=r"(?s)of other networks:.*model.z_dim: 64 -> 65"):
        RunFolder(config_in(tmp_path / "b", "model.z_dim=65"))
    capfd.readouterr()
    config = config_in(tmp_path / "b", "optim.g_lr=0.5")
    copy = RunFolder(config)
    assert copy.identity.id != first.identity.id
    assert copy.identity.origin == first.identity
    assert copy.identity.ids == [copy.identity.id, first.identity.id]
    output = capfd.readouterr().err
    assert f"a copy of run {first.identity.id} in {tmp_path / 'a'}" in output
    assert "optim.g_lr: 0.0002 -> 0.5" in output
    assert RunFolder(config).identity == copy.identity
    assert RunFolder(old).identity == first.identity
    (tmp_path / "a").rename(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    second, moved = (RunFolder(config_in(tmp_path / name)).identity for name in "dc")
    assert (moved.id, second.id == moved.id) == (first.identity.id, False)
    save(copy, 11, config)
    with pytest.raises(ConfigError, match=r"optim.g_lr: 0.5 -> 0.0002"):
        RunFolder(config_in(tmp_path / "b"))


def test_a_fork_begins_with_the_newest_checkpoint_of_another_run(tmp_path: Path) -> None:
    """The same command again goes on; another origin is refused."""
    old = config_in(tmp_path / "a")
    first = RunFolder(old)
    save(first, 10, old)
    config = config_in(tmp_path / "b", f"run.fork={tmp_path / 'a'}", "optim.g_lr=0.5")
    assert saved_precision(config_in(tmp_path / "b", f"run.fork={tmp_path / 'a'}")) == "bf16"
    fork = RunFolder(config)
    assert [step_of(path) for path in committed(tmp_path / "b")] == [10]
    assert fork.identity.origin == first.identity
    save(first, 20, old)
    again = RunFolder(config)
    assert again.identity == fork.identity
    assert [step_of(path) for path in committed(tmp_path / "b")] == [10]
    fork.require_own(checkpoint.read(committed(tmp_path / "b")[0]))
    other = RunFolder(config_in(tmp_path / "c"))
    save(other, 5, old)
    with pytest.raises(ConfigError, match="has checkpoints that do not come from there"):
        RunFolder(config_in(tmp_path / "b", f"run.fork={tmp_path / 'c'}"))
    with pytest.raises(CheckpointError, match="is of run c-"):
        fork.require_own(checkpoint.read(committed(tmp_path / "c")[0]))


@pytest.mark.parametrize("source", ["nothing", "empty"])
def test_a_fork_needs_a_run_with_checkpoints(tmp_path: Path, source: str) -> None:
    """The new folder has no identity yet."""
    RunFolder(config_in(tmp_path / "empty"))
    config = config_in(tmp_path / "b", f"run.fork={tmp_path / source}")
    with pytest.raises(ConfigError, match=r"run.fork \(.*\): .*must be the folder of a run with"):
        RunFolder(config)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".lock"]


def test_a_fork_says_what_is_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It begins with the checkpoint before a damaged one, and names a damaged run.json."""
    old = config_in(tmp_path / "a")
    first = RunFolder(old)
    save(first, 10, old)
    save(first, 20, old)
    file = committed(tmp_path / "a")[-1] / "optimizers.pt"
    file.write_bytes(file.read_bytes()[:-1])
    RunFolder(config_in(tmp_path / "b", f"run.fork={tmp_path / 'a'}"))
    assert [step_of(path) for path in committed(tmp_path / "b")] == [10]
    assert f"{file.parent}: optimizers.pt is damaged" in capfd.readouterr().err
    (tmp_path / "a" / "run.json").write_text('{"id": 3}')
    with pytest.raises(ConfigError, match=r"run.fork \(.*\): .*run.json: .*id"):
        RunFolder(config_in(tmp_path / "c", f"run.fork={tmp_path / 'a'}"))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_lock_that_is_no_regular_file_is_named(tmp_path: Path, make: Any) -> None:
    """A folder in its place, or a FIFO, whose locks exclude nobody."""
    make(tmp_path / ".lock")
    with pytest.raises(RunFolderError, match=r"run.dir \(.*\): cannot be written \(.lock: "):
        RunFolder(config_in(tmp_path))


def test_a_fork_of_other_networks_is_refused(tmp_path: Path) -> None:
    """Nothing is copied."""
    old = config_in(tmp_path / "a")
    save(RunFolder(old), 10, old)
    config = config_in(tmp_path / "b", f"run.fork={tmp_path / 'a'}", "model.ngf=8")
    with pytest.raises(ConfigError, match=r"(?s)run.fork.*of other networks:\n  model.ngf: "):
        RunFolder(config)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".lock"]


def test_checkpoints_that_were_saved_and_are_gone_are_missed(tmp_path: Path) -> None:
    """The remedy works. A damaged one that was set aside explains the difference."""
    folder = RunFolder(config_in(tmp_path))
    folder.require_progress(0)
    folder.mark("progress", "8")
    folder.require_progress(8)
    for step, found in ((4, "the newest checkpoint is of step 4"), (0, "there is none")):
        with pytest.raises(CheckpointError, match=f"step 8 was saved .* {found}"):
            folder.require_progress(step)
    aside = folder_of(tmp_path, CHECKPOINTS, 8)
    for _ in range(2):
        aside.mkdir(parents=True)
        set_file_aside(aside)
    assert steps_set_aside(tmp_path) == [8, 8]
    folder.require_progress(4)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "progress").unlink()
    folder.require_progress(0)


def test_an_unreadable_configuration_beside_old_checkpoints_is_a_user_error(tmp_path: Path) -> None:
    """They have no configuration of their own. The message says what is wrong with config.yaml."""
    config = config_in(tmp_path)
    save(RunFolder(config), 10, None)
    RunFolder(config)
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(
        RunFolderError, match=r"this run was started with cannot be read: .*sections"
    ):
        RunFolder(config)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("cats & dogs", "cats-dogs"),
        ("A_z-09", "A_z-09"),
        ("-\u00e9x\u00e9", "x"),
        ("Xx" * 40, "Xx" * 32),
        ("x" * 63 + "..", "x" * 63),
        ("\u00e9", "run"),
        ("Xrun" + "X", "XrunX"),
    ],
)
def test_an_id_is_the_name_of_the_folder_and_six_random_characters(name: str, start: str) -> None:
    """Other characters become single dashes, none at the ends; the name has at most 64."""
    ids = {make_run_id(Path("runs") / name) for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(f"{start}-[0-9a-f]{{6}}", run_id) for run_id in ids)


def test_a_sweep_sets_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere WANDB_RUN_ID would give two folders one W&B run, so it is not used."""
    monkeypatch.setenv("WANDB_RUN_ID", "from-sweep")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert make_run_id(Path("runs/default")) == "from-sweep"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert make_run_id(Path("runs/default")).startswith("default-")
    monkeypatch.setenv("WANDB_RUN_ID", "")
    assert make_run_id(Path("runs/default")).startswith("default-")


def test_complete_folders_are_listed_by_step(tmp_path: Path) -> None:
    """Unfinished folders and other names are left out. Snapshots have a folder of their own."""
    assert committed(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_8").touch()
    (tmp_path / "checkpoints" / "step_9").symlink_to(tmp_path)
    for name in ("step_100", "step_00000020", "step_3", "step_4.tmp", "other", "step_", "7"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    folder_of(tmp_path, SNAPSHOTS, 5).mkdir(parents=True)
    names = [path.name for path in committed(tmp_path)]
    assert names == ["step_3", "step_00000020", "step_100"]
    assert [step_of(path) for path in committed(tmp_path)] == [3, 20, 100]
    assert committed(tmp_path, SNAPSHOTS) == [tmp_path / "snapshots" / "step_00000005"]


def test_a_step_has_eight_digits_or_more(tmp_path: Path) -> None:
    """The folder need not exist."""
    assert folder_of(tmp_path, CHECKPOINTS, 12) == tmp_path / "checkpoints" / "step_00000012"
    assert folder_of(tmp_path, SNAPSHOTS, 10**9) == tmp_path / "snapshots" / "step_1000000000"
