"""Penalise D's squared gradient with respect to images: R1 at real ones, R2 at generated ones.

Every penalty estimates E[|grad_x D(x)|^2], without its factor gamma / 2 (Mescheder et al. 2018,
arXiv 1801.04406, equation 9), and D's weights can be trained on it:

    exact    autograd differentiates the gradient once more (double backward): the reference
    tangent  exact as well, without second derivatives of a backward pass, see ``tangent``
    along    (D(x + e v) - D(x))^2 / e^2 along v = grad / |grad|
    random   the same along random directions: right on average, noisy in a small batch

The gradient is of the sum of a batch's logits. BatchNorm in D couples the images of a batch: the
gradient at one image then includes its effect on the logits of the others. ``exact`` and
``tangent`` agree there too. The differences of ``along`` and ``random`` move all images at once
and compare each logit with itself, so with BatchNorm they estimate another number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

LENGTH = 0.05
"""Length of the step of ``along``: the distance of two images, with pixels in [-1, 1]."""
SIGMA = 0.01
"""Standard deviation of the step of ``random`` in each pixel."""

Judge = Callable[[Tensor], Tensor]
"""D with its augmentation: images (m, C, S, S) -> logits (m,) float32; equal draws each call."""
Penalty = Callable[[Judge, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Of (judge, images without a graph, generator on the CPU) -> (logits (m,), penalty scalar)."""


def exact(judge: Judge, images: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return logits and penalty by double backward."""
    images = images.detach().requires_grad_()
    logits = judge(images)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return logits, gradient.square().sum(dim=(1, 2, 3)).mean()


def tangent(judge: Judge, images: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return logits and penalty by a directional derivative, in one forward pass (forward mode).

    With v = grad_x D(x) as a constant, the derivative of D in direction v is <v, grad_x D(x)>. Its
    value is |v|^2. Its gradient in the weights is half of that of |grad_x D(x)|^2, by the product
    rule: the other half is the same with both factors exchanged.
    """
    v = _gradient(judge, images)
    with forward_ad.dual_level():
        with warnings.catch_warnings():
            # The first call makes torch 2.15 load code of its own that it calls deprecated.
            warnings.filterwarnings("ignore", ".*torch.jit.script` is deprecated", FutureWarning)
            images = forward_ad.make_dual(images.detach(), v)
        logits, slopes = forward_ad.unpack_dual(judge(images))
    assert slopes is not None, "D is not a function of the images"
    penalty = slopes.mean()
    return logits, 2 * penalty - penalty.detach()


def along(judge: Judge, images: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return logits and penalty by a finite difference along the gradient.

    Right up to D's curvature over ``LENGTH``. The kinks of LeakyReLU count as such: its weight
    gradient is further from the exact one than its value.
    """
    leaf = images.detach().requires_grad_()
    logits = judge(leaf)
    (v,) = torch.autograd.grad(logits.sum(), leaf, retain_graph=True)
    norms = v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
    moved = judge(images.detach() + LENGTH * v / norms[:, None, None, None])
    return logits, ((moved - logits) / LENGTH).square().mean()


def random(judge: Judge, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return logits and penalty by a finite difference in a random direction per image."""
    noise = torch.randn(images.shape, generator=generator).to(images)
    logits = judge(images.detach())
    moved = judge(images.detach() + SIGMA * noise)
    return logits, ((moved - logits) / SIGMA).square().mean()


def _gradient(judge: Judge, images: Tensor) -> Tensor:
    """Return grad_x of the sum of the logits, (m, C, S, S), as a constant."""
    leaf = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(leaf).sum(), leaf)
    return gradient


PENALTIES: dict[str, Penalty] = {
    "tangent": tangent,
    "along": along,
    "random": random,
    "exact": exact,
}
UNCOMPILED = ("tangent", "exact", "along")
"""Penalties whose passes through D run without torch.compile: it has neither these derivatives nor
a second backward pass through one graph."""
