"""Features -> FID, IS, KID, precision and recall, all by torch-fidelity's own functions.

The side of the real images is computed once into a reference file that carries its own part of the
protocol and is refused when it does not fit.
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
from pipeline.evaluation.protocol import Protocol, RealSide
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.files import write_atomic

# -- the real side ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What is kept of the real images, computed by torch-fidelity's functions.

    ``features`` is (N, D) float32, ``mu`` (D,) float32, ``sigma`` (D, D) float64.
    """

    side: RealSide
    features: Tensor
    mu: NDArray[np.float32]
    sigma: NDArray[np.float64]


def make_reference(side: RealSide, features: Tensor) -> Reference:
    """A reference from the features of ``chosen_ids``."""
    statistics = fid_features_to_statistics(features)
    return Reference(side, features, statistics["mu"], statistics["sigma"])


def write_reference(path: Path, reference: Reference) -> None:
    """Publish a reference file: whole or not at all.

    Raises:
        EvaluationError: it cannot be written there.
    """
    tensors = {
        "features": reference.features.contiguous(),
        "mu": torch.from_numpy(reference.mu),
        "sigma": torch.from_numpy(reference.sigma),
    }
    about = {"side": dataclasses.asdict(reference.side), "sha256": tensors_sha256(tensors)}
    # One entry: safetensors writes several in random order, and equal references would differ.
    metadata = {"reference": json.dumps(about)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, metadata))
    except OSError as error:
        raise EvaluationError(
            f"{path}: the reference cannot be written: {error.strerror}; choose another place with "
            "eval.cache_dir=... or --out."
        ) from None


def read_reference(path: Path, side: RealSide) -> Reference:
    """A reference file, checked byte for byte and against what this evaluation needs.

    Raises:
        EvaluationError: missing, damaged, or made from other data, by another extractor, ...
    """
    remedy = f"make it with: python -m pipeline.evaluate reference --run RUN --out {path}"
    if not path.is_file():
        raise EvaluationError(f"eval.reference ({path}): no such file; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["reference"])
        if tensors_sha256(tensors) != about["sha256"]:
            raise ValueError("its checksum differs")
        fields = about["side"]
        found = RealSide(**fields | {"image_shape": tuple(fields["image_shape"])})
        features, mu, sigma = tensors["features"], tensors["mu"], tensors["sigma"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"eval.reference ({path}): damaged or not a reference file ({error}); {remedy}"
        ) from None
    if found != side:
        pairs = zip(
            dataclasses.asdict(found).items(), dataclasses.asdict(side).values(), strict=True
        )
        lines = [f"{name}: {has}, needed {needs}" for (name, has), needs in pairs if has != needs]
        raise EvaluationError(
            f"eval.reference ({path}): made for another evaluation:\n  "
            + "\n  ".join(lines)
            + f"\nSet the values back, or {remedy}"
        )
    return Reference(side, features, mu.numpy(), sigma.numpy())


# -- the scores ---------------------------------------------------------------------------------


def compute_scores(
    features: dict[str, Tensor], extractor: Extractor, reference: Reference, protocol: Protocol
) -> dict[str, float]:
    """The scores of generated images, by metric key; a FID only where ``has_fid``.

    Args:
        features: {layer: (N, D) float32 on the CPU}, in the order of the images.
        extractor: which made them.
        reference: the real side.
        protocol: names and settings.

    Raises:
        EvaluationError: features that are not finite.
    """
    generated = features[extractor.layer]
    if not bool(torch.isfinite(generated).all()):
        raise EvaluationError(
            f"{extractor.name}: features of these images are NaN or infinite; with "
            "eval.precision=bf16 try fp32."
        )
    found: dict[str, Any] = {}
    if protocol.has_fid:
        mine = fid_features_to_statistics(generated)
        real = {"mu": reference.mu, "sigma": reference.sigma}
        (found["fid"],) = fid_statistics_to_metric(mine, real, verbose=False).values()
    if extractor.logits is not None:
        found["is"], found["is_std"] = isc_features_to_metric(features[extractor.logits]).values()
    found["kid"], found["kid_std"] = kid_features_to_metric(
        generated, reference.features, kid_subset_size=protocol.kid_subset_size, verbose=False
    ).values()
    # save_cpu_ram: the same value without a square matrix of all distances (10 GB at 50,000).
    found["precision"], found["recall"], _ = prc_features_to_metric(
        generated, reference.features, save_cpu_ram=True, verbose=False
    ).values()
    return {protocol.key(name): float(value) for name, value in found.items()}


def table(rows: list[dict[str, Any]], protocol: Protocol, best_step: int | None) -> str:
    """Ledger rows of one protocol as a table for people; the best step is marked."""
    names = [n for n in protocol.columns if any(protocol.key(n) in row["scores"] for row in rows)]
    titles = [protocol.title(n) for n in names]
    lines = ["    step" + "".join(f"{title:>12}" for title in titles)]
    for row in rows:
        values = [row["scores"].get(protocol.key(n), math.nan) for n in names]
        cells = "".join(f"{value:>12.5g}" for value in values)
        lines.append(f"{row['step']:>8}{cells}{'  best' if row['step'] == best_step else ''}")
    return "\n".join(lines)
