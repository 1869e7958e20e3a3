"""What a run shows before its first step: real images, and samples of the untrained G."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import ids_by_step, train
from PIL import Image

from pipeline.config.loading import load
from pipeline.data.cache import Cache
from pipeline.data.reader import Reader
from pipeline.data.shards import read_index
from pipeline.runs import metrics_log
from pipeline.runs.metrics_log import MetricsLog


@pytest.mark.slow
def test_a_run_begins_with_its_first_real_images_and_a_grid_of_noise(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """reals.png has the samples of the first two batches of 32, in order; a resume keeps it."""
    run_dir, shards = tmp_path / "run", training_settings[0].partition("=")[2]
    words = (f"run.dir={run_dir}", "data.shards=" + shards)
    train(2, tiny_config, *words, "train.total_steps=2")
    reals = run_dir / "samples" / "reals.png"
    index = read_index(shards)
    batches = ids_by_step(run_dir)
    ids = np.array([*batches[1], *batches[2]])
    images = np.zeros((64, *index.shape), np.uint8)
    Reader(index, Cache(index, "")).read(ids, images)
    with Image.open(reals) as picture:
        tiles = np.asarray(picture).reshape(8, 32, 8, 32).swapaxes(1, 2).reshape(64, 32, 32)
    assert np.array_equal(tiles, images[..., 0])
    with Image.open(run_dir / "samples" / "step_0000000.png") as grid:
        assert grid.size == (256, 256)
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("samples/*0.png")}
    before[reals] = reals.stat().st_mtime_ns
    train(1, tiny_config, *words, "train.total_steps=3")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_slow_run_says_its_speed_before_the_first_row(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """After FIRST_LINE seconds there is one line with the time left, and no row of metrics."""
    monkeypatch.setattr(metrics_log, "FIRST_LINE", -1.0)
    config = load(tiny_config, [f"run.dir={tmp_path}"])
    with MetricsLog(config, "a", 0, 100) as log:
        for step in (1, 2, 3):
            log.advance(step)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("step 1/100  eta 0:00:0")
        log.log(4, {"loss/G": 1.0})
        log.advance(5)
        assert capsys.readouterr().err.count("step ") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
