"""R1 and R2 in four ways: equal to double backward, or as near to it as they say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gradients import gradients_of
from torch import Tensor, nn

from pipeline.config.recipe import StabilityConfig
from pipeline.config.schema import Config, ModelConfig, TrainConfig
from pipeline.models.dcgan import init_weights, make_discriminator
from pipeline.models.noise import rng
from pipeline.runtime import launch
from pipeline.training.diffaugment import augment
from pipeline.training.gan import GAN
from pipeline.training.penalties import PENALTIES, Judge

COUNT = 8
DCGAN = ModelConfig(image_size=32, channels=1, ndf=4, num_classes=3, z_dim=8, ngf=4)
MLP = replace(DCGAN, architecture="mlp", maxout=2, dropout=0.3, ndf=16)
MODELS = {
    **{norm: replace(DCGAN, d_norm=norm) for norm in ("batch", "none", "spectral")},
    "mlp": MLP,
}
CLASSES = torch.arange(COUNT) % 3
IMAGES = torch.rand(COUNT, 1, 32, 32, generator=rng(0, "x"), dtype=torch.float64) * 2 - 1


def discriminator(model: ModelConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    D = make_discriminator(model)
    init_weights(D, rng(0, "D"))
    if model.architecture == "mlp" or model.d_norm == "batch":
        with torch.no_grad():
            for parameter in D.parameters():
                parameter.mul_(4)  # first weights are so small that D hardly has a slope
    return D.to(dtype)


def judge_of(D: nn.Module) -> Judge:
    """D behind DiffAugment and dropout, with the same draws in every call."""

    def judge(images: Tensor) -> Tensor:
        draws = rng(0, "draws")
        images = augment(images, ("color", "translation", "cutout"), draws)
        logits: Tensor = D(images, CLASSES, draws)
        return logits

    return judge


def result(
    name: str, judge: Judge, weights: list[Tensor], images: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, the penalty, and its gradient in all weights as one vector."""
    logits, penalty = PENALTIES[name](judge, images, rng(0, "directions"))
    gradient = torch.autograd.grad(penalty, weights, materialize_grads=True)
    return logits.detach(), penalty.detach(), torch.cat([part.flatten() for part in gradient])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_tangent_is_exact(name: str) -> None:
    """Value and weight gradient of double backward within 1e-10 in float64: with BatchNorm's
    coupling, spectral norm, maxout and dropout, classes, and behind DiffAugment.
    """
    D = discriminator(MODELS[name])
    compute = partial(result, judge=judge_of(D), weights=list(D.parameters()), images=IMAGES)
    (logits, penalty, gradient), exact = compute("tangent"), compute("exact")
    torch.testing.assert_close(logits, exact[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(penalty, exact[1], rtol=1e-10, atol=0)
    tolerance = 1e-10 * exact[2].abs().max().item()
    torch.testing.assert_close(gradient, exact[2], rtol=0, atol=tolerance)
    assert exact[2].any()


@pytest.mark.parametrize("name", ["exact", "tangent"])
def test_the_penalty_by_hand(name: str) -> None:
    """D(x) = <w, x> + |x|^2 / 2 has slope w + x: the penalty, and its own gradient in w."""
    w = torch.tensor([1.0, -2.0, 0.5, 0.0], requires_grad=True)
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, -1.0, 0.0]]).reshape(2, 1, 2, 2)

    def judge(images: Tensor) -> Tensor:
        return images.flatten(1) @ w + images.flatten(1).square().sum(1) / 2

    logits, penalty = PENALTIES[name](judge, x, rng(0, "directions"))
    slopes = x.flatten(1) + w.detach()
    torch.testing.assert_close(logits, judge(x))
    assert penalty.item() == pytest.approx(slopes.square().sum(1).mean().item())
    (by_w,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(by_w, 2 * slopes.mean(0))


def smooth(pixels: int) -> tuple[Judge, list[Tensor]]:
    """A small D without kinks."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    with torch.no_grad():
        for k, parameter in enumerate(D.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=rng(0, "D", k)) / 32)
    return lambda images: D(images)[:, 0], list(D.parameters())


def test_along_the_gradient_is_exact_for_a_smooth_d_and_less_so_with_kinks() -> None:
    """The value within 2 % of exact. The weight gradient: a cosine above 0.999 without kinks; with
    LeakyReLU at its first weights above 0.3 only, so it is not the default.
    """
    judge, weights = smooth(1024)
    (_, exact, gradient), (_, found, other) = (
        result(name, judge, weights, IMAGES) for name in ("exact", "along")
    )
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    assert cosine(gradient, other) > 0.999
    D = discriminator(replace(DCGAN, d_norm="none", num_classes=0, ndf=16))
    (_, exact, gradient), (_, found, other) = (
        result(name, D, list(D.parameters()), IMAGES) for name in ("exact", "along")
    )
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    assert 0.3 < cosine(gradient, other) < 0.95


def test_a_random_direction_is_exact_on_average() -> None:
    """One image 20,000 times: value and gradient within 5 %. A batch of one may be far off."""
    judge, weights = smooth(16)
    image = torch.rand(1, 1, 4, 4, generator=rng(0, "x"), dtype=torch.float64) * 2 - 1
    _, exact, gradient = result("exact", judge, weights, image)
    _, found, other = result("random", judge, weights, image.expand(20_000, 1, 4, 4))
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    assert (other - gradient).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("norm", ["batch", "none", "spectral"])
@pytest.mark.parametrize("width", [4, 256])  # 256: the layers with a backward pass of our own
def test_the_tangent_in_bf16_is_near(norm: str, width: int) -> None:
    """Under autocast: value and weight gradient of fp32's double backward within 2 %."""
    D = discriminator(replace(DCGAN, d_norm=norm, ndf=width), torch.float32)
    images, weights = IMAGES[:, :, :32, :32].float(), list(D.parameters())
    _, exact, gradient = result("exact", judge_of(D), weights, images)
    with torch.autocast("cpu", torch.bfloat16):
        logits, found, other = result("tangent", judge_of(D), weights, images)
    assert logits.isfinite().all()
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0)
    assert cosine(gradient, other) > 0.98


# -- in the update of D ----------------------------------------------------------------------------


def gradients(config: Config) -> list[Tensor]:
    """What D's optimizer is given by the first update."""
    gan = GAN(config, launch.make_accelerator("fp32"), 1)
    z = torch.rand(COUNT, config.model.z_dim, generator=rng(0, "z"))
    with gradients_of(gan.opt_D) as found:
        gan.update_D([IMAGES.float()], [z], 1)
    return found


def config_of(**stability: Any) -> Config:
    return Config(
        model=replace(DCGAN, num_classes=0, d_norm="none", loss="relativistic"),
        train=TrainConfig(precision="fp32"),
        stability=StabilityConfig(r1_gamma=0.5, r2_gamma=2.0, **stability),
    )


def test_a_share_is_penalised_of_the_first_images() -> None:
    """Half of 8 images: the loss is of all, the penalty is the mean over the first 4."""
    gan = GAN(config_of(), launch.make_accelerator("fp32"), 1)
    z = torch.rand(COUNT, 8, generator=rng(0, "z"))
    real, fake = IMAGES.float(), gan.G(z).detach()
    loss = nn.functional.softplus(gan.D(fake) - gan.D(real)).mean()
    for gamma, images in ((0.5, real), (2.0, fake)):
        loss = loss + gamma / 2 * PENALTIES["exact"](gan.D, images[:4], rng(0, ""))[1]
    expected = torch.autograd.grad(loss, list(gan.D.parameters()))
    found = gradients(config_of(penalty_share=0.5))
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


def test_random_directions_are_a_function_of_the_step() -> None:
    """Twice the same; and not those of the augmentation."""
    augmented = config_of(penalty="random", augment=["color"])
    assert all(map(torch.equal, gradients(augmented), gradients(augmented)))


@pytest.mark.slow
@pytest.mark.parametrize("penalty", sorted(PENALTIES))
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_networks_are_penalised_as_eager_ones(penalty: str) -> None:
    """Within the rounding of fused kernels, in each way."""
    config = config_of(penalty=penalty)
    compiled = replace(config, train=replace(config.train, compile=True))
    expected = gradients(config)
    scale = max(gradient.abs().max().item() for gradient in expected)
    torch.testing.assert_close(gradients(compiled), expected, rtol=0, atol=1e-5 * scale)
