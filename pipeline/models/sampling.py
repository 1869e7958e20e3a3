"""G for sampling, and the uint8 images and grids that it makes of z.

Images are drawn in blocks of ``BLOCK`` rows of z, in fp32, whatever number of rows is asked for. So
an image depends neither on a batch size nor on the number of processes. The BatchNorm statistics
come from z of a fixed seed, so they are a function of the weights.
"""

from __future__ import annotations

import hashlib
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
from pipeline.runtime.tensor_files import tensors_sha256

STATISTICS_BATCHES = 16
"""Batches of ``BLOCK`` rows of z that the BatchNorm statistics are the mean of."""
GRID_IMAGES = 64
"""Images in a grid of samples."""
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHER_ARCHITECTURE = "the weights belong to another architecture than the configuration"
Images = Callable[[int, int], NDArray[np.uint8]]
"""A function (start, stop) that returns these rows of a set of images: (n, H, W, C) uint8."""


def make_sampler(
    model: ModelConfig, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> nn.Module:
    """Return G in eval mode with recomputed BatchNorm statistics.

    The statistics are the mean over fixed-seed batches in fp32. G_ema, an average of parameters,
    thus gets statistics of its own.

    Args:
        model: the architecture of the weights.
        weights: parameters by name. Weights of a snapshot also hold the BatchNorm statistics; they
            are then loaded, not recomputed.
        device: where G is put and the statistics are computed.

    Raises:
        ValueError: the weights have another architecture or dtype, only some of the statistics, or
            a negative variance.
    """
    with torch.device("meta"):  # takes no memory: the configuration may ask for any size
        statistics = _check_weights(make_generator(model, running_stats=True), weights)
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first weights are overwritten below
        G = make_generator(model, running_stats=True).to(device)
    G.load_state_dict(dict(weights), strict=False)
    G.requires_grad_(False)
    if statistics and not statistics & set(weights):
        _recompute_statistics(G, model, device)
    return G.eval()


def _check_weights(G: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Return the names of G's statistics; raise ``ValueError`` if the weights do not fit G."""
    statistics = {name for name, _ in G.named_buffers()}
    expected = G.state_dict()
    if missing := sorted(expected.keys() - statistics - weights.keys()):
        raise ValueError(f"{OTHER_ARCHITECTURE}: {missing[0]} is missing")
    for name, value in weights.items():
        if name not in expected:
            raise ValueError(f"{OTHER_ARCHITECTURE}: {name!r} is none of its tensors")
        wanted = expected[name]
        if value.shape != wanted.shape:
            shapes = f"{tuple(value.shape)}, must be {tuple(wanted.shape)}"
            raise ValueError(f"{OTHER_ARCHITECTURE}: {name} has shape {shapes}")
        if value.dtype not in (FLOATS if wanted.is_floating_point() else (wanted.dtype,)):
            raise ValueError(f"{name} has dtype {value.dtype}, must be {wanted.dtype}")
    if statistics & weights.keys() not in (set(), statistics):
        raise ValueError("some of the BatchNorm statistics are missing")
    if any(bool((v < 0).any()) for name, v in weights.items() if name.endswith("running_var")):
        raise ValueError("a BatchNorm variance is negative")
    return statistics


def _recompute_statistics(G: nn.Module, model: ModelConfig, device: torch.device | str) -> None:
    """Set the BatchNorm statistics of G to their mean over fixed-seed batches, in place."""
    z = (z_rows(model, 0, "standing", k * BLOCK, BLOCK) for k in range(STATISTICS_BATCHES))
    with deterministic_fp32(), torch.autocast(torch.device(device).type, enabled=False):
        update_bn(z, G, torch.device(device))


def generator_id(model: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that are the same only for generators that make the same images of z.

    The BatchNorm statistics do not count. They are a function of the parameters, so a checkpoint
    and the snapshot of its step have one id.
    """
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    parameters = {k: v for k, v in weights.items() if k.rpartition(".")[2] not in statistics}
    text = f"{model.z_distribution} {tensors_sha256(parameters)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_images(G: nn.Module, z: Tensor) -> NDArray[np.uint8]:
    """Return the images of z: (N, z_dim + num_classes) float32 -> (N, S, S, C) uint8 on the CPU.

    The last block is padded with zeros, because convolution kernels may round differently for
    another batch size.
    """
    device = next((values.device for values in G.parameters()), torch.device("cpu"))
    out = []
    with deterministic_fp32(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for block in torch.split(z, BLOCK):
            padded = torch.cat([block, block.new_zeros(BLOCK - len(block), z.shape[1])])
            out.append(to_uint8(G(padded.to(device)))[: len(block)].cpu().numpy())
    return np.concatenate(out)


def sample_grid(G: nn.Module, model: ModelConfig, seed: int) -> NDArray[np.uint8]:
    """Return the grid of samples of a run, (8 S, 8 S, C) uint8: its z are the same at each step."""
    return image_grid(draw_images(G, z_rows(model, seed, "grid", 0, GRID_IMAGES)))


def to_uint8(images: Tensor) -> Tensor:
    """Round and clamp images to uint8: (N, C, H, W) float in [-1, 1] -> (N, H, W, C).

    Truncation would darken every image by half a grey level and shift FID by more than a point.
    """
    return images.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def image_grid(images: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """Put images side by side: (N, H, W, C) uint8 -> (rows * H, columns * W, C).

    Image k lies at row k // columns, column k % columns. Cells without an image are black.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)
