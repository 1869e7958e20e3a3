"""Change learning rates, Adam's beta2, gamma of R1 and R2 and the average of G during a run.

Each value is a function of the configuration and the step alone. A resume in the middle of a curve
therefore goes on exactly, on any number of ranks; an update that fp16 skips does not delay it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.schema import Config, flatten

METRICS = {
    "optim.g_lr": "lr/G",
    "optim.d_lr": "lr/D",
    "optim.beta2": "adam/beta2",
    "stability.r1_gamma": "gamma/R1",
    "stability.r2_gamma": "gamma/R2",
}
"""Keys that a schedule may change, and how metrics call them. ``schedule`` has a key of the same
name for the last value."""


@dataclass(frozen=True)
class Curve:
    """A value that moves from ``first`` to ``last`` between two steps, after a warm-up from 0."""

    first: float
    last: float
    shape: Literal["cosine", "linear"] = "cosine"
    start: int = 0
    end: int = 1
    warmup: int = 0

    def at(self, step: int) -> float:
        """Return the value in a step, counted from 1: ``last`` from step ``end`` on.

        cosine: (1 - cos(pi p)) / 2 of the way at a share p of the steps (Loshchilov & Hutter 2017,
        arXiv 1608.03983, equation 5, without restarts).
        """
        share = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        value = (1 - share) * self.first + share * self.last
        return value * min(1.0, step / self.warmup) if self.warmup else value

    @property
    def is_constant(self) -> bool:
        """Return whether the value is the same in every step."""
        return self.first == self.last and not self.warmup


class Schedules:
    """The values of a configuration at each step. ``METRICS`` has the keys."""

    def __init__(self, config: Config) -> None:
        self._config, plan = config, config.schedule
        self._curves = {}
        for key, first in flatten(config).items():
            if key in METRICS:
                last = getattr(plan, key.partition(".")[2])
                self._curves[key] = Curve(
                    first,
                    first if last is None else last,
                    plan.shape,
                    plan.start,
                    max(plan.end, plan.start + 1),
                    plan.warmup if key.endswith("_lr") else 0,
                )
        self._factors: Mapping[str, float] = {}

    def multiply(self, factors: Mapping[str, float]) -> None:
        """Multiply keys in every step by these numbers, and by no others."""
        self._factors = factors

    def at(self, key: str, step: int) -> float:
        """Return the value of a key in a step, counted from 1."""
        return self._curves[key].at(step) * self._factors.get(key, 1.0)

    def set_rates(self, optimizer: Any, key: str, step: int) -> None:
        """Give an Adam optimizer the learning rate ``key`` and the betas of a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.at(key, step)
            group["betas"] = self._config.optim.beta1, self.at("optim.beta2", step)

    def ema_decay(self, step: int) -> float:
        """Return the decay of G_ema after a step: 0.5 ** (images per step / half-life in images).

        The half-life is at most ``train.ema_rampup`` times the images seen so far (Karras et al.
        2020, arXiv 2006.06676: ``ema_rampup`` of the authors' code).
        """
        train, images = self._config.train, self._config.images_per_step
        if not train.ema_kimg:
            return train.ema_decay
        half_life = 1000 * train.ema_kimg
        if train.ema_rampup:
            half_life = min(half_life, train.ema_rampup * step * images)
        return float(0.5 ** (images / half_life))

    def row(self, step: int) -> dict[str, float]:
        """Return the metrics of a step for the values that vary or are multiplied."""
        varying = [key for key, curve in self._curves.items() if not curve.is_constant]
        found = {
            METRICS[key]: self.at(key, step) for key in {**dict.fromkeys(varying), **self._factors}
        }
        return found | (
            {"ema/decay": self.ema_decay(step)} if self._config.train.ema_rampup else {}
        )

    def describe(self) -> str:
        """Return one line that says what varies, and how; "" if nothing does."""
        plan, train, parts = self._config.schedule, self._config.train, []
        curves = [(key, curve) for key, curve in self._curves.items() if curve.first != curve.last]
        if moves := ", ".join(f"{key} {c.first:g} to {c.last:g}" for key, c in curves):
            parts.append(f"{moves}: {plan.shape}, steps {plan.start} to {plan.end}")
        if plan.warmup:
            parts.append(f"learning rates grow from 0 over {plan.warmup} steps")
        if train.ema_kimg:
            most = f", at most {train.ema_rampup:g} of the images seen" * bool(train.ema_rampup)
            parts.append(f"half-life of G_ema {train.ema_kimg:g} kimg{most}")
        parts += [f"{key} times {factor:g} (healed)" for key, factor in self._factors.items()]
        return "; ".join(parts)
