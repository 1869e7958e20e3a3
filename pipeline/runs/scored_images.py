"""Which images of a G are scored: their noise, and their classes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.order import permutation
from pipeline.runtime.errors import EvaluationError

PURPOSE = "evaluation"
"""Seeds, with ``eval.seed``, the noise of the generated images, and the choice of real images."""


class Labelled(Protocol):
    """Images with labels, of which there are counts; -1 = none."""

    @property
    def location(self) -> str: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def label_counts(self) -> dict[int, int]: ...


def classes_like(data: Labelled, num_classes: int, count: int) -> Tensor:
    """Return classes for generated images, in the shares that they have in a shard set.

    The numbers of images are rounded by the largest remainder; of equal remainders the class with
    the lower number gets the image. The order is a fixed random one.

    Args:
        data: the shards, or other real images.
        num_classes: of G.
        count: number of generated images.

    Returns:
        (count,) int64, 0 to num_classes - 1.

    Raises:
        EvaluationError: some images of the shards have no label, or one that G does not know.
    """
    counts = data.label_counts
    low, high = (min(counts), max(counts)) if counts else (-1, -1)
    if low < 0 or high >= num_classes:
        raise EvaluationError(
            f"eval.labels (data): data.shards ({data.location}) has labels {low} (-1: "
            f"none) to {high}, but G has the classes 0 to {num_classes - 1}. Give the "
            "shards that it was trained on, or set eval.labels=uniform."
        )
    # In units of 1 / num_samples.
    quotas = np.array([counts.get(label, 0) for label in range(num_classes)]) * count
    numbers, remainders = np.divmod(quotas, data.num_samples)
    rest = count - int(numbers.sum())
    numbers[np.argsort(-remainders, kind="stable")[:rest]] += 1
    classes = np.repeat(np.arange(num_classes), numbers)
    return torch.from_numpy(classes[permutation(count, f"{PURPOSE}|labels")])
