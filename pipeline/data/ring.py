"""Share memory between a rank and its data workers: batches, and what the downloads took."""

from __future__ import annotations

import math
import mmap
from typing import NamedTuple

import torch
from torch import Tensor


class Ring(NamedTuple):
    """The memory that workers decode into, by worker and slot."""

    images: Tensor
    """(workers, slots, n, H, W, C) uint8."""
    numbers: Tensor
    """(workers, slots, 3, n) int64: labels, ids, and ids that the order says: of samples that were
    damaged the two differ."""


def make_ring(workers: int, slots: int, rows: int, shape: tuple[int, int, int]) -> Ring:
    """Return an empty ring for batches of ``rows`` images of a shape (H, W, C)."""
    images = shared(torch.uint8, workers, slots, rows, *shape)
    return Ring(images, shared(torch.int64, workers, slots, 3, rows))


def shared(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return zeros that forked processes share.

    The memory is anonymous: a container's small /dev/shm does not limit it.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
