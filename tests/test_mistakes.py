"""What a user can get wrong: one clear message, the right exit, nothing lost.

`tests/faults` does harm to files, disks and processes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import run, state_of, train

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def refused(*arguments: object, **env: str) -> str:
    """The message of a run that must end with exit code 2 and no traceback."""
    code, output = run(*arguments, **env)
    assert code == 2, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    return output


@pytest.fixture
def own_shards(training_shards: Path, tmp_path: Path) -> Path:
    """A copy of the training shards that a test may damage."""
    return Path(shutil.copytree(training_shards, tmp_path / "shards"))


def test_a_batch_that_cannot_be_cut_is_refused(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """33 images on 2 processes: the launcher fails, our message says what would fit."""
    uneven = ("data.batch_size=33", "train.micro_batch=null")
    code, output = run(2, tiny_config, *training_settings, f"run.dir={tmp_path / 'run'}", *uneven)
    assert code != 0
    assert "data.batch_size (33) must be divisible by world_size (2): use 32 or 34" in output


def test_a_snapshot_that_cannot_be_written_is_made_up_for(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """By the run that goes on from its checkpoint, which will not come by that step again."""
    arguments = (1, tiny_config, *training_settings, f"run.dir={tmp_path}", "train.total_steps=7")
    (tmp_path / "snapshots").touch()
    assert "snapshots/step_00000005: could not be written" in refused(*arguments)
    assert (tmp_path / "checkpoints" / "step_00000005").is_dir()
    (tmp_path / "snapshots").unlink()
    train(*arguments)
    for kind in ("snapshots", "checkpoints"):
        assert sorted(p.name for p in (tmp_path / kind).iterdir()) == [
            "step_00000005",
            "step_00000007",
        ]


def test_batchnorm_over_ranks_is_refused_on_cpus(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """It was left out in silence, and so another training than on GPUs."""
    settings = (*training_settings, f"run.dir={tmp_path / 'run'}", "train.sync_batchnorm=true")
    code, output = run(2, tiny_config, *settings)
    assert code != 0
    assert output.count("error: train.sync_batchnorm (true): PyTorch has it for GPUs only") == 1


def test_missing_shards_name_the_command_that_makes_them(tiny_config: Path, tmp_path: Path) -> None:
    """No folder: the data command, ready to paste."""
    output = refused(1, tiny_config, f"data.shards={tmp_path}/none", f"run.dir={tmp_path / 'run'}")
    assert "no such folder" in output
    assert f"pipeline.prepare fashion-mnist --out {tmp_path}/none --size 32 --channels 1" in output
    code, output = run(2, tiny_config, f"data.shards={tmp_path}/none", f"run.dir={tmp_path}/two")
    assert code != 0
    assert output.count("no such folder") == 1, "all ranks met it, one tells"


def test_images_of_another_size_are_refused(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Shards of 32x32 gray images and a 64x64 RGB model."""
    model = ("model.image_size=64", "model.channels=3")
    output = refused(1, tiny_config, *training_settings, f"run.dir={tmp_path / 'run'}", *model)
    assert "images of 32x32 with 1 channel, the model wants 64x64 with 3 channels" in output
    assert "--size 64 --channels 3" in output


def test_a_changed_configuration_is_refused_with_its_differences(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """A resume under another learning rate names both values; other data names the field."""
    arguments = (
        1,
        tiny_config,
        *training_settings,
        f"run.dir={tmp_path / 'run'}",
        "train.total_steps=2",
    )
    train(*arguments)
    output = refused(*arguments, "optim.g_lr=5e-4")
    assert "optim.g_lr: 0.001 -> 0.0005" in output


def test_other_data_in_the_same_run_is_refused(
    tiny_config: Path, training_settings: list[str], own_shards: Path, tmp_path: Path
) -> None:
    """The order would be meaningless: the shards' fingerprint is part of the checkpoint."""
    arguments = (
        1,
        tiny_config,
        *training_settings,
        f"run.dir={tmp_path / 'run'}",
        "train.total_steps=2",
    )
    train(*arguments)
    (own_shards / "shard-1.tar").unlink()
    (own_shards / "index.json").unlink()
    subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", str(own_shards), "--out", str(own_shards)],
        check=True,
    )
    output = refused(*arguments, f"data.shards={own_shards}", "train.total_steps=4")
    assert "trained on other data: fingerprint was" in output


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_intact(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """An absurd learning rate: the message names loss, step and rank; the last save is finite."""
    arguments = (1, tiny_config, *training_settings, f"run.dir={tmp_path / 'run'}")
    rates = ("optim.d_lr=1e30", "optim.g_lr=1e30", "train.checkpoint_every=1")
    output = refused(*arguments, *rates)
    assert "became NaN or infinite at step" in output
    assert "on rank 0" in output
    for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
        step = int(path.name.removeprefix("step_"))
        tensors = state_of(tmp_path / "run", step).items()
        assert all(value.isfinite().all() for key, value in tensors if key[:3] != "opt")


def test_fp16_without_a_gpu_is_refused(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Said at once, with the precisions that work here."""
    precision = "train.precision=fp16"
    output = refused(1, tiny_config, *training_settings, f"run.dir={tmp_path / 'run'}", precision)
    assert "train.precision (fp16): needs a CUDA device" in output
