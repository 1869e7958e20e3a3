"""D as a feature extractor (Radford et al. 2016, section 5.1), and a linear SVM on its features.

"The discriminator's convolutional features from all layers, maxpooling each layer's representation
to produce a 4x4 spatial grid ... flattened and concatenated ... and a regularized linear L2-SVM".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from pipeline.config.schema import DataConfig
from pipeline.data.cache import Cache, check_shards
from pipeline.data.loader import normalise
from pipeline.data.order import permutation
from pipeline.data.reader import Reader
from pipeline.data.shards import Index
from pipeline.runtime.errors import EvaluationError

BATCH = 64
TRAIN_BYTES = 28
"""Memory of one training feature: float32 (4 bytes), scikit-learn's copy in float64 (8), and
liblinear's index and value (16)."""
TEST_BYTES = 4
STATISTICS_IMAGES = 2048
POOLED_SIZE = 4

Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ProbeResult:
    """Result of one SVM.

    ``name`` names its features and ``dim`` is their number per image. ``C`` is the strength that
    was chosen on held-out training images. ``accuracy`` is the share of correctly classified test
    images, in [0, 1]. ``converged`` is False if liblinear reached its limit of iterations.
    """

    name: str
    dim: int
    C: float
    accuracy: float
    converged: bool


def read_labelled_images(
    index: Index, count: int, seed: int, field: str, data: DataConfig
) -> tuple[NDArray[np.uint8], Labels]:
    """Read a random choice of images, all of which must have labels.

    Args:
        index: of the shards.
        count: number of images; 0 = all.
        seed: of the choice.
        field: option to name in errors.
        data: where remote shards are cached.

    Returns:
        images (n, H, W, C) uint8 and labels (n,) int64.

    Raises:
        EvaluationError: a sample has no label.
        DataError: a shard cannot be read.
    """
    if min(index.label_counts) < 0:
        raise EvaluationError(f"{field} ({index.location}): every sample must have a label (.cls).")
    return read_images(index, count, seed, data)


def read_images(
    index: Index, count: int, seed: int, data: DataConfig
) -> tuple[NDArray[np.uint8], Labels]:
    """Read images as ``read_labelled_images`` does. The label of an unlabelled sample is -1."""
    check_shards(index, data.verify)
    ids = permutation(index.num_samples, f"probe|{seed}")[: count or None]
    images = np.empty((len(ids), *index.shape), np.uint8)
    cache = Cache(index, data.cache_dir, data.cache_gib)
    return images, Reader(index, cache).read(ids, images)


def check_memory(train: int, test: int, dim: int, memory: int = 0) -> None:
    """Check that the features fit into memory.

    Args:
        train: number of training images.
        test: number of test images.
        dim: features per image.
        memory: bytes available; 0 = the memory of this machine.

    Raises:
        EvaluationError: they do not fit; the message says how many images do.
    """
    needed = dim * (train * TRAIN_BYTES + test * TEST_BYTES)
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        fitting = max(0, memory // dim - test * TEST_BYTES) // TRAIN_BYTES
        raise EvaluationError(
            f"--num-train ({train}): {dim} features of each image take {needed / 2**30:.0f} GiB, "
            f"but this machine has {memory / 2**30:.0f} GiB. Use at most {fitting} images."
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
    """Compute the activations of all convolutional layers, max-pooled to 4x4 and concatenated.

    Args:
        D: a DCGAN discriminator on the CPU, after ``set_batchnorm_statistics``.
        images: (N, H, W, C) uint8 of the size that D was built for.

    Returns:
        (N, dim) float32; dim is 16 times the number of feature maps of all layers.
    """
    pooled: list[Tensor] = []

    def pool(_: nn.Module, __: object, output: Tensor) -> None:
        if output.ndim == 4:
            pooled.append(F.adaptive_max_pool2d(output, POOLED_SIZE).flatten(1))

    hooks = [m.register_forward_hook(pool) for m in D.modules() if isinstance(m, nn.LeakyReLU)]
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


def pixel_features(images: NDArray[np.uint8]) -> Features:
    """Scale pixels to [-1, 1] and flatten them: (N, H, W, C) uint8 -> (N, H * W * C) float32."""
    return (images.reshape(len(images), -1) / np.float32(127.5) - 1).astype(np.float32)


def train_and_test(
    name: str,
    train: tuple[Features, Labels],
    test: tuple[Features, Labels],
    strengths: Sequence[float],
) -> ProbeResult:
    """Train a linear SVM (squared hinge loss, L2 penalty, one against the rest) and test it.

    The features are centred and divided by one number, in place: their root mean square length
    over the training images. One ``C`` then has the same meaning for 1,000 and for 30,000 features.

    Args:
        name: of the features.
        train: features (N, dim) and labels (N,).
        test: features (M, dim) and labels (M,).
        strengths: values of ``C``. Of several, the one with the best accuracy on the last fifth of
            the training images is used, and trained again on all training images.

    Raises:
        EvaluationError: too few training images, or all of one class.
    """
    centre = train[0].mean(0)
    length = np.sqrt(np.square(train[0] - centre).sum(1).mean()) or np.float32(1)
    for features in (train[0], test[0]):  # in place, because they may take gigabytes
        features -= centre
        features /= length
    x, split, C = train[0], len(train[0]) * 4 // 5, strengths[0]
    if len(np.unique(train[1][:split])) < 2:
        raise EvaluationError(
            f"--num-train ({len(x)}): these training images are of fewer than two classes. Use "
            "more images, or shards with more classes."
        )
    if len(strengths) > 1:
        scores = [
            _fit(x[:split], train[1][:split], s)[0].score(x[split:], train[1][split:])
            for s in strengths
        ]
        C = strengths[int(np.argmax(scores))]
    svm, converged = _fit(x, train[1], C)
    accuracy = float(svm.score(test[0], test[1]))
    return ProbeResult(name, x.shape[1], C, accuracy, converged)


def _fit(x: Features, labels: Labels, C: float) -> tuple[Any, bool]:
    """Return a trained SVM and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    svm = LinearSVC(C=C, dual=len(x) < x.shape[1], tol=1e-3, max_iter=3000, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        svm.fit(x, labels)
    return svm, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def _batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """Yield batches as D takes them, (n, C, H, W) float32 in [-1, 1]."""
    for batch in torch.from_numpy(images).split(BATCH):
        yield normalise(batch, torch.device("cpu"))
