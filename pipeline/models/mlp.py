"""G and D of the first GAN (Goodfellow et al. 2014, section 5): no convolutions.

G is "a mixture of rectifier linear activations and sigmoid activations". D has maxout units, and
dropout in training. The sizes in ``configs/gan_mlp.yaml`` are those that the authors published for
MNIST (github.com/goodfeli/adversarial, mnist.yaml). There are two differences. The authors drop 0.2
of D's input pixels, this D drops none. The bias of G's output starts at 0, theirs at the value with
which G draws the mean training image.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pipeline.config.schema import ModelConfig

HIDDEN = 2  # hidden layers of G and of D, as published
G_RANGE, D_RANGE = 0.05, 0.005  # initial weights are uniform in [-range, range]


class MLPGenerator(nn.Module):
    """G: (N, z_dim + num_classes) float -> (N, C, S, S) float in [-1, 1].

    Args:
        config: ``ngf`` is the number of units in a hidden layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.channels, config.image_size, config.image_size)
        pixels = config.channels * config.image_size**2
        widths = [config.z_dim + config.num_classes, *[config.ngf] * HIDDEN]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.to_image = nn.Linear(config.ngf, pixels)

    def forward(self, z: Tensor) -> Tensor:
        """Return images, (N, C, S, S) in [-1, 1]."""
        for layer in self.hidden:
            z = layer(z).relu()
        # The paper's sigmoid units give pixels in [0, 1]; images here are in [-1, 1].
        pixels: Tensor = self.to_image(z).sigmoid() * 2 - 1
        return pixels.view(-1, *self.shape)


class MLPDiscriminator(nn.Module):
    """D: (N, C, S, S) float in [-1, 1] -> (N,) logits. D(x) of the paper is sigmoid(logit).

    Args:
        config: ``ndf`` is the number of units in a hidden layer. ``maxout`` is the number of linear
            pieces of a unit (Goodfellow et al. 2013, arXiv 1302.4389); 0: ReLU units. ``dropout``
            is the share of hidden units that are dropped in training.
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
        self, images: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return logits, (N,).

        ``y`` (N,) int64 are classes, appended to the pixels as one-hot numbers. ``generator``, of
        the CPU, draws the dropout masks; None: no dropout.
        """
        logits: Tensor = self.to_logit(self.features(images, y, generator))
        return logits.reshape(-1)

    def features(
        self, images: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the last hidden units, (N, ndf) float; arguments as those of ``forward``."""
        h = images.flatten(1)
        if y is not None:
            h = torch.cat([h, one_hot(y, self.config.num_classes).to(h.dtype)], 1)
        for layer in self.hidden:
            h = layer(h)
            h = h.unflatten(1, (self.config.ndf, -1)).amax(2) if self.config.maxout else h.relu()
            if generator is not None and self.config.dropout:
                h = dropout(h, self.config.dropout, generator)
        return h


def dropout(h: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set a random ``share`` of h, (N, units), to 0 and divide the rest by 1 - share.

    The mask comes from a CPU ``generator``, which torch's own dropout cannot take.
    """
    kept = torch.rand(h.shape, generator=generator) >= share
    return h * (kept.to(h.device, non_blocking=True) / (1 - share)).to(h.dtype)
