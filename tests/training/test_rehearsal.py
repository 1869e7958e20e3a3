"""train --dry-run and --print-config: what a run would be, before it is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run, train

from pipeline.config.loading import load

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dry_run_tells_all_and_writes_nothing(
    ranks: int, tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Origins, time, epochs, memory, disk and warnings are printed once; the disk is as before."""
    shards = Path(training_settings[0].partition("=")[2])
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    words = ("data.batch_size=512", "train.micro_batch=256", "train.total_steps=100000")
    more = ("schedule.end=9", "schedule.g_lr=0", f"run.dir={tmp_path / 'run'}", "--dry-run")
    output = train(ranks, tiny_config, training_settings[0], *words, *more)
    for part in (
        f"optim.d_lr = 0.001  [{tiny_config}]",
        "data.batch_size = 512  [command line]",
        "train.keep = 3  [default]",
        f"batch of 512 = {ranks} rank(s) x {2 // ranks} micro-batch(es) x 256 images",
        "data order: uniform (lwb1): 3 of 3 shards at a time on a node, two images of a batch",
        "331 images of 32x32x1; 100000 steps are 154682.8 epochs",
        "schedule    optim.g_lr 0.001 to 0: cosine, steps 0 to 9",
        "s a step (mean of 3)",
        ", at step 12\n",
        ", at step 100000\n",
        "GiB for checkpoints and snapshots",
        "warning     data.batch_size (512): more than the 331 images",
        "warning     train.total_steps (100000): 154683 epochs",
    ):
        assert output.count(part) == 1, (part, output)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before


def test_a_dry_run_refuses_what_the_run_would(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Images of another size end it with code 2 and the run's own message."""
    words = (f"run.dir={tmp_path / 'run'}", "model.image_size=64", "--dry-run")
    code, output = run(1, tiny_config, *training_settings, *words)
    assert code == 2
    assert "images of 32x32 with 1 channel, the model wants 64x64" in output
    assert list(tmp_path.iterdir()) == []


def test_the_printed_configuration_is_the_one_that_would_run(
    tiny_config: Path, tmp_path: Path
) -> None:
    """--print-config is YAML from which the same configuration is loaded."""
    printed = train(1, tiny_config, "optim.g_lr=3e-4", "--print-config")
    copy = tmp_path / "copy.yaml"
    copy.write_text(printed)
    assert load(copy) == load(tiny_config, ["optim.g_lr=3e-4"])
