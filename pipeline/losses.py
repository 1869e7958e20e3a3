"""GAN objectives on logits. D outputs a logit l; D(x) = sigmoid(l) is a probability only on paper.

Working on logits keeps every loss finite and its gradient exact where sigmoid saturates:
-log sigmoid(l) = softplus(-l) and -log(1 - sigmoid(l)) = softplus(l).
All inputs are float (N,) logits, all results float scalars: means over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))]: -V(D, G) of Goodfellow et al. 2014, equation 1."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def non_saturating(fake_logits: Tensor) -> Tensor:
    """-E[log D(G(z))], G's practical objective (Goodfellow et al. 2014, section 3)."""
    return softplus(-fake_logits).mean()


def minimax(fake_logits: Tensor) -> Tensor:
    """E[log(1 - D(G(z)))], G's side of the value function (Goodfellow et al. 2014, equation 1)."""
    return -softplus(fake_logits).mean()


GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "non_saturating": non_saturating,
    "minimax": minimax,
}
