"""What a row of metrics says about time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launching import train

from pipeline.training.meter import Meter

IMAGES = 64


def test_grids_and_checkpoints_are_not_counted_as_training() -> None:
    """Images per second and the wait for data are of the time without upkeep, which is reported."""
    before = time.perf_counter()
    meter = Meter(Accelerator(cpu=True), IMAGES)
    meter.add(torch.tensor(1.0), [torch.zeros(3)])
    with meter.waiting():
        time.sleep(0.1)
    with meter.upkeep():
        time.sleep(0.4)
    row = meter.row(1)
    training = time.perf_counter() - before - 0.4  # at most so long, however busy the machine is
    assert row["perf/images_per_sec"] >= IMAGES / training
    assert row["perf/data_wait"] >= 0.1 / training
    assert 0 < row["perf/upkeep"] < 1


def test_a_row_holds_what_came_since_the_last_one() -> None:
    """Losses are means over steps, D's over its updates in a step too; nothing is carried over."""
    meter = Meter(Accelerator(cpu=True), IMAGES)
    for loss in (1.0, 3.0):
        terms = [torch.tensor([loss, 0.5, 0.25]), torch.tensor([loss + 2, 0.5, 0.75])]
        meter.add(torch.tensor(loss), terms)
    with meter.upkeep():
        pass
    row = meter.row(2)
    names = ("loss/G", "loss/D", "scores/real", "scores/fake")
    assert [row[name] for name in names] == [2.0, 3.0, 0.5, 0.5]
    assert row["progress/kimg"] == 2 * IMAGES / 1000
    meter.add(torch.tensor(7.0), [torch.zeros(3)])
    row = meter.row(3)
    assert row["loss/G"] == 7.0
    assert row["perf/upkeep"] == 0


def test_flop_are_those_of_the_images_per_second() -> None:
    """perf/tflops is images/s times FLOP per image, perf/mfu its share of the peak, if known."""
    shares = {}
    for peak in (None, 5.0):
        meter = Meter(Accelerator(cpu=True), IMAGES, flop=3e9, peak=peak)
        meter.add(torch.tensor(1.0), [torch.zeros(3)])
        row = meter.row(1)
        assert row["perf/tflops"] == pytest.approx(row["perf/images_per_sec"] * 3e-3)
        shares[peak] = row.get("perf/mfu", 0) / row["perf/tflops"]
    assert shares == {None: 0, 5.0: pytest.approx(0.2)}
    assert "perf/tflops" not in Meter(Accelerator(cpu=True), IMAGES).row(1)


@pytest.mark.slow
def test_a_run_reports_its_upkeep(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """A grid before step 1, then a checkpoint and a grid at each: every row has seen some."""
    every = [f"train.{name}_every=1" for name in ("checkpoint", "sample", "log")]
    settings = [*training_settings, *every, "train.total_steps=3", f"run.dir={tmp_path}"]
    train(1, tiny_config, *settings)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["perf/upkeep"] > 0 for row in rows] == [True, True, True]
