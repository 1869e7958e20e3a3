"""What a row says about its last step: gradient norms, D's margin, the diversity of G's images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradients import gradients_of
from launching import assert_bitwise_equal
from ranks import on_ranks
from torch import Tensor

from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.models.noise import draw_z, rng
from pipeline.runtime import launch
from pipeline.training.gan import GAN

COUNT = 8
CONFIG = Config(
    model=ModelConfig(architecture="mlp", image_size=8, channels=1, z_dim=8, ngf=8, ndf=8),
    data=DataConfig(batch_size=COUNT),
    train=TrainConfig(precision="fp32", log_every=2, total_steps=5),
)
REAL = torch.rand(COUNT, 1, 8, 8, generator=rng(0, "x")) * 2 - 1
Z = draw_z(CONFIG.model, COUNT, rng(0, "z"))


def stepped(gan: GAN, step: int, parts: int = 1, rows: slice = slice(None)) -> dict[str, float]:
    real, z = REAL[rows].chunk(parts), Z[rows].chunk(parts)
    gan.update_D(real, z, step)
    gan.update_G(z, step)
    return gan.watch.row()


def pairs(images: Tensor) -> float:
    """Root mean squared distance over the pairs of different images, pair by pair."""
    squares = [
        float((a - b).square().sum())
        for i, a in enumerate(images)
        for j, b in enumerate(images)
        if i != j
    ]
    return float((sum(squares) / len(squares)) ** 0.5)


def test_the_figures_are_their_formulas() -> None:
    """Norms of what optimizers are given, logits before the update, distances over all pairs."""
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    with torch.no_grad():
        fake = gan.G(Z)
        margin = (gan.D(REAL).mean() - gan.D(fake).mean()).item()
    with gradients_of(gan.opt_D) as of_D, gradients_of(gan.opt_G) as of_G:
        row = stepped(gan, 2)
    norms = {
        f"grad_norm/{name}": torch.cat([g.flatten() for g in found]).norm().item()
        for name, found in (("D", of_D), ("G", of_G))
    }
    expected = norms | {"watch/margin": margin, "watch/diversity": pairs(fake) / pairs(REAL)}
    assert row == pytest.approx(expected, rel=1e-4)


def test_one_image_has_no_diversity() -> None:
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    one = Z[:1].expand(COUNT, -1)
    gan.update_D([REAL], [one], 2)
    gan.update_G([one], 2)
    assert gan.watch.row()["watch/diversity"] == pytest.approx(0, abs=1e-6)


def test_only_steps_that_end_a_row_are_watched_and_training_does_not_notice() -> None:
    """Steps 2, 4 and the last one; weights are bitwise those of a run that watches every step."""
    states = []
    for config in (CONFIG, replace(CONFIG, train=replace(CONFIG.train, log_every=1))):
        gan = GAN(config, launch.make_accelerator("fp32"), 1)
        rows = [stepped(gan, step) for step in range(1, 6)]
        states.append(
            {
                f"{n}.{k}": v
                for n, net in gan.networks().items()
                for k, v in net.state_dict().items()
            }
        )
        if config is CONFIG:
            assert rows[0] == {}
            assert rows[1] == rows[2] != rows[3] != rows[4]
    assert_bitwise_equal(*states)


def test_a_collapse_is_said_once_and_only_after_it_has_lasted() -> None:
    """500 steps below the limit in every row; a row above it, or one without a number, resets."""
    watch = GAN(CONFIG, launch.make_accelerator("fp32"), 1).watch
    healthy = {"loss/D": 1e-3, "watch/diversity": 0.1}
    won, nan = healthy | {"loss/D": 9e-4}, healthy | {"loss/D": float("nan")}
    said = {}
    for step in range(50, 3000, 50):
        row = {300: healthy, 700: nan}.get(step, won)
        if lines := watch.warnings(step, row):
            said[step] = lines
    assert list(said) == [1250]
    (line,) = said[1250]
    assert line.startswith(
        "step 1250: loss/D (0.0009) has been below 0.001 for 500 steps: D has won"
    )
    one = {"loss/D": 1.0, "watch/diversity": 0.0}
    steps = (3000, 3400, 3500, 3600)
    assert [len(watch.warnings(step, one)) for step in steps] == [0, 0, 1, 0]
    assert watch.warnings(4000, {}) == []


def on_this_rank(folder: str) -> None:
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    rank = int(os.environ["RANK"])
    torch.save(stepped(gan, 2, rows=slice(4 * rank, 4 * rank + 4)), Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    """Equal on both; norms are those of two micro-batches on one rank."""
    on_ranks(2, on_this_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    alone = stepped(GAN(CONFIG, launch.make_accelerator("fp32"), 2), 2, parts=2)
    for key in ("grad_norm/D", "grad_norm/G"):
        assert first[key] == pytest.approx(alone[key], rel=1e-4)
