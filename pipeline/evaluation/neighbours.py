"""Metrics of nearest neighbours among features: precision, recall, density and coverage.

Distances are computed in float64, about the mean of the real features, in blocks on the device of
rank 0. So their memory does not grow with the square of the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 1024, 8192
"""Rows and columns of the block of distances that is in memory (64 MiB)."""
PRC_NEIGHBOUR = 3
"""k of precision and recall (Kynkaanniemi et al. 2019)."""
DC_NEIGHBOUR = 5
"""k of density and coverage (Naeem et al. 2020)."""


@dataclass(frozen=True)
class Neighbours:
    """Scores of the nearest neighbours, in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances of rows: (n, D), (m, D) float64 -> (n, m), 0 or more."""
    products = torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)
    return products.clamp_(min=0)


def radii(features: Tensor, device: torch.device) -> Tensor:
    """Return the squared distances of each row to its nearest other rows.

    Args:
        features: (N, D), N > ``DC_NEIGHBOUR``.
        device: to compute on.

    Returns:
        (N, DC_NEIGHBOUR) float64 on the CPU, ascending.
    """
    mean = features.double().mean(0)
    found = []
    for start in range(0, len(features), ROWS):
        rows = centred(features[start : start + ROWS], mean, device)
        best = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        for first in range(0, len(features), COLUMNS):
            block = squared_distances(
                rows, centred(features[first : first + COLUMNS], mean, device)
            )
            own = torch.arange(start, start + len(rows), device=device) - first
            inside = (own >= 0) & (own < block.shape[1])
            block[inside.nonzero()[:, 0], own[inside]] = torch.inf
            best = torch.cat([best, block], 1)
            best = best.topk(min(DC_NEIGHBOUR, best.shape[1]), largest=False).values
        found.append(best.sort(1).values.cpu())
    return torch.cat(found)


def compare(
    generated: Tensor, real: Tensor, real_radii: Tensor, device: torch.device
) -> Neighbours:
    """Compute all scores in one pass over the distances between two sets of features.

    Precision is the share of generated images within the ball around a real one that reaches to its
    third nearest real one; recall is the same with the sets exchanged (Kynkaanniemi et al. 2019,
    arXiv 1904.06991, eq. 1 and 2). Density is the mean number, over 5, of such balls to the fifth
    neighbour that hold a generated image; coverage is the share of them that hold one (Naeem et al.
    2020, arXiv 2002.09797, eq. 3 and 5).

    Args:
        generated: (N, D), N > ``DC_NEIGHBOUR``.
        real: (M, D).
        real_radii: ``radii`` of ``real``.
        device: to compute on.
    """
    mean = real.double().mean(0)
    generated_radii = radii(generated, device)[:, PRC_NEIGHBOUR - 1].to(device)
    narrow = real_radii[:, PRC_NEIGHBOUR - 1].to(device)
    wide = real_radii[:, DC_NEIGHBOUR - 1].to(device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    covered = torch.zeros_like(recalled)
    precise = inside = 0
    for start in range(0, len(generated), ROWS):
        rows = centred(generated[start : start + ROWS], mean, device)
        reach = generated_radii[start : start + ROWS, None]
        hit = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for first in range(0, len(real), COLUMNS):
            part = slice(first, first + COLUMNS)
            block = squared_distances(rows, centred(real[part], mean, device))
            hit |= (block <= narrow[part]).any(1)
            recalled[part] |= (block <= reach).any(0)
            within = block < wide[part]
            covered[part] |= within.any(0)
            inside += int(within.sum())
        precise += int(hit.sum())
    return Neighbours(
        precision=precise / len(generated),
        recall=float(recalled.double().mean()),
        density=inside / (DC_NEIGHBOUR * len(generated)),
        coverage=float(covered.double().mean()),
    )


def centred(rows: Tensor, mean: Tensor, device: torch.device) -> Tensor:
    """Return rows about a mean in float64 on a device."""
    return (rows.double() - mean).to(device)
