"""Open what can be scored: snapshots and checkpoints of a run, sets of images, shards.

Each is opened as ``Images``, a function (start, stop) -> (n, H, W, C) uint8. It returns the same
images on every rank and for any batch size, so ``extractors.extract`` can divide them among ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.config.loading import load
from pipeline.config.schema import DataConfig, ModelConfig
from pipeline.data.cache import Cache
from pipeline.data.codecs import DecodeError
from pipeline.data.order import permutation
from pipeline.data.reader import Reader
from pipeline.data.shards import Index
from pipeline.evaluation.protocol import PURPOSE
from pipeline.models.noise import z_rows
from pipeline.models.sampling import Images, draw_images, make_sampler
from pipeline.runs import checkpoint
from pipeline.runs.step_folders import SNAPSHOTS, committed, step_of
from pipeline.runtime.errors import (
    CheckpointError,
    DataError,
    EvaluationError,
    is_out_of_memory,
)

NETWORK = {"ema": "G_ema", "raw": "G"}
"""``eval.weights`` -> name of the network in a checkpoint."""
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Candidate:
    """A generator on disk: the folder of a snapshot or a checkpoint, and its step."""

    path: Path
    step: int

    @property
    def is_snapshot(self) -> bool:
        return (self.path / checkpoint.GENERATOR).is_file()


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
    snapshot = (path / checkpoint.GENERATOR).is_file()
    number = path.name.removeprefix("step_")
    if not number.isdecimal() or not (snapshot or (path / checkpoint.STATE).is_file()):
        raise EvaluationError(
            f"--checkpoint {path}: is neither a checkpoint nor a snapshot. Give a folder step_N "
            "in checkpoints/ or snapshots/ of a run."
        )
    if snapshot and weights != "ema":
        raise EvaluationError(
            f"--checkpoint {path}: a snapshot contains G_ema only, but eval.weights is {weights}. "
            "Give a folder in checkpoints/, or set eval.weights=ema."
        )
    return Candidate(path, int(number))


def open_generator(
    candidate: Candidate, run_dir: Path, weights: str, device: torch.device
) -> tuple[nn.Module, ModelConfig]:
    """Load G in eval mode with recomputed BatchNorm statistics.

    Args:
        candidate: to load from.
        run_dir: run folder; the configuration of a checkpoint is read from it.
        weights: "ema" = G_ema, "raw" = G. Only "ema" for a snapshot.
        device: to put G on.

    Returns:
        G and its architecture.

    Raises:
        CheckpointError: the files are damaged, missing or of another architecture, or G contains
            NaN or infinite values.
    """
    if candidate.is_snapshot:
        G, config = checkpoint.load_snapshot(candidate.path, device)
    else:
        config = load(run_dir / "config.yaml")
        networks = checkpoint.read(candidate.path).weights
        try:
            G = make_sampler(config.model, networks[NETWORK[weights]], device)
        except (KeyError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{candidate.path}: cannot be used: {error}.") from None
    checkpoint.check_finite(G, candidate.path)
    return G, config.model


def generated_images(G: nn.Module, model: ModelConfig, seed: int) -> Images:
    """Return the images that G makes of the evaluation noise of ``seed``; any number of rows."""
    return lambda start, stop: draw_images(G, z_rows(model, seed, PURPOSE, start, stop - start))


def real_images(index: Index, data: DataConfig, count: int) -> Images:
    """Return the images of ``chosen_ids``, read from shards.

    The returned function raises DataError if a shard cannot be read.
    """
    reader = Reader(index, Cache(index, data.cache_dir, data.cache_gib))
    ids = chosen_ids(index.num_samples, count)

    def images(start: int, stop: int) -> NDArray[np.uint8]:
        rows = ids[start:stop]
        out = np.empty((len(rows), *index.shape), np.uint8)
        reader.read(rows, out)
        return out

    return images


def images_in_folder(location: str, shape: tuple[int, int, int], count: int) -> Images:
    """Return ``count`` images of a folder, zip archive or tar files, ordered by name.

    If there are more, a fixed random choice of them is used, because neighbours by name may be of
    one class. The images are converted as ``pipeline.prepare`` does: those of another size are
    cropped to the central square and resized. The returned function raises DataError if an image
    cannot be decoded.

    Args:
        location: given with ``--images``.
        shape: (H, W, C) to convert to.
        count: number of images.

    Raises:
        DataError: there are no images at ``location``.
        EvaluationError: there are fewer than ``count``.
    """
    from pipeline.data import sources  # imports the decoders of all formats

    source = sources.find(location, split="train", idx=None, download=False)
    if (available := len(source.names)) < count:
        raise EvaluationError(
            f"eval.num_images is {count}, but --images {location} has {available} images. Add "
            f"images, or set eval.num_images={available} (scores of different N are not "
            "comparable)."
        )
    read = sources.reader(source, shape[0], shape[2], WHITE)
    rows = np.sort(chosen_ids(available, count)).tolist()

    def read_image(row: int) -> NDArray[np.uint8]:
        try:
            return read(row)[0]
        except DecodeError as error:
            raise DataError(  # on this rank alone, which prints it
                f"--images {location}: {source.names[row]}: {error}. Repair or remove this file."
            ) from None

    return lambda start, stop: np.stack([read_image(row) for row in rows[start:stop]])


def chosen_ids(num_samples: int, count: int) -> NDArray[np.int64]:
    """Return the ids of the real images to compare with, in order: (count,) int64.

    They are the first ``count`` of a fixed random permutation of all ids.
    """
    return permutation(num_samples, f"{PURPOSE}|reference")[:count]
