"""Spectral normalisation of D (Miyato et al. 2018, arXiv 1802.05957): W / sigma(W) in every layer.

sigma, the largest singular value of W as a matrix (outputs, everything else), comes from a vector u
that one power iteration follows W with (algorithm 1). Here the iteration is taken once per step of
D, not in each forward pass: so u is a function of the steps taken, the same on all ranks and for
any number of micro-batches, and a checkpoint holds it with the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 20  # until u, which starts anywhere, is near the first singular vector


class SpectralNorm(nn.Module):
    """The parametrization of one weight (outputs, ...): divided by sigma, in fp32."""

    u: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", normalize(torch.ones(len(weight)), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        # Under autocast the products would be rounded to 8 bits.
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            v = normalize(matrix.detach().T @ self.u, dim=0)
            return weight / (self.u @ (matrix @ v))

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One power iteration, in place: u follows the weight."""
        matrix = weight.flatten(1)
        v = normalize(matrix.T @ self.u, dim=0)
        self.u.copy_(normalize(matrix @ v, dim=0))


def apply_spectral_norm(network: nn.Module) -> None:
    """Put every convolution and matrix of a network under ``SpectralNorm``, in place."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))


def power_iterate(network: nn.Module, iterations: int = 1) -> None:
    """Power iterations after a change of the weights; nothing for a network without them."""
    for module in network.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for _ in range(iterations):
                module[0].iterate(module.original)  # type: ignore[operator]


def unnormalised_weight(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> Tensor:
    """The trained weight itself, before any norm."""
    if parametrize.is_parametrized(module):
        weight: Tensor = module.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        return weight
    return module.weight
