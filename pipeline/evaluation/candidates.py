"""Open what can be scored: snapshots and checkpoints of a run, sets of images, shards.

Each is opened as ``Images``, a function (start, stop) -> (n, H, W, C) uint8. It returns the same
images on every rank and for any batch size, so ``extractors.extract`` can divide them among ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.loading import load
from pipeline.config.schema import DataConfig, EvalConfig, ModelConfig
from pipeline.data.cache import Cache
from pipeline.data.order import permutation
from pipeline.data.reader import Reader
from pipeline.data.shards import Index
from pipeline.evaluation.extractors import MOST_FEATURES
from pipeline.evaluation.pictures import Pictures
from pipeline.evaluation.protocol import PURPOSE
from pipeline.models.noise import z_rows
from pipeline.models.sampling import Images, draw_images, generator_id, make_sampler
from pipeline.runs import checkpoint, snapshot
from pipeline.runs.step_folders import SNAPSHOTS, committed, step_of
from pipeline.runtime.errors import (
    CheckpointError,
    ConfigError,
    EvaluationError,
    RunFolderError,
    is_out_of_memory,
)

NETWORK = {"ema": "G_ema", "raw": "G"}
"""``eval.weights`` -> name of the network in a checkpoint."""


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
        found = checkpoint.read(candidate.path)
        try:
            config = load(run_dir / "config.yaml", _model_overrides(found.state), saved=True)
            G = make_sampler(config.model, found.weights[NETWORK[weights]], device)
        except (KeyError, ValueError, RuntimeError, ConfigError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{candidate.path}: cannot be used: {error}.") from None
    snapshot.check_finite(G, candidate.path)
    return G, config.model


def _model_overrides(state: Mapping[str, Any]) -> list[str]:
    """Return the architecture that a checkpoint was trained with, as overrides.

    The run's own configuration may be of a later training in the same folder.
    """
    known = {f"model.{entry.name}" for entry in dataclasses.fields(ModelConfig)}
    values = {k: v for k, v in (state.get("config") or {}).items() if k in known}
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]


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


def classes_like(index: Index | Pictures, num_classes: int, count: int) -> Tensor:
    """Return classes for generated images, in the shares that they have in a shard set.

    The numbers of images are rounded by the largest remainder; of equal remainders the class with
    the lower number gets the image. The order is a fixed random one.

    Args:
        index: of the shards, or other real images.
        num_classes: of G.
        count: number of generated images.

    Returns:
        (count,) int64, 0 to num_classes - 1.

    Raises:
        EvaluationError: some images of the shards have no label, or one that G does not know.
    """
    labels = index.labels
    if labels.min() < 0 or labels.max() >= num_classes:
        raise EvaluationError(
            f"eval.labels (data): data.shards ({index.location}) has labels {labels.min()} (-1: "
            f"none) to {labels.max()}, but G has the classes 0 to {num_classes - 1}. Give the "
            "shards that it was trained on, or set eval.labels=uniform."
        )
    quotas = np.bincount(labels, minlength=num_classes) * count  # in units of 1 / num_samples
    numbers, remainders = np.divmod(quotas, index.num_samples)
    rest = count - int(numbers.sum())
    numbers[np.argsort(-remainders, kind="stable")[:rest]] += 1
    classes = np.repeat(np.arange(num_classes), numbers)
    return torch.from_numpy(classes[permutation(count, f"{PURPOSE}|labels")])


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
    real = index.labels[chosen_ids(index.num_samples, config.reference_images or None)]
    if real.min() < 0 or real.max() >= num_classes:
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
