"""The sections of a configuration that say how G and D are trained against each other.

``schema`` composes them with the others. Keys of earlier versions are translated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Loss = Literal["non_saturating", "minimax", "hinge", "least_squares", "relativistic"]
POLICIES = ("color", "translation", "cutout")  # augmentations of DiffAugment
ACCEPTABLE = (
    *("optim.g_lr", "optim.d_lr", "optim.beta", "stability.", "schedule."),
    *("train.ema_", "train.mirror", "train.grad_dtype"),
)
"""Keys, or their beginnings, that a resume may change with ``run.accept_changes``."""


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    r1_gamma: float = 0.0
    """Weight gamma of the R1 penalty, 0 to 1000000: gamma / 2 times the squared gradient norm of D
    at real images is added to D's loss. 0 = off. R3GAN's authors decay it from 0.05 to 0.005 for
    CIFAR-10."""
    r2_gamma: float = 0.0
    """Weight gamma of the R2 penalty, 0 to 1000000: the same at generated images. 0 = off. Set it
    to r1_gamma with model.loss=relativistic."""
    penalty: Literal["exact", "tangent", "along", "random"] = "exact"
    """How R1 and R2 are computed. exact: by double backward. tangent: the same by a directional
    derivative along the gradient. along, random: by a finite difference along the gradient or in a
    random direction per image; random needs batches of 1024 or more. torch.compile leaves the
    penalised passes of all but random uncompiled."""
    penalty_share: float = 1.0
    """Share of each micro-batch that R1 and R2 are computed on, above 0 and at most 1. Below 1, D
    must have no BatchNorm."""
    r1_every: int = 1
    """Apply the R1 and R2 penalties in one of this many updates of D, at least 1, multiplied by
    this number (lazy regularisation)."""
    label_smoothing: float = 0.0
    """One-sided label smoothing, in [0, 0.5): D's target for real images is 1 minus this value. 0.1
    is usual; 0 = off."""
    augment: list[str] = field(default_factory=list)
    """DiffAugment policies for real and generated images: any of color, translation, cutout. Empty
    = off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    shape: Literal["cosine", "linear"] = "cosine"
    """Curve on which values move from those under optim and stability to those below."""
    start: int = 0
    """Step up to which the first values hold, 0 or more."""
    end: int = 0
    """Step from which the last values hold, above start; 0 = every value is constant. It does not
    follow train.total_steps, so a longer run changes no step that was done."""
    warmup: int = 0
    """Steps in which both learning rates grow linearly from 0; 0 = no warm-up."""
    g_lr: float | None = None
    """Last learning rate of G, 0 to 1e30; None = it stays optim.g_lr."""
    d_lr: float | None = None
    """Last learning rate of D, 0 to 1e30; None = it stays optim.d_lr."""
    beta2: float | None = None
    """Last beta2 of Adam, in [0, 1); None = it stays optim.beta2."""
    r1_gamma: float | None = None
    """Last gamma of R1, 0 to 1000000; None = it stays stability.r1_gamma."""
    r2_gamma: float | None = None
    """Last gamma of R2, 0 to 1000000; None = it stays stability.r2_gamma."""


def with_todays_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"section.key": value}`` of an earlier version under the keys of today."""
    found = dict(values)
    if found.pop("model.spectral_norm", False):
        found["model.d_norm"] = "spectral"
    return found
