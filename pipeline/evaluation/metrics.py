"""Compute FID, IS, KID, precision and recall from features, with the functions of torch-fidelity.

The features and statistics of the real images are computed once and kept in a reference file. The
file contains the settings it was made with; it is refused if they differ from those of the
evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.evaluation.extractors import Extractor, tensors_sha256
from pipeline.evaluation.protocol import Protocol, ReferenceProtocol
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.files import write_atomic

# -- the real images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Features of the real images, with the mean and covariance that FID compares.

    ``features`` is (N, D) float32, ``mu`` (D,) float32, ``sigma`` (D, D) float64. ``protocol``
    holds the settings they were computed with.
    """

    protocol: ReferenceProtocol
    features: Tensor
    mu: NDArray[np.float32]
    sigma: NDArray[np.float64]


def make_reference(protocol: ReferenceProtocol, features: Tensor) -> Reference:
    """Compute the statistics of the features of the real images, (N, D) float32 on the CPU."""
    statistics = fid_features_to_statistics(features)
    return Reference(protocol, features, statistics["mu"], statistics["sigma"])


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference file atomically.

    Raises:
        EvaluationError: the file cannot be written.
    """
    tensors = {
        "features": reference.features.contiguous(),
        "mu": torch.from_numpy(reference.mu),
        "sigma": torch.from_numpy(reference.sigma),
    }
    protocol = dataclasses.asdict(reference.protocol)
    # One entry only: safetensors writes several in random order, so equal files would differ.
    metadata = {"reference": json.dumps({"side": protocol, "sha256": tensors_sha256(tensors)})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, metadata))
    except OSError as error:
        raise EvaluationError(
            f"{path}: the reference cannot be written: {error.strerror}. Choose another folder "
            "with eval.cache_dir, or another file with --out."
        ) from None


def read_reference(path: Path, protocol: ReferenceProtocol) -> Reference:
    """Read a reference file and check its sha256 and its settings.

    Args:
        path: of the file.
        protocol: settings that the evaluation needs.

    Raises:
        EvaluationError: the file is missing, damaged, or was made with other settings, which the
            message lists.
    """
    remedy = f"make it with: python -m pipeline.evaluate reference --run RUN --out {path}"
    if not path.is_file():
        raise EvaluationError(f"eval.reference ({path}): no such file; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entry = json.loads(metadata["reference"])
        if tensors_sha256(tensors) != entry["sha256"]:
            raise ValueError("its checksum differs")
        fields = entry["side"]
        found = ReferenceProtocol(**fields | {"image_shape": tuple(fields["image_shape"])})
        features, mu, sigma = tensors["features"], tensors["mu"], tensors["sigma"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"eval.reference ({path}): damaged or not a reference file ({error}); {remedy}"
        ) from None
    if found != protocol:
        needed = dataclasses.asdict(protocol)
        lines = [
            f"{name}: {value}, needed {needed[name]}"
            for name, value in dataclasses.asdict(found).items()
            if value != needed[name]
        ]
        raise EvaluationError(
            f"eval.reference ({path}): was made with other settings:\n  "
            + "\n  ".join(lines)
            + f"\nUse these settings, or {remedy}"
        )
    return Reference(protocol, features, mu.numpy(), sigma.numpy())


# -- the scores ---------------------------------------------------------------------------------


def compute_scores(
    features: dict[str, Tensor], extractor: Extractor, reference: Reference, protocol: Protocol
) -> dict[str, float]:
    """Compute the scores of generated images.

    Args:
        features: {layer: (N, D) float32 on the CPU}, in the order of the images.
        extractor: that computed them.
        reference: of the real images.
        protocol: gives the settings and the names of the scores.

    Returns:
        {metric key: score}; FID only if ``protocol.has_fid``, IS only if the extractor has logits.

    Raises:
        EvaluationError: a feature is NaN or infinite.
    """
    generated = features[extractor.layer]
    if not bool(torch.isfinite(generated).all()):
        raise EvaluationError(
            f"eval.extractor ({extractor.name}): its features of these images are NaN or infinite, "
            "so there is no score. If eval.precision is bf16, use fp32."
        )
    scores: dict[str, Any] = {}
    if protocol.has_fid:
        fake = fid_features_to_statistics(generated)
        real = {"mu": reference.mu, "sigma": reference.sigma}
        (scores["fid"],) = fid_statistics_to_metric(fake, real, verbose=False).values()
    if extractor.logits is not None:
        scores["is"], scores["is_std"] = isc_features_to_metric(features[extractor.logits]).values()
    scores["kid"], scores["kid_std"] = kid_features_to_metric(
        generated, reference.features, kid_subset_size=protocol.kid_subset_size, verbose=False
    ).values()
    # save_cpu_ram gives the same values without the matrix of all distances (10 GB at N = 50,000).
    scores["precision"], scores["recall"], _ = prc_features_to_metric(
        generated, reference.features, save_cpu_ram=True, verbose=False
    ).values()
    return {protocol.key(name): float(value) for name, value in scores.items()}


def table(rows: list[dict[str, Any]], protocol: Protocol, best_step: int | None) -> str:
    """Format ledger rows of one protocol as a table with a column for each score.

    Args:
        rows: of the ledger.
        protocol: of these rows.
        best_step: the row to mark as best; None = none.
    """
    names = [n for n in protocol.columns if any(protocol.key(n) in row["scores"] for row in rows)]
    lines = ["    step" + "".join(f"{protocol.title(name):>12}" for name in names)]
    for row in rows:
        values = [row["scores"].get(protocol.key(name), math.nan) for name in names]
        cells = "".join(f"{value:>12.5g}" for value in values)
        lines.append(f"{row['step']:>8}{cells}{'  best' if row['step'] == best_step else ''}")
    return "\n".join(lines)
