"""Random generators, and the z and class inputs of G that are drawn from them.

Every random draw of the project is a function of (seed, purpose, index): it takes its generator
from ``rng``, never PyTorch's global one. So a resumed run, a run on other ranks and a repeated
evaluation draw the same numbers. Rows of z are drawn in blocks of ``BLOCK`` with one generator
each. So a row depends neither on a batch size nor on the number of processes, and a rank draws only
the blocks that its rows lie in.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.config.schema import ModelConfig

BLOCK = 64
"""Rows of z drawn from one generator, and images per forward pass of G when sampling."""
BY_BATCH, BY_ROW = "batch", "rows"
"""How training draws z, see ``training_z``. Checkpoints hold the names: a new rule, a new name."""


def rng(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """Return a CPU generator whose numbers are a function of the three arguments."""
    digest = blake2b(f"{seed}|{purpose}|{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_z(model: ModelConfig, count: int, generator: torch.Generator) -> Tensor:
    """Draw z by ``model.z_distribution``: (count, z_dim) float32 on the CPU."""
    if model.z_distribution == "uniform":
        return torch.rand(count, model.z_dim, generator=generator) * 2 - 1
    return torch.randn(count, model.z_dim, generator=generator)


def append_classes(model: ModelConfig, z: Tensor, y: Tensor) -> Tensor:
    """Append one-hot classes to z: Mirza & Osindero 2014 (arXiv 1411.1784), section 3.2.

    Args:
        model: without ``num_classes`` z is returned unchanged.
        z: (N, z_dim) float.
        y: (N,) int64 classes.

    Returns:
        G's input, (N, z_dim + num_classes).
    """
    return torch.cat([z, one_hot(y, model.num_classes).to(z)], 1) if model.num_classes else z


def training_z(
    model: ModelConfig, seed: int, first: int, count: int, size: int, rule: str = BY_ROW
) -> Tensor:
    """Return the z of some positions of the data order, (count, z_dim) float32 on the CPU.

    Args:
        model: gives the length and the distribution of z.
        seed: of the run.
        first: the first position. Update u of D takes positions u * size and up.
        count: number of positions; they lie in one global batch.
        size: of a global batch.
        rule: ``rows``: position p has row p of an endless table, of which this call draws the
            blocks it needs. ``batch``: one generator draws the whole global batch; runs that began
            before ``rows`` was there keep it.
    """
    if rule == BY_ROW:
        return _table(model, seed, "z rows", first, count)
    update, row = divmod(first, size)
    return draw_z(model, size, rng(seed, "z", update))[row : row + count]


def z_rows(
    model: ModelConfig,
    seed: int,
    purpose: str,
    start: int,
    count: int,
    classes: Tensor | None = None,
) -> Tensor:
    """Return rows [start, start + count) of the endless noise table of (seed, purpose).

    A row is the same in any range that holds it.

    Args:
        model: gives the length and the distribution of z, and the number of classes.
        seed: of the table.
        purpose: of the table.
        start: number of the first row.
        count: number of rows.
        classes: (at least start + count,) int64, the class of each row from row 0. None = row i has
            class i mod num_classes, so that all classes are equally frequent.

    Returns:
        G's input, (count, z_dim + num_classes) float32 on the CPU.
    """
    rows = _table(model, seed, purpose, start, count)
    if classes is None:
        y = torch.arange(start, start + count) % max(1, model.num_classes)
    else:
        y = classes[start : start + count]
    return append_classes(model, rows, y)


def _table(model: ModelConfig, seed: int, purpose: str, start: int, count: int) -> Tensor:
    """Return rows of the endless noise table without classes, (count, z_dim)."""
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    blocks = [draw_z(model, BLOCK, rng(seed, purpose, k)) for k in range(first, last)]
    table = torch.cat(blocks) if blocks else torch.empty(0, model.z_dim)
    return table[start - first * BLOCK :][:count]
