"""The folder of a run: one process, one configuration, one id; its markers and checkpoints."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config
from pipeline.runs.run_folder import (
    CHECKPOINTS,
    SNAPSHOTS,
    RunFolder,
    committed,
    folder_of,
    make_run_id,
    saved_precision,
    step_of,
)
from pipeline.runtime.errors import ConfigError, RunFolderError

DAMAGED = ["", "{", "[]", "{}", "null"]


@pytest.fixture(autouse=True)
def outside_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B agent has set an id."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def config_in(folder: Path | str, *overrides: str) -> Config:
    return load("demo.yaml", [f"run.dir={folder}", *overrides])


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
    folder = RunFolder(config, "bf16")
    assert folder.path == path
    assert (path / "config.yaml").read_text() == dump(config)
    assert load(path / "config.yaml") == config
    assert json.loads((path / "run.json").read_text()) == {"id": folder.id, "precision": "bf16"}
    assert re.fullmatch("first-[0-9a-f]{6}", folder.id)
    owner = f"process {os.getpid()} on {socket.gethostname()}\n"
    assert (path / ".lock").read_text() == owner


def test_a_resumed_run_keeps_its_id_and_is_not_preempted(tmp_path: Path) -> None:
    """The precision is the new one. Other markers stay."""
    config = config_in(tmp_path / "run")
    folder = RunFolder(config, "fp32")
    folder.mark("PREEMPTED", "")
    folder.mark("progress", "300 \u00e9\n")
    again = RunFolder(config, "bf16")
    assert again.id == folder.id
    assert not (tmp_path / "run" / "PREEMPTED").exists()
    assert (tmp_path / "run" / "progress").read_text("utf-8") == "300 \u00e9\n"
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity == {"id": folder.id, "precision": "bf16"}


def test_a_marker_is_removed_and_its_absence_is_no_error(tmp_path: Path) -> None:
    """A marker that is removed twice is gone."""
    folder = RunFolder(config_in(tmp_path / "run"), "fp32")
    folder.mark("FINISHED", "300")
    folder.unmark("FINISHED")
    folder.unmark("FINISHED")
    assert not (tmp_path / "run" / "FINISHED").exists()


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_identity_is_replaced(tmp_path: Path, content: str) -> None:
    """The run gets a new id and has no saved precision."""
    config = config_in(tmp_path)
    (tmp_path / "run.json").write_text(content)
    assert saved_precision(config) is None
    folder = RunFolder(config, "fp32")
    assert json.loads((tmp_path / "run.json").read_text())["id"] == folder.id


def test_the_precision_of_auto_is_that_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configured precision takes precedence, and ``~`` is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    auto = Config()
    auto = auto.__class__(run=type(auto.run)(dir="~/run"))
    assert auto.train.precision == "auto"
    assert saved_precision(auto) is None
    folder = RunFolder(auto, "bf16")
    assert folder.path == tmp_path / "run"
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
            RunFolder(config_in(path), "fp32")
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
            RunFolder(config, "fp32")
        assert sorted(Path("/dev/fd").iterdir()) == before
        process.communicate()


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    """The message names the field, the folder, the reason and the remedy."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    with pytest.raises(RunFolderError) as caught:
        RunFolder(config_in(path), "fp32")
    assert str(caught.value) == (
        f"run.dir ({path}): cannot be written (Not a directory); "
        "choose another folder with run.dir=... or give write permission."
    )


def test_checkpoints_tie_a_folder_to_its_configuration(tmp_path: Path) -> None:
    """Every changed value is listed, and the old configuration stays in the folder."""
    old = config_in(tmp_path)
    RunFolder(old, "fp32")
    folder_of(tmp_path, CHECKPOINTS, 10).mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        RunFolder(config_in(tmp_path, "run.seed=3", "model.z_dim=65"), "fp32")
    assert str(caught.value) == (
        f"run.dir ({tmp_path}) belongs to a run with another configuration:\n"
        "  run.seed: 0 -> 3\n  model.z_dim: 64 -> 65\n"
        "Set the values back to resume it, or start a new run with run.dir=..."
    )
    assert (tmp_path / "config.yaml").read_text() == dump(old)
    longer = config_in(tmp_path, "train.total_steps=2000")
    RunFolder(longer, "fp32")
    assert (tmp_path / "config.yaml").read_text() == dump(longer)


def test_a_folder_without_checkpoints_takes_another_configuration(tmp_path: Path) -> None:
    """So does a folder whose config.yaml is missing."""
    other = config_in(tmp_path, "run.seed=3")
    RunFolder(config_in(tmp_path), "fp32")
    RunFolder(other, "fp32")
    assert (tmp_path / "config.yaml").read_text() == dump(other)
    (tmp_path / "config.yaml").unlink()
    folder_of(tmp_path, CHECKPOINTS, 10).mkdir(parents=True)
    RunFolder(config_in(tmp_path), "fp32")
    assert load(tmp_path / "config.yaml").run.seed == 0


def test_an_unreadable_configuration_beside_checkpoints_is_a_user_error(tmp_path: Path) -> None:
    """The message names the file and passes on what is wrong with it."""
    (tmp_path / "config.yaml").write_text("- 1\n")
    folder_of(tmp_path, CHECKPOINTS, 10).mkdir(parents=True)
    with pytest.raises(ConfigError) as reason:
        load(tmp_path / "config.yaml")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(config_in(tmp_path), "fp32")
    assert str(caught.value) == (
        f"{tmp_path / 'config.yaml'}: the configuration this run was started with cannot be read: "
        f"{reason.value}"
    )


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
    ids = {make_run_id(Config(run=type(Config().run)(dir=f"runs/{name}"))) for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(f"{start}-[0-9a-f]{{6}}", run_id) for run_id in ids)


def test_a_sweep_sets_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_RUN_ID is the id, unless it is empty."""
    monkeypatch.setenv("WANDB_RUN_ID", "from-sweep")
    assert make_run_id(Config()) == "from-sweep"
    monkeypatch.setenv("WANDB_RUN_ID", "")
    assert make_run_id(Config()).startswith("default-")


def test_complete_folders_are_listed_by_step(tmp_path: Path) -> None:
    """Unfinished folders and other names are left out. Snapshots have a folder of their own."""
    assert committed(tmp_path) == []
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
