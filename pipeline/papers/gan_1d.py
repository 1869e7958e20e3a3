"""The game of Goodfellow et al. 2014 in one dimension, played and measured.

p_data is a mixture of two Gaussians, z is normal, G and D are small networks, the losses are the
pipeline's. Everything is measured by numeric integration: the value function V(D, G) of equation 1,
the best D* = p_data / (p_data + p_g) of proposition 1, and C(G) = -log 4 + 2 JSD(p_data, p_g) of
theorem 1, whose minimum -log 4 is reached where p_g = p_data and D = 1/2 everywhere.
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

PARTS = ((0.65, -0.35, 0.35), (0.35, 0.6, 0.3))  # p_data: weight, mean, standard deviation
LEFT, RIGHT, BINS = -2.5, 2.5, 500  # where densities are integrated
MOST_OUTSIDE = 0.01  # of p_g, beyond which the table says so
SUPPORT = 0.05  # of the highest density: D is undefined where there is nothing
BATCH, D_STEPS = 512, 4  # samples of each kind in an update, and k of algorithm 1
G_LR, D_LR = 5e-4, 2e-3
HIDDEN = 32  # units of each of two layers
G_START = (0.7, 0.25)  # mean and standard deviation of G(z) at first, beside most of the data
ALONE, G_ALONE = 1500, 10  # updates of D between (a) and (b), of G between (b) and (c)
SHOWN_Z = 21
TITLES = (
    "(a) at first",
    "(b) D trained alone: D = D*",
    "(c) G follows the slope of D",
    "(d) at the end: D = 1/2",
)


class Moment(NamedTuple):
    """What is measured of a pair (G, D); curves are (BINS,) over the bins' centres."""

    title: str
    p_g: Values
    D: Values
    best_D: Values
    there: NDArray[np.bool_]
    """Where p_data or p_g is: beyond, nothing teaches D."""
    from_z: Values
    """G(z) of the ``SHOWN_Z``, equally probable z."""
    value: float
    jsd: float
    """Jensen-Shannon divergence in nats."""
    off_best: float
    """Mean |D - D*| over p_data and p_g, half of each."""
    off_half: float
    """Mean |D - 1/2| likewise."""
    outside: float
    """The share of p_g beyond the bins, which no number above knows of."""


def centres() -> Values:
    """(BINS,): the middle of each bin."""
    edges = np.linspace(LEFT, RIGHT, BINS + 1)
    middles: Values = (edges[1:] + edges[:-1]) / 2
    return middles


def p_data() -> Values:
    """(BINS,): the density of the data."""
    density = np.zeros(BINS)
    for weight, mean, std in PARTS:
        bell = np.exp(-((centres() - mean) ** 2) / (2 * std**2))
        density += weight * bell / math.sqrt(2 * math.pi * std**2)
    return density


def quantiles(count: int) -> Tensor:
    """(count,) float32: values of z that cut its normal distribution into equal parts."""
    cuts: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return cuts.float()


def measure(title: str, G: nn.Module, D: nn.Module) -> Moment:
    """Densities and theorems of a pair; p_g from 200,000 equally probable z through G."""
    width, real = (RIGHT - LEFT) / BINS, p_data()
    count = 200_000
    with torch.no_grad():
        x = G(quantiles(count)[:, None])[:, 0].numpy()
        logits = D(torch.from_numpy(centres()).float()[:, None])[:, 0].double()
        from_z = G(quantiles(SHOWN_Z)[:, None])[:, 0].double().numpy()
    # log D and log(1 - D), exact where D itself is rounded to 0 or 1.
    log_D, log_not_D = (-softplus(sign * logits).numpy() for sign in (-1, 1))
    judged = logits.sigmoid().numpy()
    drawn = np.histogram(x, BINS, (LEFT, RIGHT))[0] / count / width
    both = real + drawn
    there = np.maximum(real, drawn) > SUPPORT * real.max()
    best = np.divide(real, both, out=np.full(BINS, 0.5), where=both > 0)

    def mean(weights: Values, values: Values) -> float:
        return float((weights * values).sum() * width)

    half = both / 2
    ratio = np.divide(drawn, half, out=np.ones(BINS), where=drawn > 0)
    jsd = mean(real, np.log(real / half)) / 2 + mean(drawn, np.log(ratio)) / 2
    return Moment(
        title,
        drawn,
        judged,
        best,
        there,
        from_z,
        value=mean(real, log_D) + mean(drawn, log_not_D),
        jsd=jsd,
        off_best=mean(half, np.abs(judged - best)),
        off_half=mean(half, np.abs(judged - 0.5)),
        outside=float(((x < LEFT) | (x > RIGHT)).mean()),
    )


class Pair:
    """G and D in one dimension, and their updates; every draw is a function of (seed, number)."""

    def __init__(self, seed: int) -> None:
        self.seed, self.drawn = seed, 0
        self.G, self.D = _network(seed, "G"), _network(seed, "D")
        _place(self.G, *G_START)
        self.opt_G = Adam(self.G.parameters(), lr=G_LR, betas=(0.5, 0.99), fused=True)
        self.opt_D = Adam(self.D.parameters(), lr=D_LR, betas=(0.5, 0.99), fused=True)

    def batch(self) -> tuple[Tensor, Tensor]:
        """(x, z), each (BATCH, 1): x from p_data, z standard normal."""
        draws = rng(self.seed, "theory", self.drawn)
        self.drawn += 1
        shares, means, stds = torch.tensor(PARTS).T
        part = torch.multinomial(shares, BATCH, replacement=True, generator=draws)
        x = means[part] + stds[part] * torch.randn(BATCH, generator=draws)
        return x[:, None], torch.randn(BATCH, 1, generator=draws)

    def update_D(self) -> None:
        """One step up V(D, G)."""
        x, z = self.batch()
        self.opt_D.zero_grad()
        discriminator_loss(self.D(x)[:, 0], self.D(self.G(z).detach())[:, 0]).backward()
        self.opt_D.step()

    def update_G(self) -> None:
        """One step of the non-saturating objective (section 3)."""
        _, z = self.batch()
        self.opt_G.zero_grad()
        non_saturating(self.D(self.G(z))[:, 0]).backward()
        self.opt_G.step()

    def at_rate(self, share: float) -> None:
        """Set both learning rates to a share of the first ones."""
        for optimizer, rate in ((self.opt_G, G_LR), (self.opt_D, D_LR)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share


def _network(seed: int, name: str) -> torch.nn.Sequential:
    """1 -> 1 with two hidden layers of tanh units; weights a function of the seed."""
    draws = rng(seed, f"theory: weights of {name}")
    first, second, last = nn.Linear(1, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        for layer in (first, second, last):
            layer.weight.normal_(0, layer.in_features**-0.5, generator=draws)
            layer.bias.normal_(0, 0.5, generator=draws)
        last.bias.zero_()
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)


def _place(G: nn.Module, mean: float, std: float) -> None:
    """Begin with G(z) close to mean + std * z: smooth, and off the data."""
    z = quantiles(BATCH)[:, None]
    fit = Adam(G.parameters(), lr=5e-3, fused=True)
    for _ in range(300):
        fit.zero_grad()
        (G(z) - mean - std * z).square().mean().backward()
        fit.step()


def play(seed: int, steps: int) -> list[Moment]:
    """The four moments of the figure; the last after ``steps`` steps of G."""
    pair = Pair(seed)
    moments: list[Moment] = []

    def look() -> None:
        moments.append(measure(TITLES[len(moments)], pair.G, pair.D))

    for _ in range(20):
        pair.update_D()
    look()
    for number in range(ALONE):
        pair.at_rate(1 - number / ALONE)
        pair.update_D()
    look()
    pair.at_rate(1)
    for _ in range(G_ALONE):
        pair.update_G()
    look()
    for step in range(steps):
        pair.at_rate(1 - step / steps)  # else both circle around the end
        for _ in range(D_STEPS):
            pair.update_D()
        pair.update_G()
    look()
    return moments


def table(moments: list[Moment]) -> str:
    """The theorems in numbers: V against C(G), which is V at D*, and what is left to the ends."""
    lines = [f"{'':<30}{'V(D, G)':>10}{'C(G)':>10}{'JSD':>10}{'E|D-D*|':>11}{'E|D-1/2|':>12}"]
    for one in moments:
        lines.append(
            f"{one.title:<30}{one.value:>10.4f}{_best_value(one):>10.4f}{one.jsd:>10.5f}"
            f"{one.off_best:>11.4f}{one.off_half:>12.4f}"
        )
    lines.append(f"-log 4 = {-math.log(4):.4f}; C(G) = -log 4 + 2 JSD (equation 6)")
    lines += [
        f"{one.title}: {100 * one.outside:.0f} % of p_g lies outside [{LEFT}, {RIGHT}], where "
        "nothing is integrated: its numbers are wrong"
        for one in moments
        if one.outside > MOST_OUTSIDE
    ]
    return "\n".join(lines)


def _best_value(moment: Moment) -> float:
    return -math.log(4) + 2 * moment.jsd


def summary(moments: list[Moment], seed: int, steps: int) -> dict[str, Any]:
    """The numbers of the figure as JSON."""
    names = ("title", "value", "jsd", "off_best", "off_half", "outside")
    rows = [
        {name: getattr(one, name) for name in names} | {"C": _best_value(one)} for one in moments
    ]
    return {"seed": seed, "steps": steps, "minus_log_4": -math.log(4), "moments": rows}
