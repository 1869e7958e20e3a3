"""Spectral norm of D (Miyato et al. 2018, arXiv 1802.05957): every weight W is divided by sigma(W).

sigma is the largest singular value of W as a matrix (outputs, all other dimensions). A vector u
serves to estimate it: power iterations turn u towards the first singular vector (algorithm 1). One
iteration runs per step of D, not per forward pass. So u is equal on all ranks and for any number of
micro-batches, and checkpoints save it as a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 20  # u starts as a constant vector and must come near the first singular one


class SpectralNorm(nn.Module):
    """Parametrization that divides one weight, (outputs, ...), by its sigma, in fp32.

    The buffer ``u`` has shape (outputs,) and length 1.
    """

    u: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("u", normalize(torch.ones(len(weight)), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        # bf16 autocast would round the products to 8 significant bits.
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            v = normalize(matrix.detach().T @ self.u, dim=0)
            return weight / (self.u @ (matrix @ v))

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Run one power iteration: update ``u`` in place for this weight."""
        matrix = weight.flatten(1)
        v = normalize(matrix.T @ self.u, dim=0)
        self.u.copy_(normalize(matrix @ v, dim=0))


def apply_spectral_norm(network: nn.Module) -> None:
    """Register ``SpectralNorm`` on the weight of every convolution and linear layer, in place."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))


def power_iterate(network: nn.Module, iterations: int = 1) -> None:
    """Run the power iterations of spectral norm after a weight update.

    No-op without spectral norm.
    """
    for module in network.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for _ in range(iterations):
                module[0].iterate(module.original)  # type: ignore[operator]


def unnormalised_weight(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> Tensor:
    """Return the trained parameter of a layer, before any spectral norm."""
    if parametrize.is_parametrized(module):
        weight: Tensor = module.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        return weight
    return module.weight
