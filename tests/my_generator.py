"""A user's own G, in the forms in which ``--checkpoint`` takes it."""

import torch
from torch import Tensor, nn


class Own(nn.Module):
    """z (n, 6) -> gray 32x32 images in [-1, 1]."""

    z_dim = 6
    z_distribution = "uniform"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 32 * 32)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z).tanh().view(-1, 1, 32, 32)


class Unstated(Own):
    z_dim = None


class Loud(Own):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * 127.5 + 127.5


class Flat(Own):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).flatten(1)


class Needy(Own):
    def __init__(self, size: int) -> None:
        super().__init__()


def loaded() -> nn.Module:
    G = Own()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(G.layer.weight)
    nn.init.zeros_(G.layer.bias)
    return G


def not_a_module() -> str:
    return "G"
