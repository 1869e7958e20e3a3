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

from pipeline.config.recipe import StabilityConfig
from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.models.dcgan import init_weights, make_discriminator
from pipeline.models.noise import draw_z, rng
from pipeline.runtime import launch
from pipeline.training.gan import GAN
from pipeline.training.losses import discriminator_loss

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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_figures_are_their_formulas(smoothing: float) -> None:
    """Norms of weights and of what optimizers are given, logits before the update, distances over
    all pairs of images and of D's last hidden units; D's loss less its least value.
    """
    config = replace(CONFIG, stability=StabilityConfig(label_smoothing=smoothing))
    gan = GAN(config, launch.make_accelerator("fp32"), 1)
    with torch.no_grad():
        fake = gan.G(Z)
        logits = gan.D(REAL), gan.D(fake)
        real_units, fake_units = (gan.D.features(x) for x in (REAL, fake))
    loss = discriminator_loss(*logits, smoothing).item()
    # D's best D(x) is 1 - s, its best D(G(z)) is 0.
    x = torch.tensor([1 - smoothing]).logit().double().nan_to_num(posinf=100.0)
    least = discriminator_loss(x, torch.tensor([-100.0]), smoothing).item()
    sizes = {
        f"weight_norm/{name}": torch.cat([p.detach().flatten() for p in net.parameters()]).norm()
        for name, net in (("D", gan.D), ("G", gan.G))
    }
    sizes = {key: norm.item() for key, norm in sizes.items()}
    with gradients_of(gan.opt_D) as of_D, gradients_of(gan.opt_G) as of_G:
        row = stepped(gan, 2)
    norms = {
        f"grad_norm/{name}": torch.cat([g.flatten() for g in found]).norm().item()
        for name, found in (("D", of_D), ("G", of_G))
    }
    expected = {
        "watch/margin": (logits[0].mean() - logits[1].mean()).item(),
        "watch/diversity": pairs(fake) / pairs(REAL),
        "watch/features": pairs(fake_units) / pairs(real_units),
        "watch/loss_D": loss - least,
    }
    assert row == pytest.approx(sizes | norms | expected, rel=1e-4)


def test_one_image_has_no_diversity() -> None:
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    one = Z[:1].expand(COUNT, -1)
    gan.update_D([REAL], [one], 2)
    gan.update_G([one], 2)
    row = gan.watch.row()
    assert row["watch/diversity"] == pytest.approx(0, abs=1e-6)
    assert row["watch/features"] == pytest.approx(0, abs=1e-4)


def test_the_last_feature_map_is_what_the_logits_are_made_of() -> None:
    """DCGAN's D with classes: logits are products of its last layer's weights and the map."""
    model = ModelConfig(image_size=32, channels=1, ndf=4, num_classes=3)
    D = make_discriminator(model)
    init_weights(D, rng(0, "D"))
    images, y = torch.rand(4, 1, 32, 32, generator=rng(0, "x")), torch.tensor([0, 1, 2, 0])
    maps = D.features(images, y)
    assert maps.shape == (4, 16, 4, 4)
    outputs = D.layers.to_logit(maps).flatten(1)
    torch.testing.assert_close(D(images, y), outputs[:, 0] + outputs[range(4), 1 + y])


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


def on_this_rank(folder: str) -> None:
    gan = GAN(CONFIG, launch.make_accelerator("fp32"), 1)
    rank = int(os.environ["RANK"])
    torch.save(stepped(gan, 2, rows=slice(4 * rank, 4 * rank + 4)), Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    """Equal on both, and those of two micro-batches on one rank: watch/* to the last bit."""
    on_ranks(2, on_this_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    alone = stepped(GAN(CONFIG, launch.make_accelerator("fp32"), 2), 2, parts=2)
    assert first.keys() == alone.keys()
    for key, value in alone.items():
        assert first[key] == pytest.approx(value, rel=1e-4)
        if key.startswith("watch/"):  # weights are the first ones, so no float was added twice
            assert first[key] == value
