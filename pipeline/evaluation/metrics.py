"""Compute the scores of generated images from their features and a reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from pipeline.evaluation import neighbours
from pipeline.evaluation.memorization import Matches, memorization
from pipeline.evaluation.moments import FeatureSet, frechet_distance
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.references import Reference, require_finite
from pipeline.models.noise import rng
from pipeline.runtime.errors import EvaluationError

KID_SUBSETS, KID_SEED = 100, 2020  # of torch-fidelity
MIND_PROJECTIONS, MIND_PART = 1000, 50
"""Random directions that MIND is the mean of, and how many are in memory at the same time."""


def compute_scores(
    found: FeatureSet,
    reference: Reference,
    protocol: Protocol,
    device: torch.device,
    matches: Matches | None = None,
) -> dict[str, float]:
    """Compute the scores of generated images.

    Args:
        found: the features of the generated images.
        reference: of the real images.
        protocol: gives the metrics, the settings and the names of the scores.
        device: for metrics of nearest neighbours.
        matches: of the generated among the real images; only ``memorization`` needs it.

    Returns:
        {metric key: score}; all are finite.

    Raises:
        EvaluationError: a feature or a score is NaN or infinite.
    """
    metrics = protocol.metrics
    require_finite(protocol.reference.extractor, found)
    generated = found.features
    scores: dict[str, Any] = {}
    if "fid" in metrics:
        assert reference.statistics is not None
        scores["fid"] = frechet_distance(reference.statistics, found.statistics())
    if "is" in metrics:
        scores["is"], scores["is_std"] = isc_features_to_metric(found.logits).values()
    if "kid" in metrics:
        scores["kid"], scores["kid_std"] = kid(
            generated, reference.features, protocol.kid_subset_size
        )
    if {"prc", "density_coverage"} & set(metrics):
        near = neighbours.compare(generated, reference.features, reference.radii, device)
        if "prc" in metrics:
            scores |= {"precision": near.precision, "recall": near.recall}
        if "density_coverage" in metrics:
            scores |= {"density": near.density, "coverage": near.coverage}
    if "mind" in metrics:
        scores["mind"] = mind(generated, reference.features, device)
    if "memorization" in metrics:
        assert matches is not None
        scores |= memorization(matches.distances[:, 0], reference.held_out)
    if odd := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise EvaluationError(
            f"eval.metrics: {', '.join(odd)} of these images is NaN or infinite, so nothing was "
            "recorded. Leave it out of eval.metrics, or use another extractor."
        )
    return {protocol.key(name): float(value) for name, value in scores.items()}


def kid(generated: Tensor, real: Tensor, subset: int) -> tuple[float, float]:
    """Return mean and standard deviation of KID over subsets (Binkowski et al. 2018).

    Subsets, kernel and estimator are torch-fidelity's. The kernel is computed in float64, because
    float32 fails for features with a large mean.

    Args:
        generated: (N, D) features.
        real: (M, D) features.
        subset: number of images of each subset, at most N and M.
    """
    choice = np.random.RandomState(KID_SEED).choice
    values = []
    for _ in range(KID_SUBSETS):
        a = generated[choice(len(generated), subset, replace=False)].double().numpy()
        b = real[choice(len(real), subset, replace=False)].double().numpy()
        values.append(kernel_mmd(a, b))
    return float(np.mean(values)), float(np.std(values))


def mind(generated: Tensor, real: Tensor, device: torch.device) -> float:
    """Return the Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797).

    It is 3 D times the mean, over random directions, of the squared Wasserstein distance of the two
    sets projected on the direction. That distance compares the sorted projections. Of the larger
    set as many first rows are taken as the smaller one has.

    Args:
        generated: (N, D) features.
        real: (M, D) features.
        device: to compute on.
    """
    count, dim = min(len(generated), len(real)), generated.shape[1]
    mean = real[:count].double().mean(0)  # both are moved alike: it costs no digits
    a, b = ((x[:count].double() - mean).to(device) for x in (generated, real))
    directions = torch.randn(MIND_PROJECTIONS, dim, generator=rng(0, "mind"), dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    total = 0.0
    for part in directions.to(device).split(MIND_PART):
        difference = (a @ part.T).sort(0).values - (b @ part.T).sort(0).values
        total += float(difference.square().mean(0).sum())
    return 3 * dim * total / MIND_PROJECTIONS


def table(rows: list[dict[str, Any]], protocol: Protocol, best_step: int | None) -> str:
    """Format ledger rows of one protocol as a table with a column for each score.

    Args:
        rows: of the ledger.
        protocol: of these rows.
        best_step: the row to mark as best; None = none.
    """
    names = [n for n in protocol.columns if any(protocol.key(n) in row["scores"] for row in rows)]
    widths = {name: max(12, len(protocol.title(name)) + 2) for name in names}
    lines = ["    step" + "".join(f"{protocol.title(name):>{widths[name]}}" for name in names)]
    for row in rows:
        values = {name: row["scores"].get(protocol.key(name)) for name in names}
        cells = "".join(
            f"{math.nan if value is None else value:>{widths[name]}.5g}"
            for name, value in values.items()
        )
        lines.append(f"{row['step']:>8}{cells}{'  best' if row['step'] == best_step else ''}")
    return "\n".join(lines)
