"""Compute GAN objectives on the logits of D.

D outputs a logit l; the papers' D(x) is sigmoid(l). On logits every loss is finite, and its
gradient is exact where sigmoid saturates: -log sigmoid(l) = softplus(-l) and
-log(1 - sigmoid(l)) = softplus(l). The hinge and least-squares objectives use l itself. Least
squares moves l towards 0 and 1, so the sigmoid that is logged as D(x) moves towards 0.5 and 0.73.
All inputs are float (N,). All results are float scalars, means over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def relativistic(larger: Tensor, smaller: Tensor) -> Tensor:
    """Return E[softplus(-(l - s))] = -E[log sigmoid(l - s)] over pairs: GAN on pairs (RpGAN).

    Jolicoeur-Martineau 2018 (arXiv 1807.00734, section 4), as used by R3GAN (Huang et al. 2024,
    arXiv 2501.05441, section 2). D minimises it with (D(x), D(G(z))): in each pair the real image
    shall get the larger logit. G minimises it with (D(G(z)), D(x)). Only differences of logits
    count, so that sigmoid(l), which is logged as D(x), says nothing by itself.

    The pairs are those of equal index. Images and z are rows of one global batch, which ranks and
    micro-batches cut at the same places. So the pairs do not depend on their number.

    Args:
        larger: (N,) logits of the images that shall get the larger one.
        smaller: (N,) logits of the others.
    """
    return softplus(smaller - larger).mean()


def relativistic_discriminator_loss(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return E[softplus(-(D(x) - D(G(z))))], see ``relativistic``.

    Raises:
        ValueError: ``smoothing`` is not 0; this objective has no targets.
    """
    if smoothing:
        raise ValueError("the relativistic loss has no labels to smooth")
    return relativistic(real, fake)


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "non_saturating": discriminator_loss,
    "minimax": discriminator_loss,
    "hinge": hinge_discriminator_loss,
    "least_squares": least_squares_discriminator_loss,
    "relativistic": relativistic_discriminator_loss,
}
"""Of (real_logits, fake_logits, smoothing)."""
GENERATOR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "non_saturating": non_saturating,
    "minimax": minimax,
    "hinge": hinge,
    "least_squares": least_squares,
    "relativistic": relativistic,
}
"""Of (fake_logits,); those in ``PAIRED`` of (fake_logits, real_logits)."""
PAIRED = ("relativistic",)


def least_discriminator_loss(loss: str, smoothing: float) -> float:
    """Return the infimum of D's objective: what it nears once D tells all images apart.

    0, but for smoothed targets s of the log losses: their cross-entropy is at least
    -(1 - s) log(1 - s) - s log s.
    """
    if not smoothing or loss == "least_squares":
        return 0.0
    return -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing)
