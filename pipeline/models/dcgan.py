"""The DCGAN generator and discriminator (Radford et al. 2016) for 32, 64, 128 and 256 pixels.

One rule makes every size: from 4x4 up (G) or down to 4x4 (D) by strided convolutions, with feature
maps doubled at each lower resolution. At 64 pixels and ngf = 128 this is figure 1 of the paper:
z -> 1024x4x4 -> 512x8x8 -> 256x16x16 -> 128x32x32 -> 3x64x64.

In training BatchNorm normalises with its batch and keeps no running statistics: they would be
hidden state that differs between ranks and histories. A generator for sampling (``standing=True``)
has them, recomputed from the weights by ``sampling.make_sampler``. So the parameters are all there
is.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.models.layers import Down, FromVector, ToVector, Up
from pipeline.models.mlp import D_RANGE, G_RANGE, MLPDiscriminator, MLPGenerator
from pipeline.models.spectral_norm import (
    FIRST_ITERATIONS,
    apply_spectral_norm,
    power_iterate,
    unnormalised_weight,
)

LEAK = 0.2  # section 4: slope of the leak
INIT_STD = 0.02  # section 4: zero-centred normal weights


class Generator(nn.Module):
    """G: (N, z_dim + num_classes) float -> (N, C, S, S) float in [-1, 1].

    Args:
        config: image size S, channels C, z_dim, num_classes, ngf and kernel size.
        standing: keep BatchNorm statistics for sampling; False in training.
    """

    def __init__(self, config: ModelConfig, *, standing: bool = False) -> None:
        super().__init__()
        widths = [config.ngf * 2**k for k in reversed(range(num_halvings(config)))]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["project"] = FromVector(config.z_dim + config.num_classes, widths[0])
        for index, width in enumerate(widths):
            size = 4 * 2**index
            layers[f"norm_{size}"] = nn.BatchNorm2d(width, track_running_stats=standing)
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
    """D: (N, C, S, S) float in [-1, 1] -> (N,) logits; sigmoid of a logit is D(x).

    With ``num_classes`` the class y is taken in by projection (Miyato & Koyama 2018, arXiv
    1802.05637, equation 3, on the whole last feature map): D(x, y) = D(x) + <v_y, features(x)>.

    With ``spectral_norm`` there are biases instead of BatchNorm, which would undo the norm; the
    logit's and the classes' weights have one norm together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.ndf * 2**k for k in range(num_halvings(config))]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = config.channels
        for index, width in enumerate(widths):
            size = config.image_size // 2 ** (index + 1)
            layers[f"down_{size}"] = Down(
                before, width, config.kernel_size, bias=config.spectral_norm
            )
            # No BatchNorm on D's input layer (section 3).
            if index > 0 and not config.spectral_norm:
                layers[f"norm_{size}"] = nn.BatchNorm2d(width, track_running_stats=False)
            layers[f"leaky_{size}"] = nn.LeakyReLU(LEAK, inplace=True)  # (N, width, size, size)
            before = width
        # The last feature map, flattened, feeds one output: a 4x4 convolution without padding.
        # With classes it has one more output, <v_y, features>, for each of them.
        layers["to_logit"] = ToVector(before, 1 + config.num_classes)
        self.layers = nn.Sequential(layers)

    def forward(self, images: Tensor, y: Tensor | None = None, _: object = None) -> Tensor:
        """Logits; ``y`` (N,) int64 are the classes that the images should belong to."""
        logits: Tensor = self.layers(images).flatten(1)
        own = logits[:, 0]
        return own if y is None else own + logits.gather(1, 1 + y[:, None])[:, 0]


def make_generator(config: ModelConfig, *, standing: bool = False) -> nn.Module:
    """G of the configured architecture; ``standing`` as for ``Generator``."""
    if config.architecture == "mlp":
        return MLPGenerator(config)
    return Generator(config, standing=standing)


def make_discriminator(config: ModelConfig) -> nn.Module:
    """D of the configured architecture: ``D(images, y, draws)`` -> logits.

    ``y`` and ``draws`` are None where no classes and no random choices (dropout) are asked for.
    """
    D = MLPDiscriminator(config) if config.architecture == "mlp" else Discriminator(config)
    if config.spectral_norm:
        apply_spectral_norm(D)
    return D


def num_halvings(config: ModelConfig) -> int:
    """Strided convolutions between the image and its 4x4 map: 3 at 32 pixels, 4 at 64."""
    return (config.image_size // 4).bit_length() - 1


def init_weights(network: nn.Module, generator: torch.Generator) -> None:
    """N(0, 0.02) weights (section 4); BatchNorm gains N(1, 0.02), shifts 0, as the authors' code.

    Matrices of the MLPs are uniform as their authors published. Biases are 0.

    Args:
        network: changed in place, on the CPU.
        generator: CPU generator; the weights are a function of its seed alone.
    """
    reach = G_RANGE if isinstance(network, MLPGenerator) else D_RANGE
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                weight = unnormalised_weight(module)
                if isinstance(module, nn.Linear):
                    weight.uniform_(-reach, reach, generator=generator)
                else:
                    weight.normal_(0.0, INIT_STD, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, INIT_STD, generator=generator)
                module.bias.zero_()
    power_iterate(network, FIRST_ITERATIONS)


def update_ema(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Averaged <- decay * averaged + (1 - decay) * network, parameter by parameter, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1.0 - decay)
