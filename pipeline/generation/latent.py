"""The space of z: rows by number, truncation, smooth walks and vector arithmetic.

Images are named by their row in the table of noise of a seed, so image 17 of a folder, cell 17 of a
grid and row 17 of a walk are one image.
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
"""Name of the noise table: evaluations and training grids draw from others."""
MOST_ROW, MOST_ROWS = 2**40, 10_000
EXEMPLARS = 3  # of a concept: section 6.3.2 found one unstable and the mean of three enough


@dataclass(frozen=True)
class Table:
    """The endless table of noise of a seed, shrunk by ``truncation``.

    Truncation multiplies z by a number in (0, 1]: images come nearer to what G draws for z = 0,
    with fewer failures and less variety. 1 is what G was trained on.

    A G with ``num_classes`` takes the class as one-hot numbers appended to z: row i is of class
    i mod num_classes, or all are of ``of_class``.
    """

    model: ModelConfig
    seed: int
    truncation: float = 1.0
    of_class: int | None = None

    def cut(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): (stop - start, z_dim + num_classes) float32 on the CPU."""
        rows = z_rows(self.model, self.seed, PURPOSE, start, stop - start)
        rows[:, : self.model.z_dim] *= self.truncation
        if self.of_class is not None:
            rows[:, self.model.z_dim :] = 0
            rows[:, self.model.z_dim + self.of_class] = 1
        return rows

    def label(self, row: int) -> int | None:
        """The class of a row; None for a G without classes."""
        if not self.model.num_classes:
            return None
        return row % self.model.num_classes if self.of_class is None else self.of_class

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """These rows, in this order: (len(numbers), z_dim + num_classes) float32 on the CPU."""
        return torch.cat([self.cut(number, number + 1) for number in numbers])


def parse_rows(text: str, field: str) -> list[int]:
    """Row numbers from ``3,17,40-43``.

    Raises:
        GenerationError: not such a list.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,13})(?:-(\d{1,13}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        count = len(numbers) + last + 1 - first
        if not first <= last < MOST_ROW or count > MOST_ROWS:
            raise GenerationError(
                f"{field} ({text if len(text) < 100 else f'{text[:100]}...'}): must be row numbers "
                f"and ranges like 3,17,40-43, at most {MOST_ROWS} in all, below {MOST_ROW}; the "
                "command grid --numbers shows which image has which number."
            )
        numbers += range(first, last + 1)
    return numbers


def parse_concept(text: str, field: str, table: Table) -> list[int]:
    """Row numbers as ``parse_rows`` takes them, or those of the first rows of ``class:2``.

    Raises:
        GenerationError: not such a list, or a class that the rows do not have.
    """
    found = re.fullmatch(r"\s*class:(\d{1,9})\s*", text)
    if found is None:
        return parse_rows(text, field)
    classes, number = table.model.num_classes, int(found[1])
    if number >= classes or table.of_class is not None:
        there = f"this G has classes 0 to {classes - 1}" if classes else "this G has no classes"
        if table.of_class is not None:
            there = f"--class {table.of_class} makes every row one of that class"
        raise GenerationError(f"{field} ({text}): {there}; give row numbers, like 3,17,42.")
    return [number + k * classes for k in range(EXEMPLARS)]


def interpolation(model: ModelConfig) -> str:
    """``slerp`` for normal z, ``linear`` for uniform z.

    The length of normal z is nearly constant, and the middle of a straight line between two of them
    is shorter than any z that G was trained on; an arc is not. The cube of uniform z is convex: a
    line stays inside, an arc would leave it.
    """
    return "slerp" if model.z_distribution == "normal" else "linear"


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points on the line from a to b, each (z_dim,), at t (n,) in [0, 1]: (n, z_dim)."""
    return a + t[:, None] * (b - a)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points on the arc from a to b, each (z_dim,), at t (n,) in [0, 1]: (n, z_dim).

    Lengths go from that of a to that of b at an even pace; so do angles.
    """
    lengths = lerp(a.norm()[None], b.norm()[None], t)
    u, v = a / a.norm(), b / b.norm()
    angle = torch.arccos((u @ v).clamp(-1, 1))
    if angle.sin().abs() < 1e-4:  # (nearly) the same or opposite directions: no arc is defined
        return lerp(a, b, t)
    weights = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], dim=1) / angle.sin()
    return lengths * (weights @ torch.stack([u, v]))


def walk(model: ModelConfig, points: Tensor, steps: int, *, closed: bool = False) -> Tensor:
    """A smooth way through points of the z space (section 6.1, figure 4).

    Args:
        model: decides between lines and arcs, see ``interpolation``.
        points: (n, z_dim + num_classes), n at least 2.
        steps: from one point to the next.
        closed: go back to the first point, for a film that repeats without a jump.

    Classes appended to z change on lines.

    Returns:
        (legs, steps + 1, width of points) float32: every leg holds both its ends.
    """
    between, n = slerp if interpolation(model) == "slerp" else lerp, model.z_dim
    t = torch.linspace(0, 1, steps + 1)
    ends = torch.cat([points, points[:1]]) if closed else points
    legs = [
        torch.cat([between(a[:n], b[:n], t), lerp(a[n:], b[n:], t)], 1) for a, b in pairwise(ends)
    ]
    return torch.stack(legs)


def arithmetic(model: ModelConfig, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """mean(a) - mean(b) + mean(c) (section 6.3.2).

    A concept is the mean z of several exemplars: the paper found single ones unstable, three
    enough. The result is not clipped to the cube of uniform z, as in the paper. Of classes after z
    no sum is a class: the result is of that of c, what is added to.

    Args:
        model: says where z ends.
        a: exemplars of the first concept, (n, z_dim + num_classes); likewise b and c.
        b: of what is taken away.
        c: of what is added.

    Returns:
        the means (3, z_dim + num_classes) and the result (z_dim + num_classes,).
    """
    means = torch.stack([a.mean(0), b.mean(0), c.mean(0)])
    result = means[0] - means[1] + means[2]
    result[model.z_dim :] = means[2, model.z_dim :]
    return means, result


def neighbours(model: ModelConfig, point: Tensor, noise: float, seed: int) -> Tensor:
    """The point in the middle of eight others around it: (9, len(point)) float32.

    Section 6.3.2: uniform noise in [-noise, noise], 0.25 in the paper, is added to the result.
    """
    around = torch.rand(9, len(point), generator=rng(seed, "arithmetic")) * 2 - 1
    around[4] = 0
    around[:, model.z_dim :] = 0
    return point + noise * around
