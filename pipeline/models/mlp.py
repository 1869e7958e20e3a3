"""The networks of the first GAN (Goodfellow et al. 2014, section 5): no convolutions.

G is "a mixture of rectifier linear activations and sigmoid activations", D has maxout units, and
dropout while it is trained. Sizes in ``configs/gan_mlp.yaml`` are those that the authors published
for MNIST (github.com/goodfeli/adversarial, mnist.yaml). What differs from theirs: none of D's input
pixels are dropped (theirs: 0.2 of them), and the bias of G's output starts at 0 (theirs: where G
draws the mean image).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pipeline.config.schema import ModelConfig

HIDDEN = 2  # hidden layers of each network, as published
G_RANGE, D_RANGE = 0.05, 0.005  # first weights are uniform between minus and plus, as published


class MLPGenerator(nn.Module):
    """G: (N, z_dim + num_classes) float -> (N, C, S, S) float in [-1, 1].

    Args:
        config: ``ngf`` is the number of units of a hidden layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.channels, config.image_size, config.image_size)
        pixels = config.channels * config.image_size**2
        widths = [config.z_dim + config.num_classes, *[config.ngf] * HIDDEN]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.to_image = nn.Linear(config.ngf, pixels)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.hidden:
            z = layer(z).relu()
        # The paper's sigmoid units give pixels in [0, 1]; ours are in [-1, 1].
        pixels: Tensor = self.to_image(z).sigmoid() * 2 - 1
        return pixels.view(-1, *self.shape)


class MLPDiscriminator(nn.Module):
    """D: (N, C, S, S) float in [-1, 1] -> (N,) logits; sigmoid of a logit is D(x).

    Args:
        config: ``ndf`` is the number of units of a hidden layer, ``maxout`` the linear pieces of
            each (Goodfellow et al. 2013, arXiv 1302.4389; 0: ReLU units), ``dropout`` the share of
            units left out in training.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.image_size**2
        widths = [pixels + config.num_classes, *[config.ndf] * HIDDEN]
        pieces = max(1, config.maxout)
        self.hidden = nn.ModuleList(nn.Linear(a, pieces * b) for a, b in pairwise(widths))
        self.to_logit = nn.Linear(config.ndf, 1)

    def forward(
        self, images: Tensor, y: Tensor | None = None, draws: torch.Generator | None = None
    ) -> Tensor:
        """Logits; with ``draws``, a CPU generator, units are dropped by its numbers."""
        h = images.flatten(1)
        if y is not None:
            h = torch.cat([h, one_hot(y, self.config.num_classes).to(h.dtype)], 1)
        for layer in self.hidden:
            h = layer(h)
            h = h.unflatten(1, (self.config.ndf, -1)).amax(2) if self.config.maxout else h.relu()
            if draws is not None and self.config.dropout:
                h = dropped(h, self.config.dropout, draws)
        logits: Tensor = self.to_logit(h)
        return logits.reshape(-1)


def dropped(h: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """(N, units) with a ``share`` of the units set to 0 and the others scaled up to make up."""
    kept = torch.rand(h.shape, generator=draws) >= share
    return h * (kept.to(h.device, non_blocking=True) / (1 - share)).to(h.dtype)
