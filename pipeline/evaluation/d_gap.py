"""D's train/held-out gap: does D know its training images by heart?

Karras et al. 2020 (arXiv 2006.06676, section 3.1, equation 1) compare the mean of D's output over
training images with that over held-out and over generated ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.schema import Config, ModelConfig
from pipeline.data.loader import normalise
from pipeline.data.shards import Index
from pipeline.evaluation import candidates
from pipeline.evaluation.candidates import Candidate, chosen_ids
from pipeline.evaluation.pictures import Pictures
from pipeline.models.dcgan import make_discriminator
from pipeline.models.sampling import Images
from pipeline.runs import checkpoint
from pipeline.runs.generators import NETWORK
from pipeline.runs.step_folders import CHECKPOINTS, folder_of
from pipeline.runtime.errors import CheckpointError
from pipeline.runtime.hardware import deterministic_fp32

MOST, BATCH = 2048, 64
"""Images of each set, at most, and in a batch: BatchNorm of D normalises with the batch."""
GAP, MARGIN = "eval/d_gap", "eval/d_margin"


def open_discriminator(
    candidate: Candidate, model: ModelConfig, run_dir: Path, weights: str, device: torch.device
) -> nn.Module | None:
    """Load the D that was trained with a generator; a snapshot's is in the checkpoint of its step.

    Args:
        candidate: the generator, with its id.
        model: architecture of both.
        run_dir: the run's folder.
        weights: ``ema`` or ``raw``, of the candidate.
        device: to put D on.

    Returns:
        D, or None if there is no such checkpoint, or one of other weights.

    Raises:
        CheckpointError: it is damaged, or of another architecture.
    """
    path = candidate.path
    if candidate.is_snapshot:
        path = folder_of(run_dir, CHECKPOINTS, candidate.step)
        if not path.is_dir():
            return None
        if checkpoint.generators(path).get(NETWORK[weights]) != candidate.generator:
            return None
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first weights are overwritten below
        D = make_discriminator(model)
    try:
        D.load_state_dict(checkpoint.read(path).weights["D"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: D cannot be loaded: {error}.") from None
    return D.requires_grad_(False).to(device)


def d_gap(
    D: nn.Module,
    G: nn.Module,
    model: ModelConfig,
    config: Config,
    training: Index | Pictures,
    held_out: Index,
) -> dict[str, float]:
    """Compare D's mean logit over training images with those over held-out and generated ones.

    ``GAP`` is training minus held-out, ``MARGIN`` training minus generated; GAP / MARGIN is r_v of
    the paper. All sets have the same number of images: the smallest set's, at most ``MOST``, in
    whole batches. With classes D gets those of the images.

    Args:
        D: (n, C, S, S), classes -> (n,) logits, in training mode.
        G: as ``candidates.open_generator`` returns it.
        model: architecture of both.
        config: of the evaluation.
        training: the images that D was trained on.
        held_out: others of the same distribution.

    Returns:
        both scores; {} if a logit is NaN or infinite, or real images lack a class.
    """
    smallest = min(MOST, training.num_samples, held_out.num_samples, config.eval.num_images)
    count = smallest - smallest % BATCH
    classes = None
    if model.num_classes:
        classes = candidates.classes_of(training, config.eval, model.num_classes)
    made = candidates.generated_images(G, model, config.eval.seed, classes)
    sets: list[tuple[Images, Tensor | None]] = [(made, classes)]
    for real in (training, held_out):
        labels = None
        if model.num_classes:
            labels = _labels(real, count, model.num_classes)
            if labels is None:
                return {}
        sets.append((candidates.real_images(real, config.data, count), labels))
    device = next(D.parameters()).device
    generated, known, unknown = (mean_logit(D, *one, count, device) for one in sets)
    found = {GAP: known - unknown, MARGIN: known - generated}
    return found if np.isfinite(list(found.values())).all() else {}


def mean_logit(
    D: nn.Module, images: Images, labels: Tensor | None, count: int, device: torch.device
) -> float:
    """Return the mean of D's logit over the first ``count`` images, in batches of ``BATCH``."""
    total = 0.0
    with deterministic_fp32(), torch.no_grad():
        for start in range(0, count, BATCH):
            x = normalise(torch.from_numpy(images(start, start + BATCH)), device)
            y = None if labels is None else labels[start : start + BATCH].to(device)
            total += float(D(x, y, None).double().sum())
    return total / count


def _labels(real: Index | Pictures, count: int, num_classes: int) -> Tensor | None:
    """Return the classes of the images of ``real_images``: (count,) int64; None if one lacks it."""
    labels = real.labels_of(chosen_ids(real.num_samples, count))
    if labels.min() < 0 or labels.max() >= num_classes:
        return None
    return torch.from_numpy(labels.astype(np.int64))
