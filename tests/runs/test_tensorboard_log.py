"""tracking.tensorboard: what TensorBoard reads, and that it cannot end a run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.runs.metrics_log import MetricsLog
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.tensorboard_log import FOLDER
from pipeline.runtime.errors import ConfigError


def config_of(folder: Path) -> Config:
    words = ["tracking.wandb=disabled", "tracking.tensorboard=true", "tracking.timeout=60"]
    return load(None, [f"run.dir={folder}", *words])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_resume_hides_the_rows_behind_its_checkpoint(
    channels: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's own reader finds each step once, with the value of the resume, and the grid."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is not installed",
    )
    for start, loss in ((0, 1.0), (8, 2.0)):
        with MetricsLog(config_of(tmp_path), "a", start, 16) as log:
            for step in range(start + 4, 17, 4):
                log.log(step, {"loss/G": loss, "perf/upkeep": float("nan")})
            log.images(16, np.zeros((16, 16, channels), np.uint8))
    assert "TensorBoard" not in capfd.readouterr().err
    found = reader.EventAccumulator(str(tmp_path / FOLDER / "train"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss/G")] == [
        (4, 1.0), (8, 1.0), (12, 2.0), (16, 2.0)
    ]  # fmt: skip
    assert {e.step for e in found.Images("samples/grid")} == {16}


def test_a_fault_of_it_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file in the place of its folder, or no package: the rows are in metrics.jsonl."""
    (tmp_path / FOLDER).touch()
    with MetricsLog(config_of(tmp_path), "a", 0, 16) as log:
        log.log(4, {"loss/G": 1.0})
    assert (
        capfd.readouterr().err.count("TensorBoard failed, going on without it. metrics.jsonl") == 1
    )
    assert '"loss/G": 1.0' in (tmp_path / "metrics.jsonl").read_text()


def test_without_the_package_a_run_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message with the command that installs it, before anything is written."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunFolder(config_of(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
