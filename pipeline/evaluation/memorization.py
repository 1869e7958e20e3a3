"""Memorization: are generated images nearer to the training images than held-out ones are?

The test is that of Meehan, Chaudhuri and Dasgupta 2020 (arXiv 2004.05675): each image of
both sets has a distance to the nearest training image, and the distances of the two sets are
compared by their ranks. A generator that knows no more than the distribution of the data gives
distances like those of held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.neighbours import COLUMNS, ROWS, centred, squared_distances
from pipeline.models.sampling import Images, image_grid

NEAREST = 4
"""Training images beside each generated one in the picture."""
PICTURED = 10
"""Generated images in the picture."""
NEAR_SHARE = 100
"""A copy is nearer to the training images than all but one in so many held-out images."""


@dataclass(frozen=True)
class Matches:
    """The nearest training images of each of N images, nearest first.

    ``distances`` (N, k) float64 are squared; ``ids`` (N, k) int64 are rows of the training images.
    """

    distances: Tensor
    ids: Tensor


def nearest(rows: Tensor, training: Tensor, device: torch.device) -> Matches:
    """Find the nearest training images of each image.

    Distances are computed in float64 about the mean of the training images, in blocks.

    Args:
        rows: (N, D) features.
        training: (M, D) features.
        device: to compute on.

    Returns:
        the ``NEAREST``, or M, nearest ones of each row, on the CPU.
    """
    mean = training.double().mean(0)
    distances, ids = [], []
    for start in range(0, len(rows), ROWS):
        part = centred(rows[start : start + ROWS], mean, device)
        best = torch.empty(len(part), 0, dtype=torch.float64, device=device)
        which = torch.empty(len(part), 0, dtype=torch.int64, device=device)
        for first in range(0, len(training), COLUMNS):
            block = squared_distances(
                part, centred(training[first : first + COLUMNS], mean, device)
            )
            columns = torch.arange(first, first + block.shape[1], device=device)
            best = torch.cat([best, block], 1)
            which = torch.cat([which, columns.expand(len(part), -1)], 1)
            best, order = best.topk(min(NEAREST, best.shape[1]), largest=False)
            which = which.gather(1, order)
        distances.append(best.cpu())
        ids.append(which.cpu())
    return Matches(torch.cat(distances), torch.cat(ids))


def memorization(generated: Tensor, held_out: Tensor) -> dict[str, float]:
    """Compare the distances to the nearest training image of generated and of held-out images.

    * ``memorization``: of a generated and a held-out image, how often the generated one is nearer,
      ties half: 1 - Delta of the paper. 0.5 = as held-out images, 1 = copies.
    * ``memorization_zu``: Z_U of the paper, the Mann-Whitney statistic of this share in
      standard deviations. It is negative for copies, and positive for images unlike the data.
    * ``copies``: share of generated images that are nearer than all but 1 % of the held-out
      ones. It finds a generator that copies some of its images only.

    Args:
        generated: (N,) distances, or their squares.
        held_out: (H,) likewise.
    """
    count, others = len(generated), len(held_out)
    q, p = generated.double().numpy(), np.sort(held_out.double().numpy())
    farther = others - np.searchsorted(p, q, "right")
    equal = others - np.searchsorted(p, q, "left") - farther
    pairs = count * others
    nearer = float(farther.sum() + equal.sum() / 2) / pairs
    deviation = float(np.sqrt((count + others + 1) / (12 * pairs)))
    return {
        "memorization": nearer,
        "memorization_zu": (0.5 - nearer) / deviation,
        "copies": float((q < p[others // NEAR_SHARE]).mean()),
    }


def picture(generated: Images, training: Images, matches: Matches) -> NDArray[np.uint8]:
    """Draw the generated images that are nearest to the training images, each beside its nearest.

    Args:
        generated: the images of the rows of ``matches``.
        training: the training images.
        matches: of the generated images.

    Returns:
        (rows * H, (1 + k) * W, C) uint8: a row for each generated image, nearest first.
    """
    shown = matches.distances[:, 0].argsort(stable=True)[:PICTURED]
    cells = []
    for row in shown.tolist():
        cells.append(generated(row, row + 1))
        cells += [training(other, other + 1) for other in matches.ids[row].tolist()]
    channels = max(cell.shape[3] for cell in cells)  # gray images beside RGB ones
    cells = [np.broadcast_to(cell, (*cell.shape[:3], channels)) for cell in cells]
    return image_grid(np.concatenate(cells), 1 + matches.ids.shape[1])
