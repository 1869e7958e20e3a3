"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): the same kinds of change to what D sees.

Real and generated images alike are changed before D looks at them, differentiably, so that G learns
from the changed images without learning to draw the changes. With few images D can then no longer
learn them by heart.

    color        brightness + U(-0.5, 0.5), saturation * U(0, 2), contrast * U(0.5, 1.5)
    translation  by up to an eighth of the size each way
    cutout       a square of half the size at a random place

What comes in from outside and what is cut out is 0, the middle of the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 8  # one part in eight
NUMBERS = 7  # of one image: brightness, saturation, contrast, shift by y and x, hole at y and x


def augment(images: Tensor, policy: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Images changed by the policies, each by random numbers of its own.

    Args:
        images: (N, C, S, S) float in [-1, 1]; results may leave that range by their colours.
        policy: of ``config.POLICIES``; always applied in that order.
        generator: a CPU generator. As many numbers are drawn whatever the policy, so the other
            changes stay the same when one is switched off.

    Returns:
        (N, C, S, S) in the dtype and layout of the images.
    """
    numbers = torch.rand(NUMBERS, len(images), generator=generator)
    numbers = numbers.to(images.device, non_blocking=True)
    if "color" in policy:
        images = _color(images, numbers[:3, :, None, None, None].to(images.dtype))
    if "translation" in policy:
        most = images.shape[-1] // SHIFT
        images = _shifted(images, (numbers[3:5] * (2 * most + 1)).long().clamp(max=2 * most) - most)
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


def _shifted(images: Tensor, by: Tensor) -> Tensor:
    """Each image moved by ``by`` (2, N) pixels, down and to the right."""
    size = images.shape[-1]
    source = torch.arange(size, device=images.device) - by[:, :, None]  # (2, N, S): where from
    inside = (source >= 0) & (source < size)
    rows, columns = source.clamp(0, size - 1)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing around the channels puts them last: (N, S, S, C), the layout of channels_last.
    moved = images[which, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    return moved * (inside[0][:, :, None] & inside[1][:, None])[:, None]


def _hole(centre: Tensor, size: int) -> Tensor:
    """(N, 1, S, S) bool: a square of half the size around ``centre`` (2, N) in [0, 1), clipped."""
    offset = torch.arange(size, device=centre.device) - (centre * (size + 1)).floor()[:, :, None]
    inside = (offset >= -(size // 4)) & (offset < size // 2 - size // 4)
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]
