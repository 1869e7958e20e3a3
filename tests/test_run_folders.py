"""Run folders that were moved, copied, damaged or mixed up, met by the real command."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from launching import (
    assert_bitwise_equal,
    kill_at_step,
    rank_process,
    run,
    started,
    state_of,
    train,
)

from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.documents import read_document, write_document

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ENDLESS = "train.total_steps=1000000"


@pytest.fixture(scope="module")
def ten_steps(
    tiny_config: Path, training_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with checkpoints of steps 4, 8 and 10; tests copy it."""
    folder = tmp_path_factory.mktemp("ten") / "run"
    train(1, tiny_config, *training_settings, f"run.dir={folder}", *TEN)
    return folder


TEN = ("train.total_steps=10", "train.checkpoint_every=4", "train.keep=3")


@pytest.fixture
def own(ten_steps: Path, tmp_path: Path) -> Path:
    """A run folder that a test may damage; as if it had been trained where it is."""
    folder = Path(shutil.copytree(ten_steps, tmp_path / "run"))
    content = read_document(folder / "run.json")
    write_document(
        folder / "run.json", content | {"path": str(folder), "inode": folder.stat().st_ino}
    )
    return folder


def refused(*arguments: object) -> str:
    code, output = run(1, *arguments)
    assert code == 2, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    return output


def identity(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["id"])


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in committed(folder)]


def test_a_run_says_what_it_is_and_what_it_made_and_log_txt_keeps_it(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """A new run, a resumed one and a finished one differ in their first line."""
    folder = tmp_path / "run"
    words = (1, tiny_config, *training_settings, f"run.dir={folder}", "train.total_steps=4")
    first = train(*words)
    assert f"new run {identity(folder)} in {folder}: 4 steps" in first
    assert "CPU, fp32; batch of 32 = 1 rank(s) x 4 micro-batch(es) x 8 images" in first
    assert "331 images of 32x32x1 in 3 shard(s); 4 steps are 0.4 epochs" in first
    assert f"finished at step 4:\n  {folder}/checkpoints/step_00000004" in first
    assert f"{folder}/samples/step_0000004.png" in first
    again = train(*words)
    assert f"already finished: run {identity(folder)} in {folder}, step 4" in again
    assert "new run" not in again
    longer = train(*words, "train.total_steps=6")
    assert f"resuming run {identity(folder)} in {folder} at step 4 of 6" in longer
    assert "error: " in refused(*words[1:], "data.shards=/nowhere")
    log = (folder / "log.txt").read_text()
    assert log.count(f"pipeline/train.py --config {tiny_config}") == 4
    for wanted in ("new run", "already finished", "resuming run", "host ", "error: ", "torch "):
        assert wanted in log
    lines = log.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert sum("step 4/4" in line for line in lines) == 1


def test_a_start_that_fails_decides_nothing(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """The precision of a mistaken start does not stay."""
    folder = tmp_path / "run"
    words = (tiny_config, f"run.dir={folder}", "train.total_steps=2")
    refused(*words, "data.shards=/nowhere", "train.precision=fp32")
    output = train(1, *words, *training_settings, "train.total_steps=2", "train.precision=bf16")
    assert "CPU, bf16" in output


def test_a_moved_folder_goes_on_and_a_copy_is_a_run_of_its_own(
    tiny_config: Path, own: Path
) -> None:
    """`--config FOLDER/config.yaml` means that folder, whatever the file says."""
    moved, copy, first = own.with_name("moved"), own.with_name("copy"), identity(own)
    own.rename(moved)
    shutil.copytree(moved, copy)
    output = train(1, moved / "config.yaml", "train.total_steps=12")
    assert f"run {first} was moved here from {own}" in output
    assert f"resuming run {first} in {moved} at step 10 of 12" in output
    output = train(1, copy / "config.yaml", "train.total_steps=12")
    assert f"a copy of run {first}" in output
    assert identity(copy) != first == identity(moved)
    assert json.loads((copy / "run.json").read_text())["origin"]["id"] == first
    assert f"resuming run {identity(copy)} in {copy} at step 10 of 12" in output
    assert not own.exists()
    assert steps(copy) == steps(moved)
    states = state_of(copy, 12), state_of(moved, 12)
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_a_fork_trains_on_with_other_settings(
    tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """It has an id, rows and checkpoints of its own, and the original is left as it is."""
    fork, before = own.with_name("fork"), sorted(own.rglob("*"))
    words = (tiny_config, *training_settings, f"run.dir={fork}", f"run.fork={own}", *TEN)
    output = train(1, *words, "train.total_steps=12", "optim.g_lr=1e-4")
    assert f"resuming run {identity(fork)} in {fork} at step 10 of 12" in output
    assert "optim.g_lr: 0.001 -> 0.0001" in output
    assert steps(fork) == [10, 12]
    assert sorted(own.rglob("*")) == before
    assert "optim.g_lr: 0.0001 -> 0.001" in refused(*words, "train.total_steps=12")


def test_a_resume_with_accepted_changes_trains_as_a_fork_with_them_does(
    tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """Killed in between, too: bitwise. Its checkpoints list what changed, at which step."""
    fork, new = own.with_name("fork"), ("optim.g_lr=1e-4", "stability.r1_gamma=1")
    words = (1, tiny_config, *training_settings, *TEN, "train.total_steps=14", *new)
    train(*words, f"run.dir={fork}", f"run.fork={own}")
    accepting = (*words, f"run.dir={own}", "run.accept_changes=true")
    with started(*accepting) as process:
        kill_at_step(process, own, 11)
    with started(*accepting) as process:
        kill_at_step(process, own, 13)  # after the checkpoint of step 12
    assert "optim.g_lr: 0.0001 -> 0.001" in refused(*words[1:-2], f"run.dir={own}")
    train(*words, f"run.dir={own}")
    assert_bitwise_equal(state_of(own, 14), state_of(fork, 14))
    events = [read_document(path / "state.json")["events"] for path in committed(own)]
    changed = ["optim.g_lr: 0.001 -> 0.0001", "stability.r1_gamma: 0.0 -> 1.0"]
    assert events == [[], *[[{"step": 10, "changed": changed}]] * 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_just_saved_stays_though_a_later_one_is_damaged(
    processes: int, tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """keep=1, keep_every=4, step 10 damaged, SIGTERM after the resume at 8: progress is made."""
    (own / "checkpoints" / "step_00000010" / "G.safetensors").write_bytes(b"torn")
    words = (processes, tiny_config, *training_settings, f"run.dir={own}", *TEN)
    words = (*words, "train.keep=1", "train.keep_every=4", "train.checkpoint_every=0")
    log = own / "ids" / "rank_0.jsonl"
    seen = len(log.read_text().splitlines())
    for _ in range(2):
        with started(*words, ENDLESS) as process:
            while len(log.read_text().splitlines()) <= seen:
                assert process.poll() is None, process.communicate()[0]
            victim = process if processes == 1 else rank_process(process, 1)
            victim.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        stopped, seen = int((own / "PREEMPTED").read_text()), len(log.read_text().splitlines())
        assert int((own / "progress").read_text()) == stopped == steps(own)[-1]
        assert "at step 8 of" in output or "damaged" not in output
    assert (own / "checkpoints" / "step_00000010.damaged").is_dir()


def test_a_lost_checkpoint_folder_is_missed(
    tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """Nothing is trained or emptied. Both remedies work: mount it again, or remove progress."""
    words = (tiny_config, *training_settings, f"run.dir={own}", *TEN)
    rows = (own / "metrics.jsonl").read_text()
    (own / "checkpoints").rename(own.with_name("unmounted"))
    output = refused(*words)
    assert (
        f"step 10 was saved (says the file progress), but in {own}/checkpoints there is" in output
    )
    assert (own / "metrics.jsonl").read_text() == rows
    own.with_name("unmounted").rename(own / "checkpoints")
    assert "already finished" in train(1, *words)
    shutil.rmtree(own / "checkpoints" / "step_00000010")
    assert "the newest checkpoint is of step 8" in refused(*words)
    (own / "progress").unlink()
    assert "at step 8 of 10" in train(1, *words)


def test_the_configuration_of_a_checkpoint_is_in_it(
    tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """Without config.yaml another learning rate is refused too. Without run.json the checkpoint
    tells the id of the run; it is a copy here.
    """
    (own / "config.yaml").unlink()
    words = (tiny_config, *training_settings, f"run.dir={own}", *TEN)
    assert "optim.g_lr: 0.001 -> 0.5" in refused(*words, "optim.g_lr=0.5")
    first = identity(own)
    (own / "run.json").unlink()
    train(1, *words)
    state = json.loads((own / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert state["config"]["optim.g_lr"] == 0.001
    assert (state["run_id"], state["step"], state["precision"]) == (first, 8, "fp32")
    assert json.loads((own / "run.json").read_text())["origin"]["id"] == first


def test_a_checkpoint_of_another_run_is_refused(
    tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """It has the same configuration and data, but not this run's past."""
    other = own.with_name("other")
    words = (tiny_config, *training_settings, *TEN)
    train(1, *words, f"run.dir={other}", "train.total_steps=11")
    path = Path("checkpoints") / "step_00000011"
    shutil.copytree(other / path, own / path)
    output = refused(*words, f"run.dir={own}")
    assert f"is of run {identity(other)}, but run.json says {identity(own)}" in output
    shutil.rmtree(own / path)
    train(1, *words, f"run.dir={own}")


def test_a_users_own_yaml_is_not_overwritten(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """`--config X/config.yaml run.dir=X` in a folder that no run has used."""
    mine = tmp_path / "config.yaml"
    mine.write_text(f"# precious\n{tiny_config.read_text()}")
    before = mine.read_text()
    output = refused(mine, *training_settings, f"run.dir={tmp_path}")
    assert "would overwrite its config.yaml; choose another folder" in output
    assert mine.read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".lock"}
    run_dir = tmp_path / "run"
    train(1, mine, *training_settings, f"run.dir={run_dir}", "train.total_steps=1")


def test_a_kill_while_a_fork_begins_leaves_a_fork(
    tiny_config: Path, training_settings: list[str], own: Path
) -> None:
    """SIGKILL at its first step; the same command goes on from the same checkpoint."""
    fork = own.with_name("fork")
    words = (1, tiny_config, *training_settings, f"run.dir={fork}", f"run.fork={own}", *TEN)
    words = (*words, "train.total_steps=12", "optim.g_lr=1e-4")
    with started(*words, ENDLESS, "train.checkpoint_every=0") as process:
        kill_at_step(process, fork, 11)
    name = identity(fork)
    assert f"resuming run {name} in {fork} at step 10 of 12" in train(*words)
    assert identity(fork) == name
