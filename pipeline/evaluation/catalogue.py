"""The metrics that can be computed: their scores, and how many images they need and take."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import EvalConfig
from pipeline.evaluation.extractors import MOST_FEATURES, Extractor
from pipeline.runtime.errors import EvaluationError

DEFAULT = ("fid", "is", "kid", "prc")


@dataclass(frozen=True)
class Metric:
    """A metric: its scores, the first of which can choose the best checkpoint.

    ``floor`` is the least number of generated and of real images; see ``floor_of`` for None.
    ``cap`` is the largest number that it takes of each; None = all.
    """

    scores: tuple[str, ...]
    floor: int | None
    cap: int | None = MOST_FEATURES
    higher_is_better: bool = False


METRICS = {
    "fid": Metric(("fid",), None, None),
    "kid": Metric(("kid", "kid_std"), 20),
    "mind": Metric(("mind",), 1000),
    "prc": Metric(("precision", "recall"), 30, higher_is_better=True),
    "density_coverage": Metric(("coverage", "density"), 50, higher_is_better=True),
    "memorization": Metric(("memorization", "memorization_zu", "copies"), 100),
    "class_fid": Metric(("class_fid",), None),
    "is": Metric(("is", "is_std"), None, None, higher_is_better=True),
}
"""By the name in ``eval.metrics``; the first one that is computed chooses the best checkpoint."""
METRIC_OF = {score: name for name, metric in METRICS.items() for score in metric.scores}


def floor_of(name: str, extractor: Extractor) -> int:
    """Return the least number of images of a metric.

    A Frechet distance of fewer images than twice the number of features consists mostly of the bias
    of its estimate. That of single classes needs so many images of each class. IS divides the
    images into 10 parts, in which each class should occur.
    """
    if name in ("fid", "class_fid"):
        return 2 * extractor.dim
    if name == "is":
        return 10 * min(extractor.classes, 500)
    return METRICS[name].floor or 0


def choose(
    config: EvalConfig,
    extractor: Extractor,
    real_images: int | None,
    held_out: int = 0,
    class_images: int | None = None,
) -> tuple[tuple[str, ...], list[str]]:
    """Choose the metrics to compute.

    Args:
        config: ``metrics`` empty = those of ``DEFAULT`` that are possible.
        extractor: of the features.
        real_images: number of references; None = only their statistics are known.
        held_out: number of images of ``eval.held_out``; 0 = it names none.
        class_images: least number of generated or real images of a class; None = no classes.

    Returns:
        the metrics, and a line for each one of ``DEFAULT`` that is left out.

    Raises:
        EvaluationError: one that ``eval.metrics`` names is impossible, or none is possible.
    """
    obstacles = {
        name: _obstacle_of_classes(config, extractor, class_images)
        if name == "class_fid" and real_images is not None
        else _obstacle(name, config, extractor, real_images, held_out)
        for name in config.metrics or DEFAULT
    }
    lines = [f"{name}: {reason}" for name, reason in obstacles.items() if reason]
    chosen = tuple(name for name in METRICS if obstacles.get(name) == "")
    if lines and (config.metrics or not chosen):
        raise EvaluationError(
            f"eval.metrics ({', '.join(obstacles)}): cannot be computed:\n  " + "\n  ".join(lines)
        )
    return chosen, lines


def _obstacle(
    name: str, config: EvalConfig, extractor: Extractor, real_images: int | None, held_out: int
) -> str:
    """Return why a metric cannot be computed; "" = it can."""
    if name == "is" and extractor.logits is None:
        return f"the extractor {extractor.name} has no layer of class logits"
    if name not in ("fid", "is") and real_images is None:
        return "needs the features of single images, and eval.reference has only mu and sigma"
    floor, generated = floor_of(name, extractor), config.num_images
    if name == "fid" and config.force:
        return ""
    if name == "is":
        return "" if generated >= floor else f"needs {floor} generated images, not {generated}"
    if name == "memorization" and held_out < floor:
        return (
            f"needs {floor} images that G was not trained on, not {held_out}: set eval.held_out to "
            "shards of them"
        )
    few = generated < floor or (real_images is not None and real_images < floor)
    numbers = f"{generated} and {real_images}" if real_images is not None else f"{generated}"
    remedy = "; eval.force=true computes it anyway, under another name" if name == "fid" else ""
    return f"needs {floor} generated and as many real images, not {numbers}{remedy}" if few else ""


def _obstacle_of_classes(config: EvalConfig, extractor: Extractor, class_images: int | None) -> str:
    """Return why there is no Frechet distance of single classes; "" = there is."""
    if class_images is None:
        return "needs a class-conditional G (model.num_classes) and data.shards with its labels"
    floor = 2 if config.force else floor_of("class_fid", extractor)
    if class_images >= floor:
        return ""
    remedy = "" if config.force else "; eval.force=true computes it anyway, under another name"
    return f"needs {floor} generated and real images of each class, not {class_images}{remedy}"
