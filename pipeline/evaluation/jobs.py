"""What a command scores: the checkpoints of a run, one generator alone, or a set of images.

Each function calls ``show`` on rank 0 with lines for ``runs.score_tables`` and a text to print.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.data.shards import Index
from pipeline.evaluation import candidates
from pipeline.evaluation.candidates import Candidate, chosen_ids
from pipeline.evaluation.extractors import MOST_FEATURES
from pipeline.evaluation.metrics import table
from pipeline.evaluation.pictures import (
    Pictures,
    from_shards,
    has_statistics_only,
    open_pictures,
)
from pipeline.evaluation.run_scores import RunScores
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.survey import Asked
from pipeline.runs.generators import Opened, open_generator
from pipeline.runs.results import best
from pipeline.runs.score_tables import Line, lines_of
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.ranks import on_every_rank

Show = Callable[[list[Line], str], None]
NO_SHAPE = (0, 0, 0)
"""Shape of the images of an npz file with mu and sigma, which does not state it."""


def score_run(
    scorer: Scorer,
    run_dir: Path,
    checkpoint: Path | None,
    *,
    all_steps: bool,
    watch: float | None,
    show: Show,
) -> None:
    """Score checkpoints of a run, and show all scores that it has under this protocol.

    Args:
        scorer: of the run's configuration.
        run_dir: the run's folder.
        checkpoint: the one to score; None = the newest, or all.
        all_steps: score every checkpoint without a score.
        watch: seconds between two looks for new ones until the training ends; None = look once.
        show: is given the scores.

    Raises:
        CheckpointError: a checkpoint cannot be scored; all others are scored and shown.
    """
    weights = scorer.config.eval.weights

    def find() -> list[Candidate]:
        if checkpoint:
            return [candidates.open_folder(checkpoint, weights)]
        found = candidates.find_in_run(run_dir, weights)
        return found if all_steps else found[-1:]

    with closing(RunScores(scorer, run_dir)) as run_scores:
        scorer.load_reference()
        while True:
            # Read before ``find``, so that the last checkpoint of the training is still found.
            training_ended = run_scores.training_has_ended()
            run_scores.score_all(find)
            run_scores.log_to_wandb()
            if watch is None or training_ended:
                break
            scorer.wait(watch)
        if scorer.is_main:
            lines, tables = [], []
            for each in (scorer, *scorer.others):
                rows = run_scores.rows(each.protocol.id)
                first = best(rows)
                tables.append(table(rows, each.protocol, first["step"] if first else None))
                lines += lines_of(run_dir.resolve().name, rows)
            show(lines, "\n".join(tables))
        run_scores.raise_if_any_failed()


def score_images(scorer: Scorer, pictures: Pictures, show: Show) -> None:
    """Score the first ``eval.num_images`` images of a set, or a fixed random choice of them.

    Raises:
        EvaluationError: there are too few, or their size differs from that of the real images.
    """
    count, available = scorer.protocol.num_images, pictures.num_samples
    where = f"--images {pictures.location}"
    if available < count:
        raise EvaluationError(
            f"eval.num_images is {count}, but {where} has {available} images that can be read. Add "
            f"images, or set eval.num_images={available} (scores of different N are not "
            "comparable)."
        )
    _require_size(where, pictures.shape, scorer)
    rows = chosen_ids(available, count)
    # Names of a folder may be sorted by class: of many, any first part must hold all classes.
    images = pictures.images(rows if count > MOST_FEATURES else np.sort(rows))
    scorer.load_reference()
    _show_one(scorer, scorer.score(images, "images"), pictures.location, show)


def score_generator(scorer: Scorer, opened: Opened, show: Show) -> None:
    """Score a G that lies in no run folder."""
    _require_size(f"--checkpoint {opened.name}", opened.model.image_shape, scorer)
    scorer.load_reference()
    scores = scorer.score_generator(opened.G, opened.model, opened.name)
    _show_one(scorer, scores, opened.name, show)


def _require_size(where: str, shape: tuple[int, int, int], scorer: Scorer) -> None:
    """Raise ``EvaluationError`` if images are of another size than the real ones."""
    (height, width, _), real = shape, scorer.index.shape
    if real != NO_SHAPE and (height, width) != real[:2]:
        raise EvaluationError(
            f"{where}: has images of {width}x{height}, the real ones ({scorer.index.location}) are "
            f"{real[1]}x{real[0]}. Give images of that size, or --size N to make central squares "
            "of N pixels of all that are read from files."
        )


def _show_one(scorer: Scorer, found: list[dict[str, float]], name: str, show: Show) -> None:
    if scorer.is_main:
        each = zip((scorer, *scorer.others), found, strict=True)
        lines = [Line(name, one.protocol.id, scores) for one, scores in each]
        values = [pair for scores in found for pair in scores.items()]
        show(lines, "\n".join(f"{name:<50} {value:.5g}" for name, value in values))


def open_alone(
    location: str, weights: str, config: Config, accelerator: Accelerator
) -> tuple[Config, Opened]:
    """Open a G that lies in no run folder; returns the configuration with its architecture, and G.

    Raises:
        UserError: see ``generators.open_generator``.
    """
    network, device = config.eval.weights, accelerator.device
    opened = on_every_rank(accelerator, lambda: open_generator(location, weights, network, device))
    return dataclasses.replace(config, model=opened.model), opened


def open_sets(
    images: str | None,
    against: str | None,
    asked: Asked,
    config: Config,
    *,
    all_images: bool,
    accelerator: Accelerator,
) -> tuple[Config, Pictures | None, Pictures | Index | None]:
    """Open the sets of images that the command line names; called on all ranks.

    Args:
        images: the set to score, None without one.
        against: the real images, or an npz file with mu and sigma; None = those of the
            configuration.
        asked: what may be done to the images.
        config: of the evaluation.
        all_images: score all images of the set, not ``eval.num_images``.
        accelerator: of this rank.

    Returns:
        the configuration for these sets, the set to score, and the real images.

    Raises:
        UserError: see ``open_pictures``.
    """
    scored: Pictures | None = None
    real: Pictures | Index | None = None
    if images:
        found = open_pictures(images, "--images", asked, accelerator)
        if isinstance(found, Index):
            found = from_shards(found, config.data.verify, accelerator)
        scored = found
    if against and has_statistics_only(against):
        about = {"location": against, "kind": "mu and sigma"}
        none = np.empty(0, np.int32)
        real = Pictures(against, NO_SHAPE, "", none, lambda rows: np.empty(0, np.uint8), about)
        config = _with_eval(config, reference=against)
    elif against:
        real = open_pictures(against, "--against", asked, accelerator)
        config = _with_eval(config, reference="", reference_images=0)
    if scored and all_images:
        config = _with_eval(config, num_images=scored.num_samples)
    return config, scored, real


def _with_eval(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))
