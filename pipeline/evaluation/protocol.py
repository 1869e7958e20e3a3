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
from pipeline.evaluation.catalogue import METRIC_OF, METRICS, choose, floor_of
from pipeline.evaluation.extractors import MOST_FEATURES, Extractor, slug
from pipeline.evaluation.pictures import Pictures
from pipeline.runtime.errors import EvaluationError

SAMPLING = "z-table blocks of 64, standing BatchNorm, round and clamp to uint8: v1"
"""Name of the way images are generated. Part of the protocol, so a changed way needs a new name."""
KID_SUBSET = 1000
"""Images in each of the random subsets that KID is the mean of."""


@dataclass(frozen=True, kw_only=True)
class ReferenceProtocol:
    """The settings that a reference file depends on.

    ``data`` is the fingerprint of the shards, or "npz:" and the sha256 of a file with mu and sigma,
    whose ``reference_images`` are unknown: 0. ``held_out`` is the fingerprint of the held-out
    shards and the number of their images that are used.
    """

    data: str
    image_shape: tuple[int, int, int]
    reference_images: int
    kept_features: int
    has_statistics: bool
    has_radii: bool
    extractor: str
    extractor_sha256: str
    layer: str
    precision: str
    preprocessing: str
    batch_size: int
    torch_fidelity: str
    held_out: str = ""

    @property
    def id(self) -> str:
        """12 hex digits, the same if and only if all fields are the same."""
        return hash_fields(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All settings that a score depends on, except for the generator.

    With ``seeds`` scores are means over them, and ``seed`` is the first one. ``class_images`` is
    the least number of images of a class, generated or real, if classes are compared.
    """

    reference: ReferenceProtocol
    metrics: tuple[str, ...]
    num_images: int
    seed: int
    weights: str
    labels: str
    kid_subset_size: int
    dim: int
    is_full: bool
    is_undersampled: bool
    sampling: str = SAMPLING
    seeds: tuple[int, ...] = ()
    class_images: int | None = None

    columns = (
        *("fid", "is", "kid", "mind", "precision", "recall", "density", "coverage"),
        *("memorization", "copies", "class_fid"),
    )

    @property
    def id(self) -> str:
        """12 hex digits, the same if and only if all fields are the same."""
        return hash_fields(dataclasses.asdict(self))

    def key(self, score: str) -> str:
        """Return the metric key of a score in ledger and W&B.

        It says what differs: ``eval/fid_50k_full`` compares Inception's features of 50,000 images
        with those of all real ones, ``eval/fd_my-net_64_2k_ref10k_raw`` features of another
        extractor, of 2,000 images of G itself, with 10,000 real ones. The names of precision,
        recall, density and coverage have the extractor in any case, because published ones are of
        VGG16.

        Args:
            score: of ``catalogue.METRICS``, or ``class_fid_c3`` of class 3.
        """
        real, metric = self.reference, METRIC_OF[score.partition("_c")[0]]
        parts = [score]
        if (real.extractor, real.layer) != ("inception", "2048"):
            other = {"fid": "fd", "kid": "kd", "kid_std": "kd_std"}
            name = other.get(score, score.replace("class_fid", "class_fd"))
            parts = [name, *_name_of(real)]
        elif metric in ("prc", "density_coverage", "memorization"):
            parts.append("inception")
        if real.precision != "fp32":
            parts.append(real.precision)
        cap = METRICS[metric].cap
        images, references = self.num_images, real.reference_images
        if cap is not None:
            images, references = min(images, cap), min(references, cap)
        if metric == "mind":
            images = references = min(images, references)
        parts.append(short_count(images))
        if real.data.startswith("npz:"):
            parts += [f"ref-{real.data[4:12]}"] if metric != "is" else []
        elif metric != "is":
            full = self.is_full and references == real.reference_images
            parts.append("full" if full else f"ref{short_count(references)}")
        if self.weights == "raw":
            parts.append("raw")
        if self.labels == "uniform":
            parts.append("uniform")
        few = metric == "class_fid" and (self.class_images or 0) < 2 * self.dim
        if few or (metric == "fid" and self.is_undersampled):
            parts.append("undersampled")
        return "eval/" + "_".join(parts)

    def title(self, score: str) -> str:
        """Return the title of a score in tables."""
        if score == "class_fid":
            return "CLASS-FD"
        return self.key(score).removeprefix("eval/").split("_")[0].upper()

    @property
    def headline(self) -> str:
        """Key of the score by which the best checkpoint is chosen."""
        return self.key(METRICS[self.metrics[0]].scores[0])

    @property
    def higher_is_better(self) -> bool:
        """Whether the best checkpoint has the highest headline score."""
        return METRICS[self.metrics[0]].higher_is_better

    def describe(self) -> str:
        """Return the protocol as one line to print."""
        real = self.reference
        return (
            f"protocol {self.id}: {real.extractor} layer {real.layer} ({self.dim} numbers, "
            f"{real.precision}), {', '.join(self.metrics)}, {self.num_images} images against "
            f"{real.reference_images or 'statistics of'} real ones, "
            f"{'G_ema' if self.weights == 'ema' else 'G'}, {show_seeds(self)}"
            f"{'' if self.labels == 'none' else f', labels: {self.labels}'}"
        )


def _name_of(real: ReferenceProtocol) -> tuple[str, ...]:
    """Return an extractor and its layer as keys have them.

    Where there is one layer only, its name is that of the network. The size of DINOv2 that the
    literature means has none: FD of DINOv2 ViT-L/14 (Stein et al. 2023).
    """
    if real.extractor == "dinov2-vit-l-14":
        return ("dinov2",)
    name = slug(real.extractor)
    return (name,) if real.layer in ("dinov2", "clip") else (name, real.layer)


def show_seeds(protocol: Any) -> str:
    """Return the seeds of a protocol as its description has them."""
    if protocol.seeds:
        return f"mean over seeds {', '.join(map(str, protocol.seeds))}"
    return f"seed {protocol.seed}"


def seeds_of(config: EvalConfig) -> tuple[int, tuple[int, ...]]:
    """Return the fields ``seed`` and ``seeds`` of a protocol."""
    seeds = config.seeds or [config.seed]
    return seeds[0], tuple(seeds) if len(seeds) > 1 else ()


def label_rule(labels: str, num_classes: int) -> str:
    """Return how the classes of generated images are chosen: "none", "data" or "uniform"."""
    return labels if num_classes else "none"


def make_protocol(
    config: EvalConfig,
    extractor: Extractor,
    index: Index | Pictures,
    num_classes: int = 0,
    npz: str = "",
    held_out: Index | None = None,
    class_images: int | None = None,
) -> tuple[Protocol, list[str]]:
    """Make the protocol of a configuration.

    Args:
        config: section eval of the configuration.
        extractor: loaded by it.
        index: of the shards with the real images.
        num_classes: ``model.num_classes``.
        npz: sha256 of the npz file that ``eval.reference`` names; "" = it names none.
        held_out: of the shards that ``eval.held_out`` names; None = it names none.
        class_images: least number of generated or real images of a class; None = no classes.

    Returns:
        the protocol, and a line for each usual metric that is left out.

    Raises:
        EvaluationError: ``eval.reference_images`` is more than the shards have, or a metric needs
            more images.
    """
    available, wanted = index.num_samples, config.reference_images
    if wanted > available:
        raise EvaluationError(
            f"eval.reference_images ({wanted}): data.shards ({index.location}) has {available} "
            f"images. Use at most {available}, or 0 for all."
        )
    count = 0 if npz else wanted or available
    others = min(held_out.num_samples, MOST_FEATURES) if held_out else 0
    metrics, left_out = choose(config, extractor, None if npz else count, others, class_images)
    caps = [METRICS[name].cap or 0 for name in metrics]
    reference = ReferenceProtocol(
        data=f"npz:{npz}" if npz else index.fingerprint,
        image_shape=index.shape,
        reference_images=count,
        kept_features=min(count, max(caps)),
        has_statistics="fid" in metrics,
        has_radii=bool({"prc", "density_coverage"} & set(metrics)),
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        layer=extractor.layer,
        precision=extractor.precision,
        preprocessing=extractor.preprocessing,
        batch_size=config.batch_size,
        torch_fidelity=version("torch-fidelity"),
        held_out=f"{held_out.fingerprint}:{others}"
        if held_out and "memorization" in metrics
        else "",
    )
    seed, seeds = seeds_of(config)
    few = min(config.num_images, config.num_images if npz else count)
    protocol = Protocol(
        reference=reference,
        metrics=metrics,
        num_images=config.num_images,
        seed=seed,
        seeds=seeds,
        weights=config.weights,
        labels=label_rule(config.labels, num_classes),
        kid_subset_size=_kid_subset(min(few, MOST_FEATURES)),
        dim=extractor.dim,
        class_images=class_images if "class_fid" in metrics else None,
        is_full=count == available,
        is_undersampled="fid" in metrics and few < floor_of("fid", extractor),
    )
    return protocol, left_out


def _kid_subset(count: int) -> int:
    """Return the size of KID's subsets: 1000, or half of the images if there are few."""
    return KID_SUBSET if count >= 2 * KID_SUBSET else count // 2 or 1


def short_count(count: int) -> str:
    """Return a number of images as used in metric keys: 10000 -> "10k", 2500 -> "2500"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def hash_fields(fields: dict[str, Any]) -> str:
    """Return 12 hex digits of the sha256 of a protocol's fields.

    Those that are "", () or None do not count, so that a new field leaves the ids of earlier rows
    as they are.
    """

    def stated(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: stated(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if value not in ("", (), None)
        }

    return hashlib.sha256(json.dumps(stated(fields), sort_keys=True).encode()).hexdigest()[:12]
