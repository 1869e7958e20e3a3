"""The reference file: what the metrics need of the real images, computed once.

The file contains the settings it was made with; it is refused if they differ from those of the
evaluation.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.evaluation import memorization, neighbours
from pipeline.evaluation.moments import FeatureSet, Statistics, read_npz, write_npz
from pipeline.evaluation.protocol import ReferenceProtocol
from pipeline.runtime.documents import DamagedFile, parse_json, read_bytes
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.locks import FileLock
from pipeline.runtime.tensor_files import LARGEST, parse_safetensors, tensors_sha256


@dataclass(frozen=True)
class Reference:
    """What the metrics need of the real images; fields that no metric needs have no rows.

    ``statistics`` are of all images, ``features`` (M, D) float32 of the first
    ``protocol.kept_features``. ``radii`` are those of ``neighbours.radii``. ``held_out`` (H,) are
    the squared distances of held-out images to the nearest of ``features``. ``protocol`` holds the
    settings they were computed with.
    """

    protocol: ReferenceProtocol
    features: Tensor
    statistics: Statistics | None
    radii: Tensor
    held_out: Tensor = field(default_factory=lambda: torch.empty(0))


def make_reference(
    protocol: ReferenceProtocol,
    found: FeatureSet,
    device: torch.device,
    held_out: FeatureSet | None = None,
) -> Reference:
    """Make the reference of the real images.

    Args:
        protocol: of the reference.
        found: features of the real images.
        device: to compute distances on.
        held_out: features of held-out images; None = no metric needs them.

    Raises:
        EvaluationError: a feature is NaN or infinite.
    """
    require_finite(protocol.extractor, found)
    statistics = found.statistics() if protocol.has_statistics else None
    features = found.features
    radii = neighbours.radii(features, device) if protocol.has_radii else torch.empty(0)
    distances = torch.empty(0)
    if held_out is not None:
        require_finite(protocol.extractor, held_out)
        distances = memorization.nearest(held_out.features, features, device).distances[:, 0]
    return Reference(protocol, features, statistics, radii, distances)


def require_finite(extractor: str, found: FeatureSet) -> None:
    """Raise ``EvaluationError`` if a feature is NaN or infinite."""
    if not found.is_finite:
        raise EvaluationError(
            f"eval.extractor ({extractor}): its features of these images are NaN or infinite, "
            "so there is no score. If eval.precision is bf16, use fp32."
        )


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference file atomically; as ``path`` says, safetensors, or mu and sigma as npz.

    Raises:
        EvaluationError: the file cannot be written, or there is no mu and sigma.
    """
    statistics = reference.statistics
    try:
        if path.suffix == ".npz":
            if statistics is None:
                raise EvaluationError(
                    f"--out {path}: fid is not among the metrics, so there is no mu."
                )
            return write_npz(path, statistics)
        tensors = {"features": reference.features.contiguous(), "radii": reference.radii}
        if len(reference.held_out):
            tensors["held_out"] = reference.held_out.contiguous()
        if statistics is not None:
            tensors |= {
                "mu": torch.from_numpy(statistics.mu),
                "sigma": torch.from_numpy(statistics.sigma),
            }
        protocol = dataclasses.asdict(reference.protocol)
        # One entry only: safetensors writes several in random order, so equal files would differ.
        entry = {"side": protocol, "sha256": tensors_sha256(tensors)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, {"reference": json.dumps(entry)}))
    except OSError as error:
        raise EvaluationError(
            f"{path}: the reference cannot be written: {error.strerror}. Choose another folder "
            "with eval.cache_dir, or another file with --out."
        ) from None


def read_reference(path: Path, protocol: ReferenceProtocol, dim: int) -> Reference:
    """Read a reference file and check its sha256 and its settings.

    Of an npz file only the shapes can be checked: it does not say how it was made.

    Args:
        path: of the file.
        protocol: settings that the evaluation needs.
        dim: number of features.

    Raises:
        EvaluationError: the file is missing, damaged, or was made with other settings, which the
            message lists.
    """
    remedy = f"make it with: python -m pipeline.evaluate reference --run RUN --out {path}"
    if not path.exists():
        raise EvaluationError(f"eval.reference ({path}): no such file; {remedy}")
    if path.suffix == ".npz":
        return Reference(protocol, torch.empty(0, dim), read_npz(path, dim), torch.empty(0))
    try:
        tensors, metadata = parse_safetensors(read_bytes(path, LARGEST), path)
        entry = parse_json(metadata["reference"].encode(), path)
        if tensors_sha256(tensors) != entry["sha256"]:
            raise DamagedFile("its checksum differs")
        fields = entry["side"]
        found = ReferenceProtocol(**fields | {"image_shape": tuple(fields["image_shape"])})
        features, radii = tensors["features"], tensors["radii"]
        held_out = tensors["held_out"] if found.held_out else torch.empty(0)
        statistics = None
        if found.has_statistics:
            statistics = Statistics(tensors["mu"].numpy(), tensors["sigma"].numpy())
    except (DamagedFile, AttributeError, KeyError, TypeError) as error:
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
    return Reference(protocol, features, statistics, radii, held_out)


class ReferenceLock:
    """A ``FileLock`` for the right to compute a reference. Its file is made when it is acquired."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        """Acquire the lock without waiting; returns False if another process holds it.

        Raises:
            EvaluationError: ``eval.cache_dir`` cannot be written.
        """
        if self._lock is not None:
            return True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._path)
            if lock.acquire(wait=False):
                self._lock = lock
            else:
                lock.close()
        except OSError as error:
            raise EvaluationError(
                f"eval.cache_dir ({self._path.parent}): cannot be written: {error.strerror}. "
                "Choose another folder with eval.cache_dir=DIR."
            ) from None
        return self._lock is not None

    def release(self) -> None:
        """Release the lock; no-op if it is not held."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
