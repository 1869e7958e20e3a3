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

from pipeline.config.schema import ModelConfig
from pipeline.training.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    PAIRED,
    discriminator_loss,
    hinge,
    hinge_discriminator_loss,
    least_squares,
    least_squares_discriminator_loss,
    minimax,
    non_saturating,
    relativistic,
    relativistic_discriminator_loss,
)

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
        (gradient(lambda x: hinge_discriminator_loss(x, zeros), LOGITS), lambda x: -(x < 1)),
        (gradient(lambda x: hinge_discriminator_loss(zeros, x), LOGITS), lambda x: x > -1),
        (gradient(hinge, LOGITS), lambda _: -1),
        (gradient(lambda x: least_squares_discriminator_loss(x, zeros), LOGITS), lambda x: x - 1),
        (gradient(lambda x: least_squares_discriminator_loss(zeros, x), LOGITS), lambda x: x),
        (gradient(least_squares, LOGITS), lambda x: x - 1),
        # Smoothed by 0.1: D(x) is drawn to 0.9, D(x) - 0.9 is the slope.
        (gradient(lambda x: discriminator_loss(x, zeros, 0.1), LOGITS), lambda x: sigmoid(x) - 0.9),
        (gradient(lambda x: discriminator_loss(zeros, x, 0.1), LOGITS), sigmoid),
        (
            gradient(lambda x: least_squares_discriminator_loss(x, zeros, 0.1), LOGITS),
            lambda x: x - 0.9,
        ),
    ):
        assert got == pytest.approx([expected(x) / n for x in LOGITS], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", sorted(GENERATOR_LOSSES))
def test_directions_of_the_game(name: str) -> None:
    """A step down where D is undecided: D raises real and lowers fake logits; G raises its own."""
    loss_D, undecided = DISCRIMINATOR_LOSSES[name], [-0.5, 0.25, 0.75]
    middle = torch.full((3,), 0.5, dtype=torch.float64)
    assert max(gradient(lambda x: loss_D(x, middle, 0.0), undecided)) < 0
    assert min(gradient(lambda x: loss_D(middle, x, 0.0), [0.1, 0.25, 0.75])) > 0
    pair = (middle,) if name in PAIRED else ()
    assert max(gradient(lambda x: GENERATOR_LOSSES[name](x, *pair), undecided)) < 0


def test_hinge_and_least_squares_values_by_hand() -> None:
    """Real (3, 0.5), generated (-2, 1): each a mean of two terms that fit in a line."""
    real, fake = torch.tensor([3.0, 0.5]), torch.tensor([-2.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == (0 + 0.5) / 2 + (0 + 2) / 2
    assert hinge(fake).item() == 0.5
    squares = ((3 - 1) ** 2 + (0.5 - 1) ** 2) / 2 / 2 + (2**2 + 1) / 2 / 2
    assert least_squares_discriminator_loss(real, fake).item() == squares
    assert least_squares(fake).item() == (3**2 + 0) / 2 / 2
    with pytest.raises(ValueError, match="no labels"):
        hinge_discriminator_loss(real, fake, 0.1)


def test_relativistic_values_and_gradients_by_hand() -> None:
    """D: softplus(-(l - s)) of the pairs (2, 1), (-1, 3), slopes sigmoid(l - s) - 1 for the real
    logit and the opposite for the other; G: the same with both sides exchanged.
    """
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    loss_D = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(4))) / 2
    loss_G = (math.log(1 + math.exp(1)) + math.log(1 + math.exp(-4))) / 2
    assert relativistic_discriminator_loss(real, fake).item() == pytest.approx(loss_D)
    assert relativistic(fake, real).item() == pytest.approx(loss_G)
    x, y = real.double(), fake.double()
    slopes = [(sigmoid(1) - 1) / 2, (sigmoid(-4) - 1) / 2]
    of_D = relativistic_discriminator_loss
    assert gradient(lambda r: of_D(r, y), x.tolist()) == pytest.approx(slopes)
    assert gradient(lambda f: of_D(x, f), y.tolist()) == pytest.approx([-s for s in slopes])
    slopes = [(sigmoid(-1) - 1) / 2, (sigmoid(4) - 1) / 2]
    assert gradient(lambda f: relativistic(f, x), y.tolist()) == pytest.approx(slopes)
    assert relativistic(x, x).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="no labels"):
        relativistic_discriminator_loss(real, fake, 0.1)


def test_only_differences_of_relativistic_logits_count() -> None:
    """A constant added to both sides changes nothing, and the pairs are those of equal index."""
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(relativistic(real + 7, fake + 7), relativistic(real, fake))
    assert relativistic(real, fake).item() != pytest.approx(relativistic(real, fake.flip(0)).item())


def test_smoothed_labels_are_a_cross_entropy_with_that_target() -> None:
    """Real images against 0.8, generated ones against 0; least at D(x) = 0.8."""
    x, y = torch.tensor(LOGITS), torch.tensor([0.5, -0.5])
    expected = cross_entropy(x, torch.full_like(x, 0.8)) + cross_entropy(y, torch.zeros_like(y))
    torch.testing.assert_close(discriminator_loss(x, y, 0.2), expected)
    (slope,) = gradient(lambda x: discriminator_loss(x, x.new_zeros(1), 0.2), [math.log(4)])
    assert abs(slope) < 1e-12


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
        discriminator_loss(logits, logits, 0.1),
        hinge_discriminator_loss(logits, -logits),
        hinge(logits),
        relativistic(logits, -logits),
    ):
        assert torch.isfinite(loss)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.isfinite(grad).all()


def test_every_loss_of_the_configuration_exists() -> None:
    """The names that ``model.loss`` allows are the table's, the default among them."""
    assert set(get_args(get_type_hints(ModelConfig)["loss"])) == set(GENERATOR_LOSSES)
    assert set(DISCRIMINATOR_LOSSES) == set(GENERATOR_LOSSES)
    assert ModelConfig().loss in GENERATOR_LOSSES
