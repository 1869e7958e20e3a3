"""G and D of the DCGAN (Radford et al. 2016) for images of 32, 64, 128 and 256 pixels.

Strided convolutions lead from a 4x4 map up to the image (G), or from the image down to a 4x4 map
(D). The number of channels doubles where the resolution halves. At 64 pixels with ngf = 128 G is
that of figure 1 of the paper: z -> 1024x4x4 -> 512x8x8 -> 256x16x16 -> 128x32x32 -> 3x64x64.

Networks in training have parameters and no other state, but for the vectors u of spectral norm.
BatchNorm normalises with the batch and keeps no running statistics, which would differ between
ranks. A G for sampling has them: ``sampling.make_sampler`` recomputes them from the weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.models.layers import BatchNorm, Down, FromVector, ToVector, Up
from pipeline.models.mlp import D_RANGE, G_RANGE, MLPDiscriminator, MLPGenerator
from pipeline.models.spectral_norm import (
    FIRST_ITERATIONS,
    apply_spectral_norm,
    power_iterate,
    unnormalised_weight,
)

LEAK = 0.2  # section 4: slope of LeakyReLU for negative values
INIT_STD = 0.02  # section 4: standard deviation of the initial weights


class Generator(nn.Module):
    """G: (N, z_dim + num_classes) float -> (N, C, S, S) float in [-1, 1].

    Args:
        config: gives the image size S, channels C, z_dim, num_classes, ngf and kernel size.
        running_stats: BatchNorm has running statistics, for sampling. False in training.
    """

    def __init__(self, config: ModelConfig, *, running_stats: bool = False) -> None:
        super().__init__()
        widths = [config.ngf * 2**k for k in reversed(range(num_halvings(config)))]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["project"] = FromVector(config.z_dim + config.num_classes, widths[0])
        for index, width in enumerate(widths):
            size = 4 * 2**index
            layers[f"norm_{size}"] = nn.BatchNorm2d(width, track_running_stats=running_stats)
            layers[f"relu_{size}"] = nn.ReLU(inplace=True)  # (N, width, size, size)
            last = index + 1 == len(widths)
            layers["to_image" if last else f"up_{2 * size}"] = Up(
                width, config.channels if last else widths[index + 1], config.kernel_size
            )
        layers["tanh"] = nn.Tanh()
        self.layers = nn.Sequential(layers)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z[:, :, None, None])
        return images


class Discriminator(nn.Module):
    """D: (N, C, S, S) float in [-1, 1] -> (N,) logits. D(x) of the papers is sigmoid(logit).

    With ``num_classes`` D is a projection discriminator (Miyato & Koyama 2018, arXiv 1802.05637,
    equation 3): logit(x, y) = logit(x) + <v_y, features(x)>, where the features are the flattened
    last feature map.

    ``d_norm`` other than ``batch``: the convolutions have biases, and no BatchNorm follows them. It
    would undo a spectral norm. The weights of the logit and of the classes are normalised as one
    matrix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_norm = config.d_norm
        widths = [config.ndf * 2**k for k in range(num_halvings(config))]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        in_channels = config.channels
        for index, width in enumerate(widths):
            size = config.image_size // 2 ** (index + 1)
            batch_norm = config.d_norm == "batch"
            layers[f"down_{size}"] = Down(
                in_channels, width, config.kernel_size, bias=not batch_norm
            )
            # No BatchNorm on D's input layer (section 3).
            if index > 0 and batch_norm:
                layers[f"norm_{size}"] = BatchNorm(width)
            layers[f"leaky_{size}"] = nn.LeakyReLU(LEAK, inplace=True)  # (N, width, size, size)
            in_channels = width
        # Output 0 is the logit, output 1 + y is <v_y, features>: (N, 1 + num_classes, 1, 1).
        layers["to_logit"] = ToVector(in_channels, 1 + config.num_classes)
        self.layers = nn.Sequential(layers)

    def forward(
        self, images: Tensor, y: Tensor | None = None, _generator: torch.Generator | None = None
    ) -> Tensor:
        """Return logits, (N,). ``y`` (N,) int64 are classes; the generator is for dropout only."""
        outputs: Tensor = self.layers(images).flatten(1)
        logits = outputs[:, 0]
        return logits if y is None else logits + outputs.gather(1, 1 + y[:, None])[:, 0]

    def features(self, images: Tensor, _y: Tensor | None = None) -> Tensor:
        """Return the last feature map, (N, C', 4, 4) float; it does not depend on classes."""
        maps: Tensor = self.layers[:-1](images)
        return maps


def make_generator(config: ModelConfig, *, running_stats: bool = False) -> nn.Module:
    """Return G of ``config.architecture``. The MLP has no BatchNorm: no ``running_stats``."""
    if config.architecture == "mlp":
        return MLPGenerator(config)
    return Generator(config, running_stats=running_stats)


def make_discriminator(config: ModelConfig) -> nn.Module:
    """Return D of ``config.architecture``, called as ``D(images, y, generator)`` -> (N,) logits.

    ``y`` is None for a D without classes. ``generator`` draws the dropout masks; None: no dropout.
    """
    D = MLPDiscriminator(config) if config.architecture == "mlp" else Discriminator(config)
    if config.d_norm == "spectral":
        apply_spectral_norm(D)
    return D


def num_halvings(config: ModelConfig) -> int:
    """Return the number of strided convolutions between image and 4x4 map: 3 at 32 pixels."""
    return (config.image_size // 4).bit_length() - 1


def init_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the initial weights of G or D, in place.

    Convolutions are N(0, 0.02) (section 4). BatchNorm gains are N(1, 0.02) and shifts 0, as in the
    authors' code. Matrices of the MLPs are uniform, as their authors published. Biases are 0.

    A dcgan D without normalisation (``d_norm`` none) is N(0, gain^2 / fan_in) instead, after He et
    al. 2015 (arXiv 1502.01852, equations 10 and 15). With gain^2 = 2 / (1 + LEAK^2) every layer
    keeps the mean square of its input. With N(0, 0.02) each layer would shrink it, and nothing
    rescales it. No LeakyReLU follows the last layer: its gain is 1.

    Args:
        network: on the CPU.
        generator: of the CPU. The weights are a function of its seed alone.
    """
    limit = G_RANGE if isinstance(network, MLPGenerator) else D_RANGE
    norm_free = isinstance(network, Discriminator) and network.d_norm == "none"
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                weight = unnormalised_weight(module)
                if isinstance(module, nn.Linear):
                    weight.uniform_(-limit, limit, generator=generator)
                else:
                    std = _kaiming_std(module) if norm_free else INIT_STD
                    weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, INIT_STD, generator=generator)
                module.bias.zero_()
    power_iterate(network, FIRST_ITERATIONS)


def _kaiming_std(layer: nn.Module) -> float:
    """Return the standard deviation of a layer's initial weights in a D without normalisation."""
    assert isinstance(layer, nn.Conv2d)
    gain = 1.0 if isinstance(layer, ToVector) else math.sqrt(2 / (1 + LEAK**2))
    return gain / math.sqrt(layer.weight[0].numel())


def update_ema(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Update G_ema in place: averaged = decay * averaged + (1 - decay) * network, by parameter."""
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1.0 - decay)
