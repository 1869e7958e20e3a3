"""Compute the scores of generated images from their features and a reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from pipeline.evaluation import neighbours
from pipeline.evaluation.memorization import Matches, memorization
from pipeline.evaluation.moments import FeatureSet, frechet_distance, statistics_of
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.references import Reference, require_finite
from pipeline.models.noise import rng
from pipeline.runtime.errors import EvaluationError

Classes = tuple[NDArray[np.int64], NDArray[np.int64]]
KID_SUBSETS, KID_SEED = 100, 2020  # of torch-fidelity
MIND_PROJECTIONS, MIND_PART = 1000, 50
"""Random directions that MIND is the mean of, and how many are in memory at the same time."""


def compute_scores(
    found: FeatureSet,
    reference: Reference,
    protocol: Protocol,
    device: torch.device,
    matches: Matches | None = None,
    classes: Classes | None = None,
) -> dict[str, float]:
    """Compute the scores of generated images.

    Args:
        found: the features of the generated images.
        reference: of the real images.
        protocol: gives the metrics, the settings and the names of the scores.
        device: for metrics of nearest neighbours.
        matches: of the generated among the real images; only ``memorization`` needs it.
        classes: of the generated and of the real images; only ``class_fid`` needs them.

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
    if "class_fid" in metrics:
        assert classes is not None
        scores |= class_fid(generated, reference.features, classes)
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


def class_fid(generated: Tensor, real: Tensor, classes: Classes) -> dict[str, float]:
    """Return the Frechet distance of each class, and their mean (Miyato and Koyama 2018).

    The mean is their intra FID (arXiv 1802.05637, section 4).

    Args:
        generated: (N, D) features.
        real: (M, D) features.
        classes: (N,) and (M,) of the images, from 0 on; at least 2 of each class in both.

    Returns:
        ``class_fid``, and ``class_fid_c0`` and so on.
    """
    found = {
        f"class_fid_c{k}": frechet_distance(
            *(statistics_of(x[c == k]) for x, c in zip((generated, real), classes, strict=True))
        )
        for k in range(int(classes[1].max()) + 1)
    }
    return {"class_fid": float(np.mean(list(found.values())))} | found


def over_seeds(found: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of scores over seeds, and as ``<key>_sd`` their sample standard deviation.

    Of standard deviations (of IS and KID) there is the mean only.

    Args:
        found: the scores with each seed; of one seed they are returned as they are.
    """
    if len(found) == 1:
        return found[0]
    scores: dict[str, float] = {}
    for key in found[0]:
        values = [each[key] for each in found]
        scores[key] = float(np.mean(values))
        if "_std_" not in key:
            scores[f"{key}_sd"] = float(np.std(values, ddof=1))
    return scores


def table(rows: list[dict[str, Any]], protocol: Protocol, best_step: int | None) -> str:
    """Format ledger rows of one protocol as a table with a column for each score.

    Args:
        rows: of the ledger.
        protocol: of these rows.
        best_step: the row to mark as best; None = none.
    """
    names = [n for n in protocol.columns if any(protocol.key(n) in row["scores"] for row in rows)]
    has_seeds = any(key.endswith("_sd") for row in rows for key in row["scores"])
    least = 20 if has_seeds else 12
    widths = {name: max(least, len(protocol.title(name)) + 2) for name in names}
    lines = ["    step" + "".join(f"{protocol.title(name):>{widths[name]}}" for name in names)]
    for row in rows:
        cells = "".join(
            f"{_cell(row['scores'], protocol.key(name)):>{widths[name]}}" for name in names
        )
        lines.append(f"{row['step']:>8}{cells}{'  best' if row['step'] == best_step else ''}")
    return "\n".join(lines)


def _cell(scores: dict[str, float | None], key: str) -> str:
    """Return a score as text, with its standard deviation over seeds if there is one."""
    value, deviation = scores.get(key), scores.get(f"{key}_sd")
    text = f"{math.nan if value is None else value:.5g}"
    return text if deviation is None else f"{text} +-{deviation:.2g}"
