"""Compute GAN objectives on the logits of D.

D outputs a logit l; the papers' D(x) is sigmoid(l). On logits every loss is finite, and its
gradient is exact where sigmoid saturates: -log sigmoid(l) = softplus(-l) and
-log(1 - sigmoid(l)) = softplus(l). The hinge and least-squares objectives use l itself. Least
squares moves l towards 0 and 1, so the sigmoid that is logged as D(x) moves towards 0.5 and 0.73.
All inputs are float (N,). All results are float scalars, means over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return -E[log D(x)] - E[log(1 - D(G(z)))], -V(D, G) of Goodfellow et al. 2014, equation 1.

    With ``smoothing`` s the target of real images is 1 - s. The target of generated images stays 0
    (one-sided label smoothing, Salimans et al. 2016, arXiv 1606.03498, section 3.4).
    """
    loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
    # -(1 - s) log sigmoid(l) - s log(1 - sigmoid(l)) = softplus(-l) + s l
    return loss + smoothing * real_logits.mean() if smoothing else loss


def non_saturating(fake_logits: Tensor) -> Tensor:
    """Return -E[log D(G(z))], G's practical objective (Goodfellow et al. 2014, section 3)."""
    return softplus(-fake_logits).mean()


def minimax(fake_logits: Tensor) -> Tensor:
    """Return E[log(1 - D(G(z)))], G's part of V(D, G) (Goodfellow et al. 2014, equation 1)."""
    return -softplus(fake_logits).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))].

    Miyato et al. 2018, arXiv 1802.05957, equation 16.

    Raises:
        ValueError: ``smoothing`` is not 0; this objective has no targets.
    """
    if smoothing:
        raise ValueError("the hinge loss has no labels to smooth")
    return relu(1 - real).mean() + relu(1 + fake).mean()


def hinge(fake: Tensor) -> Tensor:
    """Return -E[D(G(z))] (Miyato et al. 2018, equation 17)."""
    return -fake.mean()


def least_squares_discriminator_loss(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2 (Mao et al. 2017, arXiv 1611.04076, eq. 9).

    With ``smoothing`` s the target of real images is 1 - s.
    """
    return (real - (1 - smoothing)).square().mean() / 2 + fake.square().mean() / 2


def least_squares(fake: Tensor) -> Tensor:
    """Return E[(D(G(z)) - 1)^2] / 2 (Mao et al. 2017, equation 9)."""
    return (fake - 1).square().mean() / 2


def gradient_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """Return E[|grad_x D(x)|^2] on real images: R1 without its factor gamma / 2.

    Mescheder et al. 2018, arXiv 1801.04406, equation 9. The result has a graph, so that D's weights
    can be trained on it. The gradient is of the sum of all logits. With BatchNorm in D the gradient
    at one image also holds its effect on the logits of the other images of the batch. D has no
    BatchNorm with ``model.spectral_norm`` or as an MLP.

    Args:
        real_logits: (N,), computed from ``real``.
        real: (N, C, S, S), requires grad.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "non_saturating": discriminator_loss,
    "minimax": discriminator_loss,
    "hinge": hinge_discriminator_loss,
    "least_squares": least_squares_discriminator_loss,
}
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "non_saturating": non_saturating,
    "minimax": minimax,
    "hinge": hinge,
    "least_squares": least_squares,
}
