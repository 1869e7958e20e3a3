"""What a score depends on, and its name.

A score means something only together with its protocol: extractor and weights, layer, arithmetic,
numbers of images, noise, data. ``Protocol`` holds all of it, and its id stands in every row of the
ledger: rows of different ids are never compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.config.schema import EvalConfig
from pipeline.data.shards import Index
from pipeline.evaluation.extractors import Extractor, slug
from pipeline.runtime.errors import EvaluationError

PURPOSE = "evaluation"  # names the noise stream and the choice of real images
STANDARD_NUM_IMAGES = 50_000
KID_SUBSET = 1000


@dataclass(frozen=True, kw_only=True)
class RealSide:
    """What a reference file depends on."""

    data: str
    image_shape: tuple[int, int, int]
    reference_images: int
    extractor: str
    extractor_sha256: str
    layer: str
    precision: str
    preprocessing: str
    batch_size: int
    torch_fidelity: str

    @property
    def id(self) -> str:
        """12 hex digits; equal exactly when all fields are."""
        return _hash(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything a score depends on but the network that is scored."""

    reference: RealSide
    num_images: int
    seed: int
    weights: str
    kid_subset_size: int
    dim: int
    sampling: str = "z-table blocks of 64, standing BatchNorm, round and clamp to uint8: v1"

    columns = ("fid", "is", "kid", "precision", "recall")
    higher_is_better = False

    @property
    def id(self) -> str:
        """12 hex digits; equal exactly when all fields are."""
        return _hash(dataclasses.asdict(self))

    @property
    def has_fid(self) -> bool:
        """Whether both sets are large enough for a covariance: at least twice the dimension.

        Below that a Frechet distance is mostly the bias of its own estimate.
        """
        return min(self.num_images, self.reference.reference_images) >= 2 * self.dim

    def key(self, score: str) -> str:
        """The metric's name in ledger and W&B, e.g. ``eval/fid`` or ``eval/fd_my-net_2k``.

        ``eval/fid``, ``eval/is``, ``eval/kid`` are Inception's at 50,000 images; another extractor,
        layer or number of images stands in the name.

        Args:
            score: fid, is, is_std, kid, kid_std, precision or recall.
        """
        real = self.reference
        parts = [score]
        if (real.extractor, real.layer) != ("inception", "2048"):
            other = {"fid": "fd", "kid": "kd", "kid_std": "kd_std"}
            parts = [other.get(score, score), slug(real.extractor), real.layer]
        if self.num_images != STANDARD_NUM_IMAGES:
            count = self.num_images
            parts.append(f"{count // 1000}k" if count % 1000 == 0 else str(count))
        return "eval/" + "_".join(parts)

    def title(self, score: str) -> str:
        """A score's name in tables for people."""
        return self.key(score).removeprefix("eval/").split("_")[0].upper()

    @property
    def headline(self) -> str:
        """The key that decides which checkpoint is best; lower is better."""
        return self.key("fid" if self.has_fid else "kid")

    def describe(self) -> str:
        """One line for people."""
        real = self.reference
        return (
            f"protocol {self.id}: {real.extractor} layer {real.layer} ({self.dim} numbers, "
            f"{real.precision}), {self.num_images} images against {real.reference_images} real "
            f"ones, {'G_ema' if self.weights == 'ema' else 'G'}, seed {self.seed}"
        )


def make_protocol(config: EvalConfig, extractor: Extractor, index: Index) -> Protocol:
    """The protocol of a configuration over a shard set.

    Raises:
        EvaluationError: more real images asked for than there are.
    """
    there, asked = index.num_samples, config.reference_images
    if asked > there:
        raise EvaluationError(
            f"eval.reference_images ({asked}): data.shards ({index.location}) holds {there}; use "
            f"at most {there}, or 0 for all."
        )
    reference = RealSide(
        data=index.fingerprint,
        image_shape=index.shape,
        reference_images=asked or there,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        layer=extractor.layer,
        precision=extractor.precision,
        preprocessing=extractor.preprocessing,
        batch_size=config.batch_size,
        torch_fidelity=version("torch-fidelity"),
    )
    return Protocol(
        reference=reference,
        num_images=config.num_images,
        seed=config.seed,
        weights=config.weights,
        kid_subset_size=_kid_subset(min(config.num_images, reference.reference_images)),
        dim=extractor.dim,
    )


def _kid_subset(count: int) -> int:
    """KID averages over subsets: 1000 images each, or half the set when that is small."""
    return KID_SUBSET if count >= 2 * KID_SUBSET else count // 2 or 1


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
