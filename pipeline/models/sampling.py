"""Noise and images as functions of (seed, purpose, index).

Every random draw of the project goes through ``rng``: no global RNG is read, so a resumed run, a
run on other ranks and a repeated evaluation see the same numbers. Images are made in blocks of a
fixed size, so they do not depend on a batch size or on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from pipeline.config.schema import ModelConfig
from pipeline.models.dcgan import make_generator
from pipeline.models.noise import BLOCK, z_rows
from pipeline.runtime.hardware import deterministic_fp32

STANDING_BATCHES = 16
"""Batches of ``BLOCK`` fixed z that the BatchNorm statistics of a sampler are computed from."""
GRID_IMAGES = 64
"""Images in a picture of samples."""


def make_sampler(
    model: ModelConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> nn.Module:
    """A generator in eval mode from training weights, its BatchNorm statistics recomputed.

    The statistics are the mean over fixed-seed batches in fp32, hence a function of the weights;
    an average of parameters (G_ema) gets statistics of its own, not those of another network.

    Args:
        model: the architecture the weights belong to.
        weights: parameters by name; running statistics among them are kept as they are.
        device: where to compute.

    Raises:
        ValueError: weights of another architecture, some statistics missing, a negative variance.
    """
    with torch.random.fork_rng(devices=[]):  # the first weights that torch draws are not kept
        G = make_generator(model, standing=True).to(device)
    statistics = {name for name, _ in G.named_buffers()}
    expected = {name: value.shape for name, value in G.state_dict().items()}
    given = {name: value.shape for name, value in weights.items()}
    if {n: s for n, s in expected.items() if n in given or n not in statistics} != given:
        raise ValueError("the weights belong to another architecture than the configuration")
    if statistics & given.keys() not in (set(), statistics):
        raise ValueError("some of the BatchNorm statistics are missing")
    if any(bool((v < 0).any()) for name, v in weights.items() if name.endswith("running_var")):
        raise ValueError("a BatchNorm variance is negative")
    G.load_state_dict(dict(weights), strict=False)
    G.requires_grad_(False)
    if statistics and not statistics & set(weights):
        _recompute_statistics(G, model, device)
    return G.eval()


def _recompute_statistics(G: nn.Module, model: ModelConfig, device: torch.device | str) -> None:
    z = (z_rows(model, 0, "standing", k * BLOCK, BLOCK) for k in range(STANDING_BATCHES))
    with deterministic_fp32(), torch.autocast(torch.device(device).type, enabled=False):
        update_bn(z, G, torch.device(device))


def draw_images(G: nn.Module, z: Tensor) -> NDArray[np.uint8]:
    """Images of rows of G's input: (N, ...) float32 -> (N, S, S, C) uint8, the same for any cut.

    The last block is padded: convolution kernels may round differently for other batch sizes.
    """
    device = next(G.parameters()).device
    out = []
    with deterministic_fp32(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for block in torch.split(z, BLOCK):
            padded = torch.cat([block, block.new_zeros(BLOCK - len(block), z.shape[1])])
            out.append(to_uint8(G(padded.to(device)))[: len(block)].cpu().numpy())
    return np.concatenate(out)


def sample_grid(G: nn.Module, model: ModelConfig, seed: int) -> NDArray[np.uint8]:
    """One picture, (8 S, 8 S, C), of images from z that are fixed for a run."""
    return image_grid(draw_images(G, z_rows(model, seed, "grid", 0, GRID_IMAGES)))


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8: rounded, not truncated, and clamped.

    Truncation would darken every image by half a grey level and shift FID by more than a point.
    """
    return images.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def image_grid(images: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """(N, H, W, C) uint8 -> one (rows * H, columns * W, C) picture, black where empty."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)


Images = Callable[[int, int], NDArray[np.uint8]]
"""Rows [start, stop) of a set of images: (n, H, W, C) uint8, C = 1 or 3."""
