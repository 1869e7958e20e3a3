"""The minimax game of Goodfellow et al. 2014 in one dimension: training and measurements.

p_data is a mixture of two Gaussians and z is standard normal. G and D are small networks, trained
with the losses of the pipeline. All quantities are computed by numeric integration: the value
function V(D, G) of equation 1, the optimal D* = p_data / (p_data + p_g) of proposition 1, and
C(G) = -log 4 + 2 JSD(p_data, p_g) of theorem 1. The minimum of C(G) is -log 4; it is reached if and
only if p_g = p_data, and then D* = 1/2 everywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam

from pipeline.models.noise import rng
from pipeline.training.losses import discriminator_loss, non_saturating

Values = NDArray[np.float64]

MIXTURE = ((0.65, -0.35, 0.35), (0.35, 0.6, 0.3))
"""p_data: weight, mean and standard deviation of each Gaussian."""
LEFT, RIGHT, BINS = -2.5, 2.5, 500
"""Interval of the numeric integration, and its number of bins."""
MOST_OUTSIDE = 0.01
"""Share of p_g outside the interval above which the table warns."""
SUPPORT = 0.05
"""Density, as a share of the maximum of p_data, below which D* is not drawn."""
BATCH, D_STEPS = 512, 4
"""Samples of p_data and of z in an update, and updates of D per update of G (k of algorithm 1)."""
G_LR, D_LR = 5e-4, 2e-3
HIDDEN = 32
"""Units in each of the two hidden layers."""
G_START = (0.7, 0.25)
"""Mean and standard deviation of G(z) at the start; most of p_data lies elsewhere."""
D_ALONE_STEPS, G_ALONE_STEPS = 1500, 10
"""Updates of D alone between (a) and (b), and of G alone between (b) and (c)."""
SHOWN_Z = 21
"""Number of arrows from z to x = G(z) in the figure."""
MEASURED_Z = 200_000
"""Number of z that p_g is the histogram of."""
TITLES = (
    "(a) at first",
    "(b) D trained alone: D = D*",
    "(c) G follows the slope of D",
    "(d) at the end: D = 1/2",
)


class Moment(NamedTuple):
    """Measurements of (G, D) at one moment of the training.

    Curves are float64 of shape (BINS,), at the centres of the bins.
    """

    title: str
    p_g: Values
    D: Values
    best_D: Values
    """D*, the optimal D for this G."""
    support: NDArray[np.bool_]
    """True where p_data or p_g is large enough for D to be trained there."""
    from_z: Values
    """G(z) of ``SHOWN_Z`` quantiles of z, (SHOWN_Z,)."""
    value: float
    """V(D, G)."""
    jsd: float
    """Jensen-Shannon divergence of p_data and p_g in nats."""
    off_best: float
    """Mean of |D - D*| under (p_data + p_g) / 2."""
    off_half: float
    """Mean of |D - 1/2| under (p_data + p_g) / 2."""
    outside: float
    """Share of p_g outside [LEFT, RIGHT]; the other values do not include it."""


def centres() -> Values:
    """Return the centres of the bins, (BINS,)."""
    edges = np.linspace(LEFT, RIGHT, BINS + 1)
    middles: Values = (edges[1:] + edges[:-1]) / 2
    return middles


def p_data() -> Values:
    """Return the density of the data at the centres of the bins, (BINS,)."""
    density = np.zeros(BINS)
    for weight, mean, std in MIXTURE:
        bell = np.exp(-((centres() - mean) ** 2) / (2 * std**2))
        density += weight * bell / math.sqrt(2 * math.pi * std**2)
    return density


def quantiles(count: int) -> Tensor:
    """Return evenly spaced quantiles of the standard normal distribution, (count,) float32."""
    cuts: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return cuts.float()


def measure(title: str, G: nn.Module, D: nn.Module) -> Moment:
    """Measure G and D: their densities, V(D, G) and the distances from the optimum.

    Args:
        title: of the moment.
        G: (N, 1) z -> (N, 1) x.
        D: (N, 1) x -> (N, 1) logits.
    """
    width, real = (RIGHT - LEFT) / BINS, p_data()
    with torch.no_grad():
        x = G(quantiles(MEASURED_Z)[:, None])[:, 0].numpy()
        logits = D(torch.from_numpy(centres()).float()[:, None])[:, 0].double()
        from_z = G(quantiles(SHOWN_Z)[:, None])[:, 0].double().numpy()
    # log D and log(1 - D) from logits, because D itself may be rounded to 0 or 1.
    log_D, log_not_D = (-softplus(sign * logits).numpy() for sign in (-1, 1))
    D_x = logits.sigmoid().numpy()
    p_g = np.histogram(x, BINS, (LEFT, RIGHT))[0] / MEASURED_Z / width
    both = real + p_g
    support = np.maximum(real, p_g) > SUPPORT * real.max()
    best_D = np.divide(real, both, out=np.full(BINS, 0.5), where=both > 0)

    def mean(density: Values, values: Values) -> float:
        return float((density * values).sum() * width)

    half = both / 2
    ratio = np.divide(p_g, half, out=np.ones(BINS), where=p_g > 0)
    jsd = mean(real, np.log(real / half)) / 2 + mean(p_g, np.log(ratio)) / 2
    return Moment(
        title,
        p_g,
        D_x,
        best_D,
        support,
        from_z,
        value=mean(real, log_D) + mean(p_g, log_not_D),
        jsd=jsd,
        off_best=mean(half, np.abs(D_x - best_D)),
        off_half=mean(half, np.abs(D_x - 0.5)),
        outside=float(((x < LEFT) | (x > RIGHT)).mean()),
    )


class Pair:
    """G and D in one dimension, with their optimizers.

    Every batch is a function of (seed, number of the batch).
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.batches_drawn = seed, 0
        self.G, self.D = _network(seed, "G"), _network(seed, "D")
        _fit_to_line(self.G, *G_START)
        self.opt_G = Adam(self.G.parameters(), lr=G_LR, betas=(0.5, 0.99), fused=True)
        self.opt_D = Adam(self.D.parameters(), lr=D_LR, betas=(0.5, 0.99), fused=True)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw (x, z), each (BATCH, 1): x from p_data, z standard normal."""
        generator = rng(self.seed, "theory", self.batches_drawn)
        self.batches_drawn += 1
        weights, means, stds = torch.tensor(MIXTURE).T
        part = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        x = means[part] + stds[part] * torch.randn(BATCH, generator=generator)
        return x[:, None], torch.randn(BATCH, 1, generator=generator)

    def update_D(self) -> None:
        """Update D once, to increase V(D, G)."""
        x, z = self.batch()
        self.opt_D.zero_grad()
        discriminator_loss(self.D(x)[:, 0], self.D(self.G(z).detach())[:, 0]).backward()
        self.opt_D.step()

    def update_G(self) -> None:
        """Update G once by the non-saturating objective (section 3)."""
        _, z = self.batch()
        self.opt_G.zero_grad()
        non_saturating(self.D(self.G(z))[:, 0]).backward()
        self.opt_G.step()

    def scale_learning_rates(self, factor: float) -> None:
        """Set both learning rates to ``factor`` times their initial values."""
        for optimizer, rate in ((self.opt_G, G_LR), (self.opt_D, D_LR)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor


def _network(seed: int, name: str) -> torch.nn.Sequential:
    """Make a network 1 -> 1 with two hidden layers of tanh units and weights from the seed."""
    generator = rng(seed, f"theory: weights of {name}")
    first, second, last = nn.Linear(1, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        for layer in (first, second, last):
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.normal_(0, 0.5, generator=generator)
        last.bias.zero_()
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


def _fit_to_line(G: nn.Module, mean: float, std: float) -> None:
    """Train G by least squares until G(z) is close to mean + std * z."""
    z = quantiles(BATCH)[:, None]
    fit = Adam(G.parameters(), lr=5e-3, fused=True)
    for _ in range(300):
        fit.zero_grad()
        (G(z) - mean - std * z).square().mean().backward()
        fit.step()


def play(seed: int, steps: int) -> list[Moment]:
    """Train and return the four moments of the figure.

    Args:
        seed: of weights and samples.
        steps: updates of G between (c) and (d), each after ``D_STEPS`` updates of D.
    """
    pair = Pair(seed)
    moments: list[Moment] = []

    def record() -> None:
        moments.append(measure(TITLES[len(moments)], pair.G, pair.D))

    for _ in range(20):
        pair.update_D()
    record()
    for number in range(D_ALONE_STEPS):
        pair.scale_learning_rates(1 - number / D_ALONE_STEPS)
        pair.update_D()
    record()
    pair.scale_learning_rates(1)
    for _ in range(G_ALONE_STEPS):
        pair.update_G()
    record()
    for step in range(steps):
        # At a constant learning rate G and D would oscillate around the optimum.
        pair.scale_learning_rates(1 - step / steps)
        for _ in range(D_STEPS):
            pair.update_D()
        pair.update_G()
    record()
    return moments


def table(moments: list[Moment]) -> str:
    """Return a table of V(D, G), of C(G) = V(D*, G), and of the distances from the optimum."""
    lines = [f"{'':<30}{'V(D, G)':>10}{'C(G)':>10}{'JSD':>10}{'E|D-D*|':>11}{'E|D-1/2|':>12}"]
    lines += [
        f"{moment.title:<30}{moment.value:>10.4f}{_best_value(moment):>10.4f}{moment.jsd:>10.5f}"
        f"{moment.off_best:>11.4f}{moment.off_half:>12.4f}"
        for moment in moments
    ]
    lines.append(f"-log 4 = {-math.log(4):.4f}; C(G) = -log 4 + 2 JSD (equation 6)")
    lines += [
        f"{moment.title}: {100 * moment.outside:.0f} % of p_g lies outside [{LEFT}, {RIGHT}], the "
        "interval of integration: the numbers of this row are wrong"
        for moment in moments
        if moment.outside > MOST_OUTSIDE
    ]
    return "\n".join(lines)


def _best_value(moment: Moment) -> float:
    """Return C(G), by equation 6."""
    return -math.log(4) + 2 * moment.jsd


def summary(moments: list[Moment], seed: int, steps: int) -> dict[str, Any]:
    """Return the numbers of the figure, for JSON."""
    names = ("title", "value", "jsd", "off_best", "off_half", "outside")
    rows = [
        {name: getattr(moment, name) for name in names} | {"C": _best_value(moment)}
        for moment in moments
    ]
    return {"seed": seed, "steps": steps, "minus_log_4": -math.log(4), "moments": rows}
