"""Open what can be scored: snapshots and checkpoints of a run, sets of images, shards.

Each is opened as ``Images``, a function (start, stop) -> (n, H, W, C) uint8. It returns the same
images on every rank and for any batch size, so ``extractors.extract`` can divide them among ranks.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.schema import Config, DataConfig, EvalConfig, ModelConfig
from pipeline.data.cache import Cache
from pipeline.data.order import permutation
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, read_index
from pipeline.evaluation.extractors import MOST_FEATURES
from pipeline.evaluation.pictures import Pictures
from pipeline.models.noise import z_rows
from pipeline.models.sampling import Images, draw_images, generator_id
from pipeline.runs import checkpoint, snapshot
from pipeline.runs.generators import NETWORK, open_checkpoint
from pipeline.runs.scored_images import PURPOSE
from pipeline.runs.scored_images import classes_like as classes_like
from pipeline.runs.step_folders import SNAPSHOTS, committed, step_of
from pipeline.runtime.errors import (
    CheckpointError,
    EvaluationError,
    RunFolderError,
)
from pipeline.runtime.ranks import on_every_rank


@dataclass(frozen=True)
class Candidate:
    """A generator on disk: the folder of a snapshot or a checkpoint, its step, its id if known."""

    path: Path
    step: int
    generator: str = ""

    @property
    def is_snapshot(self) -> bool:
        return (self.path / snapshot.GENERATOR).is_file()


def find_in_run(run_dir: Path, weights: str) -> list[Candidate]:
    """Return the candidate of every step of a run, oldest first.

    With ``weights`` = ema it is the snapshot of the step if the step has one. Otherwise it is the
    checkpoint.
    """
    found = {step_of(path): path for path in committed(run_dir)}
    if weights == "ema":
        found |= {step_of(path): path for path in committed(run_dir, SNAPSHOTS)}
    return [Candidate(found[step], step) for step in sorted(found)]


def open_folder(path: Path, weights: str) -> Candidate:
    """Return the candidate in a folder ``step_N``.

    Raises:
        EvaluationError: the folder is neither a snapshot nor a checkpoint, or lacks the weights.
    """
    is_snapshot = (path / snapshot.GENERATOR).is_file()
    number = path.name.removeprefix("step_")
    if not number.isdecimal() or not (is_snapshot or (path / checkpoint.STATE).is_file()):
        raise EvaluationError(
            f"--checkpoint {path}: is neither a checkpoint nor a snapshot. Give a folder step_N "
            "in checkpoints/ or snapshots/ of a run."
        )
    if is_snapshot and weights != "ema":
        raise EvaluationError(
            f"--checkpoint {path}: a snapshot contains G_ema only, but eval.weights is {weights}. "
            "Give a folder in checkpoints/, or set eval.weights=ema."
        )
    return Candidate(path, int(number))


def with_generator(candidate: Candidate, run_dir: Path, weights: str) -> Candidate:
    """Return a candidate with the id of its generator; "" if it is damaged.

    It is read from the small files. Those of early versions do not have it, so it is computed.
    """
    path = candidate.path
    with suppress(CheckpointError, RunFolderError, OSError):
        if candidate.is_snapshot:
            stated = snapshot.stated_generator(path)
        else:
            stated = checkpoint.generators(path).get(NETWORK[weights], "")
        file = snapshot.weights_file(path) if candidate.is_snapshot else path / checkpoint.STATE
        stated = stated or _computed_id(candidate, run_dir, weights, file.stat().st_mtime_ns)
        return replace(candidate, generator=stated)
    return replace(candidate, generator="")


@functools.lru_cache(maxsize=4096)
def _computed_id(candidate: Candidate, run_dir: Path, weights: str, changed: int) -> str:
    """Return the id of a generator that does not state it; ``changed`` makes the cache follow."""
    G, model = open_generator(candidate, run_dir, weights, torch.device("cpu"))
    return generator_id(model, G.state_dict())


def open_generator(
    candidate: Candidate, run_dir: Path, weights: str, device: torch.device
) -> tuple[nn.Module, ModelConfig]:
    """Load G in eval mode with recomputed BatchNorm statistics.

    Args:
        candidate: to load from.
        run_dir: run folder; what a checkpoint of an early version does not state is read from it.
        weights: "ema" = G_ema, "raw" = G. Only "ema" for a snapshot.
        device: to put G on.

    Returns:
        G and its architecture.

    Raises:
        CheckpointError: the files are damaged, missing or of another architecture, or G contains
            NaN or infinite values.
    """
    if candidate.is_snapshot:
        G, config = snapshot.load_snapshot(candidate.path, device)
    else:
        G, config = open_checkpoint(candidate.path, run_dir, weights, device)
    snapshot.check_finite(G, candidate.path)
    return G, config.model


def generated_images(
    G: nn.Module, model: ModelConfig, seed: int, classes: Tensor | None = None
) -> Images:
    """Return the images that G makes of the evaluation noise of ``seed``.

    Args:
        G: as ``open_generator`` returns it.
        model: its architecture.
        seed: ``eval.seed``.
        classes: of the rows, as ``classes_like`` returns them; None = as of ``z_rows``.
    """
    return lambda start, stop: draw_images(
        G, z_rows(model, seed, PURPOSE, start, stop - start, classes)
    )


def open_shards(config: Config, accelerator: Accelerator, field: str, location: str) -> Index:
    """Read the index of shards with images of the shape of the model; called on all ranks."""

    def read() -> Index:
        model = config.model
        options = f"--size {model.image_size} --channels {model.channels}"
        index = read_index(location, options, field)
        index.require_shape(model.image_shape, field)
        return index

    return on_every_rank(accelerator, read)


def require_held_out(held_out: Index, training: Index | Pictures, field: str) -> Index:
    """Return shards of held-out images; raise ``EvaluationError`` if they are the training ones."""
    if held_out.fingerprint == training.fingerprint:
        size, channels = training.shape[0], training.shape[2]
        raise EvaluationError(
            f"{field} ({held_out.location}): must not be data.shards, the training images. Prepare "
            "held-out images, e.g. with: python -m pipeline.prepare fashion-mnist --split test "
            f"--size {size} --channels {channels} --out data/held-out"
        )
    return held_out


def class_labels(
    index: Index | Pictures, config: EvalConfig, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return the classes of the generated and of the real images whose features are kept.

    Args:
        index: of the shards with the real images.
        config: ``labels``, ``num_images`` and ``reference_images`` are used.
        num_classes: of G.

    Returns:
        two arrays (at most ``MOST_FEATURES``,), 0 to num_classes - 1; None if an image of the
        shards has no such label.

    Raises:
        EvaluationError: as of ``classes_like``.
    """
    classes = classes_of(index, config, num_classes).numpy()
    real = index.labels_of(chosen_ids(index.num_samples, config.reference_images or None))
    if not len(real) or real.min() < 0 or real.max() >= num_classes:
        return None
    return classes[:MOST_FEATURES], real[:MOST_FEATURES].astype(np.int64)


def classes_of(index: Index | Pictures, config: EvalConfig, num_classes: int) -> Tensor:
    """Return the classes of the generated images: (``eval.num_images``,) int64."""
    if config.labels == "data":
        return classes_like(index, num_classes, config.num_images)
    return torch.arange(config.num_images) % num_classes


def real_images(index: Index | Pictures, data: DataConfig, count: int) -> Images:
    """Return the images of ``chosen_ids``, read from shards or another set.

    The returned function raises DataError if they cannot be read.
    """
    ids = chosen_ids(index.num_samples, count)
    if isinstance(index, Pictures):
        return index.images(ids)
    reader = Reader(index, Cache(index, data.cache_dir, data.cache_gib))

    def images(start: int, stop: int) -> NDArray[np.uint8]:
        rows = ids[start:stop]
        out = np.empty((len(rows), *index.shape), np.uint8)
        reader.read(rows, out)
        return out

    return images


def chosen_ids(num_samples: int, count: int | None) -> NDArray[np.int64]:
    """Return the ids of the real images to compare with, in order: (count,) int64.

    They are the first ``count`` of a fixed random permutation of all ids; None = all.
    """
    return permutation(num_samples, f"{PURPOSE}|reference")[:count]
