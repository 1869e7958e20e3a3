"""D as a feature extractor (Radford et al. 2016, section 5.1), and the linear SVM on its features.

"The discriminator's convolutional features from all layers, maxpooling each layer's representation
to produce a 4x4 spatial grid ... flattened and concatenated ... and a regularized linear L2-SVM".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from pipeline.config.schema import DataConfig
from pipeline.data.cache import Cache
from pipeline.data.loader import normalise
from pipeline.data.order import permutation
from pipeline.data.reader import Reader
from pipeline.data.shards import Index
from pipeline.runtime.errors import EvaluationError

BLOCK = 64
TRAIN_BYTES = 28  # of a training feature: float32, and a double with its column inside liblinear
STATISTICS_IMAGES = 2048
POOLED = 4

Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Accuracy in [0, 1] on the test images, with the ``C`` chosen on held-out training images."""

    name: str
    dim: int
    C: float
    accuracy: float
    converged: bool


def labelled(
    index: Index, count: int, seed: int, field: str, data: DataConfig
) -> tuple[NDArray[np.uint8], Labels]:
    """``count`` images of a shard set and their labels, chosen by the seed; 0 = all, in any order.

    Returns:
        images (n, H, W, C) uint8 and labels (n,) int64.

    Raises:
        EvaluationError: samples without a label.
        DataError: a shard cannot be read.
    """
    if (index.table["label"] < 0).any():
        raise EvaluationError(f"{field} ({index.location}): every sample must have a label (.cls).")
    return chosen(index, count, seed, data)


def chosen(
    index: Index, count: int, seed: int, data: DataConfig
) -> tuple[NDArray[np.uint8], Labels]:
    """As ``labelled``, with -1 for samples without a label."""
    ids = permutation(index.num_samples, f"probe|{seed}")[: count or None]
    images = np.empty((len(ids), *index.shape), np.uint8)
    cache = Cache(index, data.cache_dir, data.cache_gib)
    return images, Reader(index, cache).read(ids, images)


def check_memory(train: int, test: int, dim: int, there: int = 0) -> None:
    """Refuse more features than this machine has memory for.

    Args:
        train: number of training images; ``test`` of the others.
        test: see ``train``.
        dim: numbers of each image.
        there: bytes of memory; 0 = those of this machine.

    Raises:
        EvaluationError: with both sizes.
    """
    needed = dim * (train * TRAIN_BYTES + test * 4)
    there = there or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        fitting = max(0, there // dim - test * 4) // TRAIN_BYTES
        raise EvaluationError(
            f"--num-train ({train}): {dim} features of each image take {needed / 2**30:.0f} GiB, "
            f"this machine has {there / 2**30:.0f} GiB; take at most {fitting}."
        )


def set_batchnorm_statistics(D: nn.Module, images: NDArray[np.uint8]) -> None:
    """Set the BatchNorm statistics of D to the mean over batches of images; put D in eval mode.

    In training D normalises each batch with its own statistics and keeps none. The features of an
    image must not depend on the other images of its batch.

    Args:
        D: a DCGAN discriminator on the CPU, changed in place.
        images: (N, H, W, C) uint8; the first ``STATISTICS_IMAGES`` are used.
    """
    for module in D.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = True
            module.running_mean = torch.empty(module.num_features)  # ``update_bn`` resets these
            module.running_var = torch.empty(module.num_features)
            module.num_batches_tracked = torch.tensor(0)
    update_bn(_batches(images[:STATISTICS_IMAGES]), D)
    D.eval()


def conv_features(D: nn.Module, images: NDArray[np.uint8]) -> Features:
    """(N, H, W, C) uint8 -> (N, dim) float32: all conv activations, max-pooled to 4x4.

    Args:
        D: of a DCGAN, with standing statistics, on the CPU.
        images: of the size D was built for.
    """
    pooled: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        if output.ndim == 4:
            pooled.append(F.adaptive_max_pool2d(output, POOLED).flatten(1))

    hooks = [m.register_forward_hook(keep) for m in D.modules() if isinstance(m, nn.LeakyReLU)]
    rows = []
    try:
        with torch.no_grad():
            for batch in _batches(images):
                pooled.clear()
                D(batch)
                rows.append(torch.cat(pooled, 1).numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(rows)


def pixels(images: NDArray[np.uint8]) -> Features:
    """(N, H, W, C) uint8 -> (N, H * W * C) float32 in [-1, 1]."""
    return (images.reshape(len(images), -1) / np.float32(127.5) - 1).astype(np.float32)


def probe(
    name: str,
    train: tuple[Features, Labels],
    test: tuple[Features, Labels],
    strengths: Sequence[float],
) -> Outcome:
    """Train the SVM (squared hinge, L2, one against the rest) and count right answers.

    Features are centred and divided by one number, in place: their root mean square length over
    the training images, so that one ``C`` means the same for 1,000 and for 30,000 of them. With
    several ``strengths``, the last fifth of the training images chooses; the chosen one learns from
    all.

    Raises:
        EvaluationError: too few training images, or all of one class.
    """
    centre = train[0].mean(0)
    length = np.sqrt(np.square(train[0] - centre).sum(1).mean()) or np.float32(1)
    for features in (train[0], test[0]):  # in place: they may be gigabytes
        features -= centre
        features /= length
    x, held, C = train[0], len(train[0]) * 4 // 5, strengths[0]
    if len(np.unique(train[1][:held])) < 2:
        raise EvaluationError(
            f"--num-train ({len(x)}): a classifier needs images of two classes or more; take more."
        )
    if len(strengths) > 1:
        scores = [
            _fit(x[:held], train[1][:held], s)[0].score(x[held:], train[1][held:])
            for s in strengths
        ]
        C = strengths[int(np.argmax(scores))]
    svm, converged = _fit(x, train[1], C)
    accuracy = float(svm.score(test[0], test[1]))
    return Outcome(name, x.shape[1], C, accuracy, converged)


def _fit(x: Features, labels: Labels, C: float) -> tuple[Any, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    svm = LinearSVC(C=C, dual=len(x) < x.shape[1], tol=1e-3, max_iter=3000, random_state=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        svm.fit(x, labels)
    return svm, not any(issubclass(w.category, ConvergenceWarning) for w in said)


def _batches(images: NDArray[np.uint8]) -> list[Tensor]:
    return [
        normalise(batch, torch.device("cpu")) for batch in torch.from_numpy(images).split(BLOCK)
    ]
