"""Draw z, class inputs and weights from generators seeded by (seed, purpose, index)."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.config.schema import ModelConfig

BLOCK = 64
"""Images per forward pass and rows per noise stream when sampling."""


def rng(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator that is a function of its arguments; other arguments, other numbers."""
    digest = blake2b(f"{seed}|{purpose}|{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_z(model: ModelConfig, count: int, generator: torch.Generator) -> Tensor:
    """(count, z_dim) float32 noise on the CPU, by the model's distribution."""
    if model.z_distribution == "uniform":
        return torch.rand(count, model.z_dim, generator=generator) * 2 - 1
    return torch.randn(count, model.z_dim, generator=generator)


def append_classes(model: ModelConfig, z: Tensor, y: Tensor) -> Tensor:
    """G's input for classes y (N,) int64: z (N, z_dim) with their one-hot rows appended.

    Mirza & Osindero 2014 (arXiv 1411.1784), section 3.2. Without ``num_classes`` z as it is.
    """
    return torch.cat([z, one_hot(y, model.num_classes).to(z)], 1) if model.num_classes else z


def z_rows(model: ModelConfig, seed: int, purpose: str, start: int, count: int) -> Tensor:
    """Rows [start, start + count) of an endless table; (count, z_dim + num_classes) float32.

    Any cut of the table gives the same rows: each block of ``BLOCK`` has its own stream. With
    ``num_classes`` row i is of class i mod num_classes: every class as often as the others.
    """
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    blocks = [draw_z(model, BLOCK, rng(seed, purpose, k)) for k in range(first, last)]
    table = torch.cat(blocks) if blocks else torch.empty(0, model.z_dim)
    rows = table[start - first * BLOCK :][:count]
    return append_classes(
        model, rows, torch.arange(start, start + count) % max(1, model.num_classes)
    )
