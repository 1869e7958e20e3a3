"""Count the floating-point operations of a training step."""

from __future__ import annotations

from itertools import pairwise

from pipeline.config.schema import Config, ModelConfig
from pipeline.models.dcgan import num_halvings
from pipeline.models.mlp import HIDDEN
from pipeline.training.losses import PAIRED


def flop_per_image(config: Config) -> float:
    """Return the floating-point operations per real image that a step of the run needs.

    Counted are the convolutions and matrix products of both updates, a multiplication and an
    addition as two, as in ``torch.utils.flop_counter``. BatchNorm, Adam, DiffAugment, the penalties
    R1 and R2, and what ``train.micro_batch`` makes G compute twice are not counted: these are the
    model's operations of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B).
    """
    d_steps = config.optim.d_steps
    layers_G, layers_D = multiplications(config.model)
    # The gradients of a layer's weights and of its input take as many as its forward pass.
    G, D = sum(layers_G), sum(layers_D)
    behind_G, behind_D = G - layers_G[0], D - layers_D[0]  # nothing needs a gradient of z or x
    of_D = G + 2 * (D + D + behind_D)
    of_G = (1 + (config.model.loss in PAIRED)) * D + D + G + behind_G
    return 2 * (d_steps * of_D + of_G) / d_steps


def multiplications(model: ModelConfig) -> tuple[list[int], list[int]]:
    """Return the multiplications of each layer of G and of D, first to last, for one image."""
    inputs, pixels = model.z_dim + model.num_classes, model.channels * model.image_size**2
    if model.architecture == "mlp":
        pieces = max(1, model.maxout)
        layers_G = [a * b for a, b in pairwise([inputs, *[model.ngf] * HIDDEN, pixels])]
        widths = [pixels + model.num_classes, *[model.ndf] * HIDDEN]
        return layers_G, [*(a * pieces * b for a, b in pairwise(widths)), model.ndf]
    taps, halvings = model.kernel_size**2, num_halvings(model)
    widths = [*(model.ngf * 2**k for k in reversed(range(halvings))), model.channels]
    ups = [a * b * taps * (4 * 2**k) ** 2 for k, (a, b) in enumerate(pairwise(widths))]
    down = [model.channels, *(model.ndf * 2**k for k in range(halvings))]
    sizes = [model.image_size // 2 ** (k + 1) for k in range(halvings)]
    downs = [a * b * taps * size**2 for (a, b), size in zip(pairwise(down), sizes, strict=True)]
    return [inputs * widths[0] * 16, *ups], [*downs, down[-1] * (1 + model.num_classes) * 16]
