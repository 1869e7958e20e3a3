"""What steadies a GAN: spectral norm, DiffAugment, R1, dropout, k steps of D; on two ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import gradients_of
from launching import assert_bitwise_equal, kill_at_step, started, state_of, train
from ranks import on_ranks
from torch import Tensor

from pipeline.config.recipe import POLICIES, StabilityConfig
from pipeline.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from pipeline.config.sizes import micro_batching
from pipeline.models.dcgan import init_weights, make_discriminator
from pipeline.models.mlp import dropout
from pipeline.models.noise import append_classes, draw_z, rng
from pipeline.models.spectral_norm import apply_spectral_norm, power_iterate, unnormalised_weight
from pipeline.runtime import launch
from pipeline.training.diffaugment import augment
from pipeline.training.gan import GAN
from pipeline.training.losses import discriminator_loss

BATCH, STEPS, CLASSES = 16, 3, 3
DCGAN = ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4, num_classes=CLASSES)
CONFIG = Config(
    model=replace(DCGAN, d_norm="spectral", loss="hinge"),
    data=DataConfig(batch_size=BATCH),
    optim=OptimConfig(d_steps=2),
    train=TrainConfig(precision="fp32", micro_batch=4),
    stability=StabilityConfig(r1_gamma=1.0, r1_every=2, augment=list(POLICIES)),
)
MLP = replace(
    CONFIG,
    model=replace(DCGAN, architecture="mlp", ngf=16, ndf=8, maxout=3, dropout=0.5),
    stability=StabilityConfig(),
)


PLAIN_MLP = ModelConfig(architecture="mlp", image_size=8, channels=1, z_dim=8, ngf=8, ndf=8)


def pictures(count: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(count, channels, size, size, generator=rng(0, "x")) * 2 - 1


# -- spectral norm ------------------------------------------------------------------------------


def test_the_spectral_norm_of_every_layer_is_one() -> None:
    """Against the singular values that numpy's way finds, after the first iterations."""
    D = make_discriminator(CONFIG.model)
    init_weights(D, rng(0, "D"))
    power_iterate(D, 200)
    layers = [layer for layer in D.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(layers) == 4
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, 1e-3)
    assert not [layer for layer in D.modules() if isinstance(layer, torch.nn.BatchNorm2d)]


def test_the_gradient_through_the_norm_is_that_of_the_formula() -> None:
    """Miyato et al. 2018, equation 12: (G - <G, W/s> u v^T) / s for the outer gradient G."""
    layer = torch.nn.Linear(5, 3, bias=False)
    apply_spectral_norm(layer)
    raw = unnormalised_weight(layer)
    with torch.no_grad():
        raw.copy_(torch.randn(3, 5, generator=rng(0, "W")))
    power_iterate(layer, 100)
    outer = torch.randn(3, 5, generator=rng(0, "G"))
    (layer.weight * outer).sum().backward()
    left, values, right = torch.linalg.svd(raw.detach(), full_matrices=False)
    normed = raw.detach() / values[0]
    by_hand = (outer - (outer * normed).sum() * torch.outer(left[:, 0], right[0])) / values[0]
    torch.testing.assert_close(raw.grad, by_hand, rtol=1e-4, atol=1e-5)


# -- R1, R2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_steps", "every"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_penalties_are_half_of_gamma_in_one_update_of_d_in_so_many(
    d_steps: int, every: int
) -> None:
    """D's gradients against those of its loss and of gamma / 2 |slope|^2, image by image, at real
    (R1) and at generated ones (R2); updates that go without are made up for by those that do not,
    whichever of the k steps of D they are.
    """
    config = Config(
        model=PLAIN_MLP,
        optim=OptimConfig(d_steps=d_steps),
        train=TrainConfig(precision="fp32"),
        stability=StabilityConfig(r1_gamma=3.0, r2_gamma=5.0, r1_every=every),
    )
    gan = GAN(config, launch.make_accelerator("fp32"), 1)
    with torch.no_grad():
        for parameter in gan.D.parameters():
            parameter.mul_(50)  # first weights are so small that D hardly has a slope
    for number in range(1, 7):
        x, z = pictures(4, 1, 8).roll(number, 0), torch.rand(4, 8, generator=rng(0, "z"))
        step, turn = divmod(number - 1, d_steps)
        loss = discriminator_loss(gan.D(x), gan.D(gan.G(z).detach()))
        if number % every == 0:
            for gamma, images in ((3.0, x), (5.0, gan.G(z))):
                for image in images.detach().clone().requires_grad_():
                    logit = gan.D(image[None]).sum()
                    (slope,) = torch.autograd.grad(logit, image, create_graph=True)
                    loss = loss + gamma / 2 * every * slope.square().sum() / len(x)
        expected = torch.autograd.grad(loss, list(gan.D.parameters()), materialize_grads=True)
        with gradients_of(gan.opt_D) as found:
            gan.update_D([x], [z], step + 1, turn=turn)
        gan.update_G([z], step + 1)
        torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


# -- DiffAugment --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*[(name,) for name in POLICIES], POLICIES])
def test_augmentation_is_a_function_of_its_stream_and_lets_gradients_through(
    policy: tuple[str, ...],
) -> None:
    x = pictures().requires_grad_()
    changed = augment(x, policy, rng(0, "draws"))
    assert changed.shape == x.shape
    assert torch.equal(changed, augment(x, policy, rng(0, "draws")))
    assert not torch.equal(changed, augment(x, policy, rng(0, "others")))
    assert not torch.equal(changed, x)
    changed.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


def test_each_change_is_what_it_says() -> None:
    """A shift moves the whole picture by at most an eighth; a hole is half as wide; colours keep
    what they should.
    """
    x = pictures(64)
    moved = augment(x, ("translation",), rng(0, "draws"))
    shifts = set()
    for before, after in zip(x, moved, strict=True):
        found = [
            (dy, dx)
            for dy in range(-4, 5)
            for dx in range(-4, 5)
            if torch.equal(after[:, 4 + dy : 28 + dy, 4 + dx : 28 + dx], before[:, 4:28, 4:28])
        ]
        assert len(found) == 1
        (dy, dx) = found[0]
        assert not after[:, : max(0, dy)].any()
        assert not after[:, :, : max(0, dx)].any()
        shifts.add(found[0])
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == set(range(-4, 5))
    holes = (augment(x, ("cutout",), rng(0, "draws")) == 0).all(1)
    assert holes.sum((1, 2)).max() == 16 * 16
    assert holes.sum((1, 2)).min() >= 8 * 8  # half of each side lies outside at a corner
    grey = pictures(64, channels=1)
    coloured = augment(grey, ("color",), rng(0, "draws"))
    numbers = torch.rand(7, 64, generator=rng(0, "draws"))
    brightness, contrast = numbers[0] - 0.5, numbers[2] + 0.5
    torch.testing.assert_close(coloured.mean((1, 2, 3)), grey.mean((1, 2, 3)) + brightness)
    torch.testing.assert_close(coloured.std((1, 2, 3)), grey.std((1, 2, 3)) * contrast)


def test_colours_are_the_formula_image_by_image() -> None:
    """Brightness, then saturation around an image's grey, then contrast around its mean; in three
    channels (Zhao et al. 2020, and the authors' code).
    """
    x = pictures(8)
    found = augment(x, ("color",), rng(0, "draws"))
    numbers = torch.rand(7, 8, generator=rng(0, "draws"))
    for k, image in enumerate(x):
        brighter = image + numbers[0, k] - 0.5
        grey = (brighter[0] + brighter[1] + brighter[2]) / 3
        saturated = (brighter - grey) * 2 * numbers[1, k] + grey
        mean = saturated.mean()
        expected = (saturated - mean) * (numbers[2, k] + 0.5) + mean
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_leaves_out_its_share() -> None:
    h = dropout(torch.ones(100, 100), 0.3, rng(0, "draws"))
    assert h.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (h == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


# -- the same on one rank and on two ---------------------------------------------------------------


def trained(config: Config) -> dict[str, Tensor]:
    """The state of all networks after STEPS steps on this rank, and what its optimizers were given
    at first: by D's first two updates, which are plain and with R1, and by G's first.
    """
    accelerator = launch.make_accelerator("fp32")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    micro_batch, accumulation = micro_batching(config, ranks)
    gan = GAN(config, accelerator, accumulation)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    with gradients_of(gan.opt_D) as of_D, gradients_of(gan.opt_G) as of_G:
        for step in range(1, STEPS + 1):
            for turn in range(config.optim.d_steps):
                number = step * config.optim.d_steps + turn
                x = torch.rand(BATCH, 1, 32, 32, generator=rng(0, "x", number))[rows] * 2 - 1
                labels = torch.arange(BATCH)[rows] % CLASSES
                z = draw_z(config.model, BATCH, rng(0, "z", number))[rows]
                noise = append_classes(config.model, z, labels).split(micro_batch)
                y = labels.split(micro_batch)
                gan.update_D(x.split(micro_batch), noise, step, y, turn)
            gan.update_G(noise, step, y, x.split(micro_batch))
            gan.update_average(step)
    in_D, in_G = (len(list(network.parameters())) for network in (gan.D, gan.G))
    first = {f"gradient D {1 + k // in_D} {k % in_D}": g for k, g in enumerate(of_D[: 2 * in_D])}
    first |= {f"gradient G 1 {k}": g for k, g in enumerate(of_G[:in_G])}
    return first | {
        f"{name}.{key}": value
        for name, network in gan.networks().items()
        for key, value in network.state_dict().items()
    }


RELATIVISTIC = replace(
    CONFIG,
    model=replace(DCGAN, d_norm="none", loss="relativistic"),
    stability=StabilityConfig(r1_gamma=1.0, r2_gamma=2.0, augment=list(POLICIES)),
)
CASES = {"dcgan": CONFIG, "mlp": MLP, "relativistic": RELATIVISTIC} | {
    name: replace(
        RELATIVISTIC, stability=replace(RELATIVISTIC.stability, penalty=name, penalty_share=0.5)
    )
    for name in ("exact", "along", "random")
}


def on_this_rank(folder: str) -> None:
    found = {name: trained(config) for name, config in CASES.items()}
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Spectral norm, R1 and R2 in each way, augmentation, classes and two steps of D under DDP;
    dropout in the MLP: ranks bitwise equal, and equal to one process up to the order of sums.
    """
    on_ranks(2, on_this_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, config in CASES.items():
        alone, start = trained(config), GAN(config, launch.make_accelerator("fp32"), 1).networks()
        for key, value in alone.items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key])
            if key.startswith("gradient"):
                # Before the second, Adam has turned the rounding of near-zero gradients into steps.
                # A finite difference divides rounding by its step.
                first = 1e-3 if name in ("along", "random") else 1e-5
                tolerance = (first if key.startswith("gradient D 1") else 1e-2) * value.abs().max()
            else:
                network, _, tensor = key.partition(".")
                before = start[network].state_dict()[tensor]
                assert not torch.equal(value, before) or not value.any()
                tolerance = 4e-4
            torch.testing.assert_close(
                ranks[0][name][key], value, rtol=0, atol=float(tolerance), msg=f"{name} {key}"
            )


def test_the_pairs_of_the_relativistic_loss_do_not_depend_on_micro_batches() -> None:
    """Networks without BatchNorm: four micro-batches give the gradients of one, R1 and R2 too."""
    stability = StabilityConfig(r1_gamma=1.0, r2_gamma=2.0)
    model = replace(PLAIN_MLP, loss="relativistic", image_size=32, num_classes=CLASSES)
    one, four = (
        trained(
            replace(
                CONFIG,
                model=model,
                stability=stability,
                train=replace(CONFIG.train, micro_batch=size),
            )
        )
        for size in (16, 4)
    )
    for key in (key for key in one if key.startswith(("gradient D 1", "gradient G"))):
        # Before G's, Adam has turned the rounding of D's near-zero gradients into steps.
        tolerance = (1e-2 if "G" in key else 1e-5) * one[key].abs().max().item()
        torch.testing.assert_close(four[key], one[key], rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("option", ["r1_gamma", "r2_gamma", "augment", "label_smoothing"])
def test_each_option_changes_the_training_and_none_leaves_it_alone(option: str) -> None:
    values: dict[str, Any] = {"r1_gamma": 1.0, "r2_gamma": 1.0, "augment": ["color"]}
    values["label_smoothing"] = 0.1
    plain = replace(CONFIG, model=DCGAN, stability=StabilityConfig())
    with_it = replace(plain, stability=StabilityConfig(**{option: values[option]}))
    before, again, after = trained(plain), trained(plain), trained(with_it)
    assert all(torch.equal(before[key], again[key]) for key in before)
    assert any(not torch.equal(before[key], after[key]) for key in before)


# -- the whole command -----------------------------------------------------------------------------

OPTIONS = {
    "dcgan": (
        *("model.d_norm=spectral", "model.num_classes=10", "optim.d_steps=2", "train.mirror=true"),
        *(
            "stability.r1_gamma=1",
            "stability.r2_gamma=1",
            "stability.r1_every=3",
            "stability.augment=[translation,cutout]",
        ),
    ),
    "mlp": ("model.architecture=mlp", "model.dropout=0.5", "model.maxout=2", "model.loss=minimax"),
}


@pytest.mark.slow
@pytest.mark.faults  # half a minute that `make test` has better uses for
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_killed_run_with_every_option_ends_bitwise_equal(
    name: str, tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """The power iteration's vector, draws and classes are part of what a resume restores."""
    settings = [*training_settings, *OPTIONS[name], "train.total_steps=8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(1, tiny_config, *settings, f"run.dir={whole}")
    with started(1, tiny_config, *settings, f"run.dir={cut}") as process:
        kill_at_step(process, cut, 6)
    train(1, tiny_config, *settings, f"run.dir={cut}")
    assert_bitwise_equal(state_of(cut, 8), state_of(whole, 8))
