"""Augment the images that D sees, differentiably (DiffAugment, Zhao et al. 2020, arXiv 2006.10738).

Real and generated images get the same kinds of augmentation, so that D cannot memorise a small data
set. The gradient passes through the augmentation to G, and G does not learn to draw it.

    color        brightness + U(-0.5, 0.5), saturation * U(0, 2), contrast * U(0.5, 1.5)
    translation  a shift by up to an eighth of the image size in each direction
    cutout       a square of half the image size, at a random place, set to 0

Pixels shifted in from outside are 0, the middle of the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 8  # the largest shift is 1/8 of the image size
NUMBERS = 7  # per image: brightness, saturation, contrast, shift (y, x), centre of the hole (y, x)


def augment(images: Tensor, policy: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Augment each image by random numbers of its own.

    Args:
        images: (N, C, S, S) float in [-1, 1].
        policy: names out of ``config.recipe.POLICIES``; they are applied in the order given there.
        generator: a CPU generator. It always draws ``NUMBERS`` numbers per image, so that one
            policy's numbers do not depend on the others.

    Returns:
        (N, C, S, S) in the dtype and memory layout of the images. ``color`` may leave [-1, 1].
    """
    numbers = torch.rand(NUMBERS, len(images), generator=generator)
    numbers = numbers.to(images.device, non_blocking=True)
    if "color" in policy:
        images = _color(images, numbers[:3, :, None, None, None].to(images.dtype))
    if "translation" in policy:
        most = images.shape[-1] // SHIFT
        images = _shift(images, (numbers[3:5] * (2 * most + 1)).long().clamp(max=2 * most) - most)
    if "cutout" in policy:
        images = images * ~_hole(numbers[5:7], images.shape[-1])
    return images


def _color(images: Tensor, numbers: Tensor) -> Tensor:
    brightness, saturation, contrast = numbers[0] - 0.5, numbers[1] * 2, numbers[2] + 0.5
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey.expand_as(images), images, saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, contrast)


def _shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift each image by ``offsets`` pixels (down, right), shape (2, N)."""
    size = images.shape[-1]
    source = torch.arange(size, device=images.device) - offsets[:, :, None]  # (2, N, S)
    inside = (source >= 0) & (source < size)
    rows, columns = source.clamp(0, size - 1)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around the channels move these to the end: (N, S, S, C), channels_last.
    moved = images[which, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    return moved * (inside[0][:, :, None] & inside[1][:, None])[:, None]


def _hole(centre: Tensor, size: int) -> Tensor:
    """Return a mask (N, 1, S, S), True in a square of side S / 2 around ``centre``.

    ``centre`` is (2, N) in [0, 1). The square is clipped at the borders.
    """
    offset = torch.arange(size, device=centre.device) - (centre * (size + 1)).floor()[:, :, None]
    inside = (offset >= -(size // 4)) & (offset < size // 2 - size // 4)
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]
