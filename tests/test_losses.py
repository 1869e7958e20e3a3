"""The objectives against hand-derived values and against torch's own cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from pipeline.config import ModelConfig
from pipeline.losses import GENERATOR_LOSSES, discriminator_loss, minimax, non_saturating

LOGITS = [-30.0, -3.0, -0.5, 0.0, 0.25, 2.0, 30.0]
logit_lists = st.lists(st.floats(-60, 60), min_size=1, max_size=9)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient(loss: Callable[[Tensor], Tensor], logits: list[float]) -> list[float]:
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad.tolist()


def test_an_undecided_discriminator_gives_the_papers_values() -> None:
    """D(x) = D(G(z)) = 1/2: V = -log 4 (Goodfellow et al. 2014, theorem 1), and log 2 for G."""
    zero = torch.zeros(7)
    assert discriminator_loss(zero, zero).item() == pytest.approx(math.log(4))
    assert non_saturating(zero).item() == pytest.approx(math.log(2))
    assert minimax(zero).item() == pytest.approx(-math.log(2))


@given(real=logit_lists, fake=logit_lists)
def test_equal_to_binary_cross_entropy(real: list[float], fake: list[float]) -> None:
    """D: cross-entropy of real as 1 plus of fake as 0; G: of fake as 1, or minus that as 0."""
    x, y = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    as_real, as_fake = torch.ones_like, torch.zeros_like
    close = torch.testing.assert_close
    close(discriminator_loss(x, y), cross_entropy(x, as_real(x)) + cross_entropy(y, as_fake(y)))
    close(non_saturating(y), cross_entropy(y, as_real(y)))
    close(minimax(y), -cross_entropy(y, as_fake(y)))


def test_gradients_by_hand() -> None:
    """Per logit l of n: D(x)-1 and D(G(z)) over n for D; D-1 or -D over n for G."""
    n = len(LOGITS)
    zeros = torch.zeros(n, dtype=torch.float64)
    for got, expected in (
        (gradient(lambda x: discriminator_loss(x, zeros), LOGITS), lambda x: sigmoid(x) - 1),
        (gradient(lambda x: discriminator_loss(zeros, x), LOGITS), sigmoid),
        (gradient(non_saturating, LOGITS), lambda x: sigmoid(x) - 1),
        (gradient(minimax, LOGITS), lambda x: -sigmoid(x)),
    ):
        assert got == pytest.approx([expected(x) / n for x in LOGITS], rel=1e-12, abs=1e-14)


def test_directions_of_the_game() -> None:
    """A step down: D raises real and lowers fake logits; G raises fake logits by either loss."""
    zeros = torch.zeros(len(LOGITS), dtype=torch.float64)
    assert max(gradient(lambda x: discriminator_loss(x, zeros), LOGITS)) < 0
    assert min(gradient(lambda x: discriminator_loss(zeros, x), LOGITS)) > 0
    for loss in GENERATOR_LOSSES.values():
        assert max(gradient(loss, LOGITS)) < 0


def test_only_the_non_saturating_loss_teaches_when_the_discriminator_wins() -> None:
    """At D(G(z)) ~ 1e-9 minimax has almost no gradient; the other has all of it (section 3)."""
    (saturated,), (strong,) = gradient(minimax, [-20.0]), gradient(non_saturating, [-20.0])
    assert abs(saturated) < 1e-8
    assert strong == pytest.approx(-1, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_finite_at_extreme_logits(size: float, dtype: torch.dtype) -> None:
    """Loss and gradient stay finite where a sigmoid is exactly 0 or 1, in half precision too."""
    logits = torch.full((4,), size, dtype=dtype, requires_grad=True)
    for loss in (
        discriminator_loss(logits, -logits),
        discriminator_loss(-logits, logits),
        non_saturating(logits),
        minimax(logits),
    ):
        assert torch.isfinite(loss)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.isfinite(grad).all()


def test_every_loss_of_the_configuration_exists() -> None:
    """The names that ``model.loss`` allows are the table's, the default among them."""
    assert set(get_args(get_type_hints(ModelConfig)["loss"])) == set(GENERATOR_LOSSES)
    assert ModelConfig().loss in GENERATOR_LOSSES
