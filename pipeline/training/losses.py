"""GAN objectives on logits. D outputs a logit l; D(x) = sigmoid(l) is a probability only on paper.

Working on logits keeps every loss finite and its gradient exact where sigmoid saturates:
-log sigmoid(l) = softplus(-l) and -log(1 - sigmoid(l)) = softplus(l). The hinge and least-squares
objectives take D's output as it is (so least squares draws it to 0 and 1, and the sigmoid that
is logged as D(x) towards 0.5 and 0.73). All inputs are float (N,), all results float scalars: means
over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))]: -V(D, G) of Goodfellow et al. 2014, equation 1.

    With ``smoothing`` s the target of real images is 1 - s instead of 1, of generated ones still 0
    (one-sided label smoothing, Salimans et al. 2016, arXiv 1606.03498, section 3.4).
    """
    loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
    # -(1 - s) log sigmoid(l) - s log(1 - sigmoid(l)) = softplus(-l) + s l
    return loss + smoothing * real_logits.mean() if smoothing else loss


def non_saturating(fake_logits: Tensor) -> Tensor:
    """-E[log D(G(z))], G's practical objective (Goodfellow et al. 2014, section 3)."""
    return softplus(-fake_logits).mean()


def minimax(fake_logits: Tensor) -> Tensor:
    """E[log(1 - D(G(z)))], G's side of the value function (Goodfellow et al. 2014, equation 1)."""
    return -softplus(fake_logits).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al. 2018, arXiv 1802.05957, eq. 16).

    Raises:
        ValueError: ``smoothing``, for which this objective has no target.
    """
    if smoothing:
        raise ValueError("the hinge loss has no labels to smooth")
    return relu(1 - real).mean() + relu(1 + fake).mean()


def hinge(fake: Tensor) -> Tensor:
    """-E[D(G(z))] (Miyato et al. 2018, equation 17)."""
    return -fake.mean()


def least_squares_discriminator_loss(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2 (Mao et al. 2017, arXiv 1611.04076, equation 9).

    With ``smoothing`` s the target of real images is 1 - s.
    """
    return (real - (1 - smoothing)).square().mean() / 2 + fake.square().mean() / 2


def least_squares(fake: Tensor) -> Tensor:
    """E[(D(G(z)) - 1)^2] / 2 (Mao et al. 2017, equation 9)."""
    return (fake - 1).square().mean() / 2


def gradient_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """E[|grad_x D(x)|^2] on real images: R1 without its gamma / 2 (Mescheder et al. 2018, eq. 9).

    arXiv 1801.04406. D's weights can be trained on it: the graph of the gradient is kept.

    The slope is that of the sum of all logits, which is each image's own only where D treats images
    apart. BatchNorm in D couples those of a batch: the slope at an image then holds its effect on
    the logits of the others too. ``model.spectral_norm`` and the MLPs have no BatchNorm in D.

    Args:
        real_logits: (N,), computed from ``real``.
        real: (N, C, S, S), requires grad.
    """
    (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return slope.float().square().sum(dim=(1, 2, 3)).mean()


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
