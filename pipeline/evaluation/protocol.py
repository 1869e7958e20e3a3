"""The settings that a score depends on, and the names of the scores.

Scores are comparable only if they were computed with the same extractor, weights, layer, precision,
numbers of images, noise and real images. ``Protocol`` holds these settings. Each row of the ledger
has its id, and rows with different ids are never compared.
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

PURPOSE = "evaluation"
"""Seeds, with ``eval.seed``, the noise of the generated images, and the choice of real images."""
SAMPLING = "z-table blocks of 64, standing BatchNorm, round and clamp to uint8: v1"
"""Name of the way images are generated. Part of the protocol, so a changed way needs a new name."""
STANDARD_NUM_IMAGES = 50_000
"""Number of images that most published scores are computed from."""
MIN_IMAGES = 10
"""Least number of generated and of real images. IS divides the generated ones into 10 parts."""
KID_SUBSET = 1000
"""Images in each of the random subsets that KID is the mean of."""


@dataclass(frozen=True, kw_only=True)
class ReferenceProtocol:
    """The settings that a reference file depends on."""

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
        """12 hex digits, the same if and only if all fields are the same."""
        return hash_fields(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All settings that a score depends on, except for the generator."""

    reference: ReferenceProtocol
    num_images: int
    seed: int
    weights: str
    kid_subset_size: int
    dim: int
    sampling: str = SAMPLING

    columns = ("fid", "is", "kid", "precision", "recall")
    higher_is_better = False

    @property
    def id(self) -> str:
        """12 hex digits, the same if and only if all fields are the same."""
        return hash_fields(dataclasses.asdict(self))

    @property
    def has_fid(self) -> bool:
        """Whether both sets have at least twice as many images as features have numbers.

        With fewer images, a Frechet distance consists mostly of the bias of its estimate.
        """
        return min(self.num_images, self.reference.reference_images) >= 2 * self.dim

    def key(self, score: str) -> str:
        """Return the metric key of a score in ledger and W&B.

        Only scores of Inception on 50,000 images are called ``eval/fid``, ``eval/is``, ... The key
        of others contains extractor, layer or number of images, like ``eval/fd_my-net_64_2k``.

        Args:
            score: fid, is, is_std, kid, kid_std, precision or recall.
        """
        real = self.reference
        parts = [score]
        if (real.extractor, real.layer) != ("inception", "2048"):
            other = {"fid": "fd", "kid": "kd", "kid_std": "kd_std"}
            parts = [other.get(score, score), slug(real.extractor), real.layer]
        if self.num_images != STANDARD_NUM_IMAGES:
            parts.append(short_count(self.num_images))
        return "eval/" + "_".join(parts)

    def title(self, score: str) -> str:
        """Return the title of a score in tables."""
        return self.key(score).removeprefix("eval/").split("_")[0].upper()

    @property
    def headline(self) -> str:
        """Key of the score by which the best checkpoint is chosen; lower is better."""
        return self.key("fid" if self.has_fid else "kid")

    def describe(self) -> str:
        """Return the protocol as one line to print."""
        real = self.reference
        return (
            f"protocol {self.id}: {real.extractor} layer {real.layer} ({self.dim} numbers, "
            f"{real.precision}), {self.num_images} images against {real.reference_images} real "
            f"ones, {'G_ema' if self.weights == 'ema' else 'G'}, seed {self.seed}"
        )


def make_protocol(config: EvalConfig, extractor: Extractor, index: Index) -> Protocol:
    """Make the protocol of a configuration.

    Args:
        config: section eval of the configuration.
        extractor: loaded by it.
        index: of the shards with the real images.

    Raises:
        EvaluationError: there are fewer than ``MIN_IMAGES`` generated or real images, or
            ``eval.reference_images`` is more than the shards have.
    """
    available, wanted = index.num_samples, config.reference_images
    if wanted > available:
        raise EvaluationError(
            f"eval.reference_images ({wanted}): data.shards ({index.location}) has {available} "
            f"images. Use at most {available}, or 0 for all."
        )
    numbers = {"eval.num_images": config.num_images, "eval.reference_images": wanted or available}
    for field, number in numbers.items():
        if number < MIN_IMAGES:
            raise EvaluationError(
                f"{field} ({number}): IS, precision and recall need at least {MIN_IMAGES} "
                "generated and as many real images. Use more."
            )
    reference = ReferenceProtocol(
        data=index.fingerprint,
        image_shape=index.shape,
        reference_images=wanted or available,
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
    """Return the size of KID's subsets: 1000, or half of the images if there are few."""
    return KID_SUBSET if count >= 2 * KID_SUBSET else count // 2 or 1


def short_count(count: int) -> str:
    """Return a number of images as used in metric keys: 10000 -> "10k", 2500 -> "2500"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def hash_fields(fields: dict[str, Any]) -> str:
    """Return 12 hex digits of the sha256 of a protocol's fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
