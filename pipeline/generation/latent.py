"""Rows of the noise table by number, and what is done with z: truncation, walks, arithmetic.

Every image has the number of its row in the noise table of the seed. So image 17 of a folder, of a
grid and of a walk show the same z.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.models.noise import rng, z_rows
from pipeline.runtime.errors import GenerationError

PURPOSE = "generate"
"""Purpose of the noise table in ``rng``. Evaluation and training grids have other purposes."""
ROW_LIMIT, MAX_ROWS = 2**40, 10_000
EXEMPLARS = 3  # rows of a concept given as a class; section 6.3.2 takes the mean of three


@dataclass(frozen=True)
class Table:
    """The endless noise table of a seed, whose rows are inputs of G.

    Args:
        model: gives z_dim, num_classes and the distribution of z.
        seed: of the noise.
        truncation: z is multiplied by it, in (0, 1]. Smaller values give fewer failures and less
            variety. G was trained with 1.
        of_class: the class of all rows. None: row i has class i mod num_classes.
        purpose: of the noise table.
        classes: (N,) int64, the class of each row, for N rows at most; None = see ``of_class``.
    """

    model: ModelConfig
    seed: int
    truncation: float = 1.0
    of_class: int | None = None
    purpose: str = PURPOSE
    classes: Tensor | None = None

    def cut(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop): (stop - start, z_dim + num_classes) float32 on the CPU."""
        count = stop - start
        rows = z_rows(self.model, self.seed, self.purpose, start, count, self.classes)
        rows[:, : self.model.z_dim] *= self.truncation
        if self.of_class is not None:
            rows[:, self.model.z_dim :] = 0
            rows[:, self.model.z_dim + self.of_class] = 1
        return rows

    def label(self, row: int) -> int | None:
        """Return the class of a row, None for a G without classes."""
        if not self.model.num_classes:
            return None
        if self.classes is not None:
            return int(self.classes[row])
        return row % self.model.num_classes if self.of_class is None else self.of_class

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Return these rows in this order: (len(numbers), z_dim + num_classes) float32, CPU."""
        return torch.cat([self.cut(number, number + 1) for number in numbers])


def parse_rows(text: str, field: str) -> list[int]:
    """Read row numbers and ranges, both ends included, like ``3,17,40-43``.

    Raises:
        GenerationError: another format, too many rows or a number too high. It names ``field``.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,13})(?:-(\d{1,13}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        count = len(numbers) + last + 1 - first
        if not first <= last < ROW_LIMIT or count > MAX_ROWS:
            raise GenerationError(
                f"{field} ({text if len(text) < 100 else f'{text[:100]}...'}): must be row numbers "
                f"and ranges like 3,17,40-43, at most {MAX_ROWS} in all, below {ROW_LIMIT}; the "
                "command grid --numbers shows the number of each image."
            )
        numbers += range(first, last + 1)
    return numbers


def parse_concept(text: str, field: str, table: Table) -> list[int]:
    """Read the rows of a concept: row numbers, or ``class:2`` for the first rows of class 2.

    Raises:
        GenerationError: another format, or a class that the table cannot give. It names ``field``.
    """
    match = re.fullmatch(r"\s*class:(\d{1,9})\s*", text)
    if match is None:
        return parse_rows(text, field)
    classes, number = table.model.num_classes, int(match[1])
    if number >= classes or table.of_class is not None:
        reason = f"this G has classes 0 to {classes - 1}" if classes else "this G has no classes"
        if table.of_class is not None:
            reason = f"--class {table.of_class} gives every row that class"
        raise GenerationError(f"{field} ({text}): {reason}; give row numbers, like 3,17,42.")
    return [number + k * classes for k in range(EXEMPLARS)]


def interpolation(model: ModelConfig) -> str:
    """Return the name of the interpolation: ``slerp`` for normal z, ``linear`` for uniform z.

    Normal z have nearly the same length. The middle of a straight line between two of them is
    shorter than any z of training, the middle of an arc is not. Uniform z fill a cube. A line stays
    inside the cube, an arc may leave it.
    """
    return "slerp" if model.z_distribution == "normal" else "linear"


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return points on the line from a to b, both (z_dim,), at t (n,) in [0, 1]: (n, z_dim)."""
    return a + t[:, None] * (b - a)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return points on the arc from a to b, both (z_dim,), at t (n,) in [0, 1]: (n, z_dim).

    Angle and length change linearly in t.
    """
    lengths = lerp(a.norm()[None], b.norm()[None], t)
    u, v = a / a.norm(), b / b.norm()
    angle = torch.arccos((u @ v).clamp(-1, 1))
    if angle.sin().abs() < 1e-4:  # (nearly) equal or opposite directions define no arc
        return lerp(a, b, t)
    weights = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], dim=1) / angle.sin()
    return lengths * (weights @ torch.stack([u, v]))


def walk(model: ModelConfig, points: Tensor, steps: int, *, closed: bool = False) -> Tensor:
    """Interpolate between consecutive points of the z space (section 6.1, figure 4).

    Args:
        model: decides between lines and arcs, see ``interpolation``. One-hot classes are always
            interpolated linearly.
        points: (n, z_dim + num_classes), n at least 2.
        steps: steps from one point to the next.
        closed: add a leg from the last point to the first, for a film that repeats without a jump.

    Returns:
        (legs, steps + 1, z_dim + num_classes) float32. Every leg includes both its ends.
    """
    between, n = slerp if interpolation(model) == "slerp" else lerp, model.z_dim
    t = torch.linspace(0, 1, steps + 1)
    ends = torch.cat([points, points[:1]]) if closed else points
    legs = [
        torch.cat([between(a[:n], b[:n], t), lerp(a[n:], b[n:], t)], 1) for a, b in pairwise(ends)
    ]
    return torch.stack(legs)


def arithmetic(model: ModelConfig, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean z of three concepts, and mean(a) - mean(b) + mean(c) (section 6.3.2).

    A concept is the mean of several exemplars. The paper found single exemplars unstable and three
    enough. As in the paper, the result is not clipped to the cube of uniform z. A sum of one-hot
    classes would be no class, so the result has the class part of c.

    Args:
        model: gives z_dim, where the class part begins.
        a: (n, z_dim + num_classes), exemplars of the first concept.
        b: the same for the concept to subtract.
        c: the same for the concept to add.

    Returns:
        The means, (3, z_dim + num_classes), and the result, (z_dim + num_classes,).
    """
    means = torch.stack([a.mean(0), b.mean(0), c.mean(0)])
    result = means[0] - means[1] + means[2]
    result[model.z_dim :] = means[2, model.z_dim :]
    return means, result


def neighbours(model: ModelConfig, point: Tensor, noise: float, seed: int) -> Tensor:
    """Return a point among eight variations of it, as a row-major 3x3 grid (section 6.3.2).

    Args:
        model: gives z_dim. Noise is added to z, not to the class part.
        point: (z_dim + num_classes,), row 4 of the result.
        noise: the noise is uniform in [-noise, noise], 0.25 in the paper.
        seed: of the noise.

    Returns:
        (9, z_dim + num_classes) float32.
    """
    offsets = torch.rand(9, len(point), generator=rng(seed, "arithmetic")) * 2 - 1
    offsets[4] = 0
    offsets[:, model.z_dim :] = 0
    return point + noise * offsets
