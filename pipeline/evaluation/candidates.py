"""What can be evaluated: snapshots and checkpoints of a run, folders of images, shards.

Each becomes rows of images, (n, H, W, C) uint8 by (start, stop), the same on every rank and for
every cut: ``features.extract`` shares them out.
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
from pipeline.runs.run_folder import SNAPSHOTS, committed, step_of
from pipeline.runtime.errors import CheckpointError, DataError, EvaluationError

NETWORK = {"ema": "G_ema", "raw": "G"}
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Candidate:
    """A generator on disk: the folder of a snapshot or a checkpoint, and the step in its name."""

    path: Path
    step: int

    @property
    def is_snapshot(self) -> bool:
        return (self.path / checkpoint.GENERATOR).is_file()


def find_in_run(run_dir: Path, weights: str) -> list[Candidate]:
    """Every step of a run that can be evaluated, oldest first.

    A snapshot where there is one, for ``ema``; else the checkpoint of that step.
    """
    found = {step_of(path): path for path in committed(run_dir)}
    if weights == "ema":
        found |= {step_of(path): path for path in committed(run_dir, SNAPSHOTS)}
    return [Candidate(found[step], step) for step in sorted(found)]


def open_folder(path: Path, weights: str) -> Candidate:
    """The candidate in a folder ``step_N``.

    Raises:
        EvaluationError: neither a snapshot nor a checkpoint, or one without these weights.
    """
    snapshot = (path / checkpoint.GENERATOR).is_file()
    number = path.name.removeprefix("step_")
    if not number.isdecimal() or not (snapshot or (path / checkpoint.STATE).is_file()):
        raise EvaluationError(
            f"--checkpoint {path}: must be a folder step_N of checkpoints/ or snapshots/ of a run."
        )
    if snapshot and weights != "ema":
        raise EvaluationError(
            f"--checkpoint {path}: a snapshot holds G_ema only; with eval.weights=raw give a "
            "folder of checkpoints/."
        )
    return Candidate(path, int(number))


def open_generator(
    candidate: Candidate, run_dir: Path, weights: str, device: torch.device
) -> tuple[nn.Module, ModelConfig]:
    """(G in eval mode with recomputed BatchNorm statistics, its architecture).

    Raises:
        CheckpointError: damaged, removed meanwhile, of another architecture, or diverged.
    """
    if candidate.is_snapshot:
        G, config = checkpoint.load_snapshot(candidate.path, device)
    else:
        config = load(run_dir / "config.yaml")
        found = checkpoint.read(candidate.path).weights
        try:
            G = make_sampler(config.model, found[NETWORK[weights]], device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{candidate.path}: cannot be used: {error}.") from None
    checkpoint.check_finite(G, candidate.path)
    return G, config.model


def generated_images(G: nn.Module, model: ModelConfig, seed: int) -> Images:
    """Images of G from the table of evaluation noise of a seed."""
    return lambda start, stop: draw_images(G, z_rows(model, seed, PURPOSE, start, stop - start))


def real_images(index: Index, data: DataConfig, count: int) -> Images:
    """``count`` chosen images of a shard set; read errors are ``DataError``."""
    reader = Reader(index, Cache(index, data.cache_dir, data.cache_gib))
    ids = chosen_ids(index.num_samples, count)

    def images(start: int, stop: int) -> NDArray[np.uint8]:
        rows = ids[start:stop]
        out = np.empty((len(rows), *index.shape), np.uint8)
        reader.read(rows, out)
        return out

    return images


def images_in_folder(name: str, shape: tuple[int, int, int], count: int) -> Images:
    """``count`` images of a folder, zip archive or tars of images, in the order of their names.

    Of more than ``count`` a fixed random choice: the first ones may be of a few classes only. They
    pass through the path by which ``pipeline.prepare`` makes shards: cropped to the central square
    and resized if they have another size than ``shape`` (H, W, C).

    Raises:
        DataError: nothing usable there; later, an unreadable image.
        EvaluationError: fewer images than the protocol needs.
    """
    from pipeline.data import sources  # decoders of every format: only this needs them

    source = sources.find(name, split="train", idx=None, download=False)
    if len(source.names) < count:
        raise EvaluationError(
            f"--images {name}: holds {len(source.names)} images, eval.num_images ({count}) needs "
            f"as many; set eval.num_images={len(source.names)} for both sides of a comparison."
        )
    read = sources.reader(source, shape[0], shape[2], WHITE)
    chosen = np.sort(chosen_ids(len(source.names), count)).tolist()

    def one(row: int) -> NDArray[np.uint8]:
        try:
            return read(row)[0]
        except DecodeError as error:
            raise DataError(  # told by the rank that met it
                f"--images {name}: {source.names[row]}: {error}; remove it from there."
            ) from None

    return lambda start, stop: np.stack([one(row) for row in chosen[start:stop]])


def chosen_ids(num_samples: int, count: int) -> NDArray[np.int64]:
    """Which real images stand for the set, and in which order: a function of both numbers alone."""
    return permutation(num_samples, f"{PURPOSE}|reference")[:count]
