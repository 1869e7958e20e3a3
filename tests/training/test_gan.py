"""The two updates: what they do with their configuration, against the formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from gradients import gradients_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import Config, ModelConfig, OptimConfig, StabilityConfig, TrainConfig
from pipeline.models.noise import draw_z, rng
from pipeline.runtime import launch
from pipeline.training.diffaugment import augment
from pipeline.training.gan import GAN
from pipeline.training.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PAIRED

COUNT = 8
CONFIG = Config(
    model=ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4),
    optim=OptimConfig(g_lr=1e-3, d_lr=3e-3, beta1=0.4, beta2=0.99),
    train=TrainConfig(precision="fp32", ema_decay=0.75),
)
REAL = torch.rand(COUNT, 1, 32, 32, generator=rng(0, "x")) * 2 - 1
Z = draw_z(CONFIG.model, COUNT, rng(0, "z"))


def opened(config: Config, precision: str = "fp32") -> GAN:
    """A pair whose gradients are of a size that shows: first weights are very small."""
    gan = GAN(config, launch.make_accelerator(precision), 1)
    with torch.no_grad():
        for network in (gan.G, gan.D):
            for parameter in network.parameters():
                parameter.mul_(4)
    return gan


def slopes(loss: Tensor, network: Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("name", sorted(GENERATOR_LOSSES))
def test_both_updates_follow_the_configured_objective(name: str, augmented: bool) -> None:
    """Gradients and returned values of D's and G's update are those of the objective, written out.

    With DiffAugment D sees changed real and changed generated images in its own update, and G is
    taught through the changed ones (Zhao et al. 2020, equations 5 and 6); changing real ones alone
    would teach G the changes.
    """
    policy = ("color", "translation", "cutout") if augmented else ()
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, loss=name),
        stability=StabilityConfig(augment=list(policy)),
    )
    gan = opened(config)
    draws_D, draws_G = rng(0, "draws for D", 1), rng(0, "draws for G", 1)
    judged = [gan.D(augment(x, policy, draws_D)) for x in (REAL, gan.G(Z).detach())]
    loss_D = DISCRIMINATOR_LOSSES[name](*judged, 0.0)
    expected = slopes(loss_D, gan.D)
    with gradients_of(gan.opt_D) as found:
        terms = gan.update_D([REAL.clone()], [Z], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    scores = [loss_D.detach(), *(logits.detach().sigmoid().mean() for logits in judged)]
    torch.testing.assert_close(terms, torch.stack(scores))

    pair = [gan.D(augment(REAL, policy, draws_G))] if name in PAIRED else []
    loss_G = GENERATOR_LOSSES[name](gan.D(augment(gan.G(Z), policy, draws_G)), *pair)
    expected = slopes(loss_G, gan.G)
    with gradients_of(gan.opt_G) as found:
        returned = gan.update_G([Z], 1, real=[REAL.clone()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(returned, loss_G.detach())


def test_each_network_has_its_own_rate_and_both_have_the_moments() -> None:
    gan = opened(CONFIG)
    for optimizer, rate, network in ((gan.opt_G, 1e-3, gan.G), (gan.opt_D, 3e-3, gan.D)):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (rate, (0.4, 0.99))
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}


def test_smoothing_reaches_the_real_images_alone() -> None:
    """One-sided (Salimans et al. 2016, section 3.4): D's target is 0.8, else 0."""
    gan = opened(replace(CONFIG, stability=StabilityConfig(label_smoothing=0.2)))
    judged = gan.D(REAL), gan.D(gan.G(Z).detach())
    expected = slopes(DISCRIMINATOR_LOSSES["non_saturating"](*judged, 0.2), gan.D)
    with gradients_of(gan.opt_D) as found:
        gan.update_D([REAL.clone()], [Z], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_average_follows_g_by_its_decay() -> None:
    gan = opened(CONFIG)
    before = [p.clone() for p in gan.G_ema.parameters()]
    gan.update_D([REAL.clone()], [Z], 1)
    gan.update_G([Z], 1)
    gan.update_average(1)
    for old, now, averaged in zip(before, gan.G.parameters(), gan.G_ema.parameters(), strict=True):
        assert not torch.equal(old, now)
        torch.testing.assert_close(averaged, 0.75 * old + 0.25 * now)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "precision", "tolerance"),
    [
        pytest.param("default", "bf16", 2e-2, marks=pytest.mark.faults),  # it takes a minute
        ("reduce-overhead", "fp32", 1e-4),
    ],
)
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_updates_compute_what_eager_ones_do(
    mode: str, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of both, within the rounding of fused kernels; on a CPU no graph is replayed.

    All graphs are made in the first step, of fixed sizes.
    """
    symbols, create = set[str](), ShapeEnv.create_symbol

    def seen(*words: Any, **options: Any) -> Any:
        made = create(*words, **options)
        if not made.is_number:
            symbols.add(str(made))
        return made

    monkeypatch.setattr(ShapeEnv, "create_symbol", seen)
    AcceleratorState._reset_state()  # other tests of this process are in fp32
    graphs = counters["stats"]
    made = []
    compiled = replace(CONFIG, train=replace(CONFIG.train, compile=True, compile_mode=mode))
    found = []
    for config in (CONFIG, compiled):
        gan = opened(config, precision)
        for step in range(1, 4):
            terms = gan.update_D([REAL.clone()], [Z], step)
            found.append(torch.cat([terms, gan.update_G([Z], step)[None]]))
            made.append(graphs["unique_graphs"])
    assert made[2] < made[3] == made[4] == made[5]
    assert not symbols
    limits = {"rtol": tolerance, "atol": tolerance / 10}
    AcceleratorState._reset_state()
    torch.testing.assert_close(torch.stack(found[3:]), torch.stack(found[:3]), **limits)


def test_d_casts_its_weights_once_in_its_update() -> None:
    """In bf16, for real and generated images together; and once more for G, since they changed."""

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = function(*args, **kwargs or {})
            if function.__name__ == "_to_copy.default" and made.dtype == torch.bfloat16:
                cast.append(args[0].shape)
            return made

    AcceleratorState._reset_state()  # other tests of this process are in fp32
    cast: list[torch.Size] = []
    gan = opened(
        replace(CONFIG, model=replace(CONFIG.model, ndf=6)), "bf16"
    )  # other shapes than G's
    weights = [p.shape for n, p in gan.D.named_parameters() if "down" in n]
    for update in (lambda: gan.update_D([REAL], [Z], 1), lambda: gan.update_G([Z], 1)):
        cast.clear()
        with Casts():
            update()
        assert [cast.count(shape) for shape in weights] == [1] * len(weights)
    AcceleratorState._reset_state()


def state_of(gan: GAN) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a checkpoint holds of a pair after one step of both optimizers."""
    gan.update_D([REAL.clone()], [Z], 1)
    gan.opt_D.step()
    gan.update_G([Z], 1)
    gan.opt_G.step()
    weights = {name: dict(network.state_dict()) for name, network in gan.networks().items()}
    moments = {name: optimizer.state_dict() for name, optimizer in gan.optimizers().items()}
    return copy.deepcopy(weights), copy.deepcopy(moments)


def test_a_fork_trains_at_its_own_learning_rate() -> None:
    """Moments come from the checkpoint, learning rates and betas from the configuration."""
    weights, moments = state_of(opened(CONFIG))
    slower = opened(replace(CONFIG, optim=replace(CONFIG.optim, g_lr=1e-5, beta1=0.1)))
    slower.load(weights, moments)
    (group,) = slower.opt_G.param_groups
    assert (group["lr"], group["betas"]) == (1e-5, (0.1, 0.99))
    loaded = slower.opt_G.state_dict()["state"]
    assert all(
        torch.equal(loaded[k]["exp_avg"], v["exp_avg"]) for k, v in moments["G"]["state"].items()
    )


def without(mapping: dict[Any, Any], key: Any) -> None:
    del mapping[key]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w, _: without(w, "D"), "D lacks"),
        (lambda w, _: without(w["G"], next(iter(w["G"]))), "G lacks"),
        (lambda w, _: w["G_ema"].update(more=torch.zeros(1)), "G_ema has an unknown more"),
        (
            lambda w, _: w["G"].update({k: v[:1] for k, v in w["G"].items() if v.ndim > 1}),
            "must be",
        ),
        (lambda w, _: w["D"].update({k: v.double() for k, v in w["D"].items()}), "torch.float64"),
        (lambda _, m: without(m, "G"), "the optimizer of G is missing"),
        (lambda _, m: m.update(G=[]), "the optimizer of G is missing"),
        (lambda _, m: m["G"].update(state=None), "state of other parameters"),
        (lambda _, m: without(m["G"]["state"], 0), "state of other parameters"),
        (lambda _, m: without(m["D"]["state"][0], "exp_avg"), "other moments than Adam's"),
        (lambda _, m: m["D"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of parameter 0"),
        (lambda _, m: m["D"]["state"][1].update(step=4), "step of parameter 1"),
    ],
)
def test_a_state_of_other_networks_is_refused_before_anything_is_computed(
    damage: Callable[[Any, Any], None], message: str
) -> None:
    """Checksums cannot tell: whoever wrote the checkpoint also wrote them."""
    gan = opened(CONFIG)
    weights, moments = state_of(opened(CONFIG))
    damage(weights, moments)
    with pytest.raises(ValueError, match=message):
        gan.load(weights, moments)
