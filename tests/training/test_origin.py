"""A new run that starts from the weights of another: which, with what, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import STATE, assert_bitwise_equal, kill_at_step, run, started, state_of, train
from torch import Tensor

from pipeline.config.schema import Config, ModelConfig, TrainConfig
from pipeline.models.noise import draw_z, rng
from pipeline.runs import checkpoint
from pipeline.runs.snapshot import GENERATOR, HUB_WEIGHTS, export_snapshot
from pipeline.runtime import launch
from pipeline.runtime.documents import read_document
from pipeline.runtime.errors import CheckpointError, ConfigError
from pipeline.runtime.files import sha256_of
from pipeline.training.gan import GAN
from pipeline.training.origin import start_from_origin

CONFIG = Config(
    model=ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4),
    train=TrainConfig(precision="fp32"),
)
ACCELERATOR = launch.make_accelerator("fp32")


def state(gan: GAN) -> dict[str, Tensor]:
    """Weights and Adam's moments."""
    found = {
        f"{n}.{k}": v for n, net in gan.networks().items() for k, v in net.state_dict().items()
    }
    for name, optimizer in gan.optimizers().items():
        for index, moments in optimizer.state_dict()["state"].items():
            found |= {f"opt_{name}.{index}.{key}": value for key, value in moments.items()}
    return {key: value.clone() for key, value in found.items()}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GAN]:
    """A run folder with checkpoints of steps 1 and 2 and a snapshot of step 2, and its networks."""
    folder, gan = tmp_path_factory.mktemp("other") / "run", GAN(CONFIG, ACCELERATOR, 1)
    real = [torch.rand(4, 1, 32, 32, generator=rng(0, "x")) * 2 - 1]
    z = [draw_z(CONFIG.model, 4, rng(0, "z"))]
    for step in (1, 2):
        gan.update_D(real, z, step)
        gan.update_G(z, step)
        gan.update_average(step)
        checkpoint.save(folder, step, gan.networks(), gan.optimizers(), STATE)
    export_snapshot(folder, 2, gan.G_ema.state_dict(), CONFIG)
    return folder, gan


def begun(path: Path, model: ModelConfig = CONFIG.model, **options: Any) -> tuple[GAN, GAN, Any]:
    """A pair of other first weights that starts from ``path``, the pair before, and the event."""
    config = replace(
        CONFIG,
        model=model,
        run=replace(CONFIG.run, seed=1),
        train=replace(CONFIG.train, init=str(path), **options),
    )
    gan, before = GAN(config, ACCELERATOR, 1), GAN(config, ACCELERATOR, 1)
    return gan, before, start_from_origin(config, ACCELERATOR, gan)


@pytest.mark.parametrize("optimizers", [False, True])
@pytest.mark.parametrize("networks", ["both", "G", "D"])
def test_the_chosen_networks_come_from_the_newest_checkpoint(
    other: tuple[Path, GAN], networks: str, optimizers: bool
) -> None:
    """With their moments if wanted; what is not chosen is as in any new run."""
    folder, theirs = other
    gan, before, event = begun(folder, init_networks=networks, init_optimizers=optimizers)
    chosen = ("G.", "G_ema.", "opt_G.", "D.", "opt_D.")
    chosen = {"both": chosen, "G": chosen[:3], "D": chosen[3:]}[networks]
    expected = state(before) | {
        key: value
        for key, value in state(theirs).items()
        if key.startswith(chosen) and (optimizers or not key.startswith("opt_"))
    }
    assert_bitwise_equal(state(gan), expected)
    path = folder / "checkpoints" / "step_00000002"
    assert event == {
        "step": 0,
        "init": str(path),
        "init_step": 2,
        "sha256": sha256_of(path / "state.json"),
        "networks": ["G", "D"] if networks == "both" else [networks],
        "optimizers": optimizers,
    }


def test_a_checkpoint_and_a_snapshot_can_be_named(other: tuple[Path, GAN], tmp_path: Path) -> None:
    """G and G_ema start as the snapshot's G; so they do from a folder for the Hub."""
    folder, theirs = other
    assert begun(folder / "checkpoints" / "step_00000001")[2]["init_step"] == 1
    snapshot = folder / "snapshots" / "step_00000002"
    hub = Path(shutil.copytree(snapshot, tmp_path / "hub"))
    (hub / GENERATOR).rename(hub / HUB_WEIGHTS)
    averaged = theirs.G_ema.state_dict()
    for path, step, file in ((snapshot, 2, GENERATOR), (hub, None, HUB_WEIGHTS)):
        gan, before, event = begun(path, init_networks="G")
        for network in (gan.G, gan.G_ema):
            assert_bitwise_equal(dict(network.state_dict()), dict(averaged))
        assert_bitwise_equal(dict(gan.D.state_dict()), dict(before.D.state_dict()))
        assert (event["init_step"], event["sha256"]) == (step, sha256_of(path / file))


@pytest.mark.parametrize(
    ("place", "model", "options", "message"),
    [
        ("", {"ngf": 8}, {}, "G: layers.norm_16.bias is torch.float32 (4,), must be torch.float32"),
        ("", {"num_classes": 2}, {}, "G: layers.project.weight is torch.float32 (8, "),
        ("", {"num_classes": 2}, {"init_networks": "D"}, "D: layers.to_logit.weight is torch."),
        ("", {"d_norm": "none"}, {"init_networks": "D"}, "D lacks layers.down_16.bias"),
        (
            "snapshots/step_00000002",
            {},
            {},
            "train.init_networks (both): must be G with train.init",
        ),
        (
            "snapshots/step_00000002",
            {},
            {"init_networks": "G", "init_optimizers": True},
            "train.init_optimizers (True): must be False with train.init",
        ),
        ("snapshots", {}, {}, "must be the folder of a run with checkpoints, of a checkpoint"),
        ("a" * 300, {}, {}, "cannot be read: File name too long"),
        ("nowhere", {}, {}, "must be the folder of a run with checkpoints, of a checkpoint"),
    ],
)
def test_what_does_not_fit_is_one_message(
    other: tuple[Path, GAN], place: str, model: Any, options: Any, message: str
) -> None:
    """The first tensor that differs, or what must be given instead."""
    with pytest.raises(ConfigError) as caught:
        begun(other[0] / place, replace(CONFIG.model, **model), **options)
    assert message in str(caught.value)
    assert str(other[0]) in str(caught.value)


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_named(
    other: tuple[Path, GAN], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(other[0], tmp_path / "run"))
    newest = folder / "checkpoints" / "step_00000002"
    (newest / "D.safetensors").write_bytes(b"torn")
    assert begun(folder)[2]["init_step"] == 1
    with pytest.raises(CheckpointError, match=r"D\.safetensors"):
        begun(newest)


@pytest.mark.slow
def test_a_run_reads_its_origin_once(
    tiny_config: Path,
    training_settings: list[str],
    gray_32: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    """Two ranks, other data, seed and rate: killed, then resumed without the origin: bitwise."""
    first, whole, cut = tmp_path / "first", tmp_path / "whole", tmp_path / "cut"
    train(1, tiny_config, *training_settings, "train.total_steps=3", f"run.dir={first}")
    changed = (f"data.shards={gray_32(96)}", "run.seed=5", "optim.g_lr=1e-4", f"train.init={first}")
    words = (2, tiny_config, *changed, "train.total_steps=8")
    output = train(*words, f"run.dir={whole}")
    assert f"weights of G and D from {first}/checkpoints/step_00000003" in output
    with started(*words, f"run.dir={cut}") as process:
        kill_at_step(process, cut, 3)  # before its first checkpoint of a step
    weights = {k: v for k, v in state_of(first, 3).items() if not k.startswith("opt_")}
    assert_bitwise_equal(state_of(cut, 0), weights)
    shutil.rmtree(first)
    train(*words, f"run.dir={cut}")
    assert_bitwise_equal(state_of(cut, 8), state_of(whole, 8))
    (event,) = read_document(cut / "checkpoints" / "step_00000008" / "state.json")["events"]
    assert (event["init"], event["init_step"]) == (f"{first}/checkpoints/step_00000003", 3)
    code, output = run(1, *words[1:], f"run.dir={tmp_path / 'new'}")
    assert code == 2
    assert output.count(f"train.init ({first}): must be the folder of a run") == 1, output
