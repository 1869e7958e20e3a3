"""Scores in W&B: in the evaluation's own run, and in that of a training that has ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import evaluated, make_config, make_run
from launching import environment
from wandb_server import WandbServer, wandb_server

from pipeline.config.schema import TrackingConfig
from pipeline.runs.metrics_log import MetricsLog
from pipeline.runs.results import read_rows

KEY = "eval/fd_tiny-extractor-Tiny_16_100_full"
LAST = 20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server on loopback that this process has an API key for."""
    with wandb_server() as found:
        for name, value in credentials(found).items():
            monkeypatch.setenv(name, value)
        yield found


def credentials(server: WandbServer) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}


def trained(folder: Path, mode: str) -> Path:
    """Return a run with snapshots at 10 and 20 whose training logged its rows to W&B and ended."""
    run = make_run(folder, (10, LAST))
    tracking = TrackingConfig(wandb=mode, timeout=60, project="p")  # type: ignore[arg-type]
    config = replace(make_config(folder), tracking=tracking)
    with MetricsLog(config, "run-abc", 0, LAST) as log:
        for step in range(1, LAST + 1):
            log.log(step, {"loss/G": 1 / step})
    (run / "FINISHED").write_text(str(LAST))
    return run


def scored(run: Path, mode: str) -> dict[int, float]:
    """Evaluate all steps; return their scores."""
    tracking = (f"tracking.wandb={mode}", "tracking.timeout=60", "tracking.project=p")
    evaluated("--run", run, "--pending", *tracking)
    return {row["step"]: row["scores"][KEY] for row in read_rows(run)}


def check_training_row(server: WandbServer, scores: dict[int, float]) -> None:
    """The training's row has losses, configuration and scores; its history has both by step."""
    run = server.runs["run-abc"]
    assert run.summary[KEY] == pytest.approx(scores[LAST])
    assert run.summary[f"{KEY}_best"] == pytest.approx(min(scores.values()))
    assert run.summary["loss/G"] == pytest.approx(1 / LAST)
    assert run.summary["train/step"] == LAST
    losses = {row["train/step"] for row in run.history if "loss/G" in row}
    assert losses == set(range(1, LAST + 1))
    found = {row["train/step"]: row[KEY] for row in run.history if KEY in row}
    assert found == pytest.approx(scores)
    assert (run.about["jobType"], run.exit_code) == ("train", 0)
    assert run.config["train_run_id"]["value"] == "run-abc"
    assert "protocol" not in run.config
    assert KEY in server.runs["run-abc-eval"].summary
    assert "protocol" in server.runs["run-abc-eval"].config


@pytest.mark.slow
def test_a_training_that_has_ended_has_its_scores_in_its_own_row(
    tmp_path: Path, server: WandbServer
) -> None:
    """Once: a second evaluation adds nothing. Neither files nor tags of the training change."""
    run = trained(tmp_path, "online")
    before = set(server.runs["run-abc"].files)
    scores = scored(run, "online")
    check_training_row(server, scores)
    assert server.runs["run-abc"].files == before
    count = len(server.runs["run-abc"].history)
    scored(run, "online")
    assert len(server.runs["run-abc"].history) == count


@pytest.mark.slow
def test_offline_folders_make_the_same_row(tmp_path: Path, server: WandbServer) -> None:
    """After one ``wandb sync`` of all folders: W&B uploads those of a run by their time."""
    run = trained(tmp_path, "offline")
    time.sleep(1.1)  # W&B names its folders by the second
    scores = scored(run, "offline")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "sync", *sorted(run.glob("wandb/offline-run-*"), reverse=True)],
        env=environment() | credentials(server),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_training_row(server, scores)


@pytest.mark.slow
def test_a_training_that_runs_keeps_its_row_to_itself(
    tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[Any]
) -> None:
    """Before it ends the scores are in <id>-eval only, and also while it still sends its rows."""
    run = trained(tmp_path, "online")
    (run / "FINISHED").unlink()
    scored(run, "online")
    assert KEY not in server.runs["run-abc"].summary
    assert KEY in server.runs["run-abc-eval"].summary
    (run / "FINISHED").write_text(str(LAST))
    hold = (
        "import sys; from pathlib import Path; from pipeline.runtime.locks import FileLock;"
        "lock = FileLock(Path(sys.argv[1])); lock.acquire(); print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", hold, str(run / ".lock")]
    with subprocess.Popen(command, env=environment(), **pipes) as holder:  # type: ignore[call-overload]
        holder.stdout.readline()
        evaluated("--run", run, "tracking.wandb=online", "tracking.timeout=1")
        holder.communicate()
    assert "its own run gets the scores next time" in capsys.readouterr().err
    assert KEY not in server.runs["run-abc"].summary
    check_training_row(server, scored(run, "online"))
