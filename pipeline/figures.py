"""Pictures and films from rows of z: grids, walks and arithmetic, as bytes of their files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline import latent, pictures
from pipeline.errors import GenerationError
from pipeline.latent import Table
from pipeline.sampling import generate, image_grid


def grid(
    G: nn.Module, table: Table, rows: Sequence[int], columns: int, scale: int, numbers: bool
) -> bytes:
    """A PNG of these rows' images, left to right; with ``numbers`` its row below each."""
    _check_size(len(rows), table, scale)
    images = pictures.enlarge(generate(G, table.rows(rows)), scale)
    cells = pictures.numbered(images, rows) if numbers else images
    return pictures.png(image_grid(cells, min(columns, len(rows))))


def walk(
    G: nn.Module,
    table: Table,
    rows: Sequence[int],
    *,
    steps: int,
    closed: bool,
    scale: int,
    fps: float,
) -> tuple[bytes, bytes]:
    """(GIF, PNG) of a smooth walk (section 6.1): a film, and a grid with a row for each leg.

    Raises:
        GenerationError: fewer than two rows.
    """
    if len(rows) < 2:
        raise GenerationError(f"--rows ({rows[0]}): must be two rows or more for a walk.")
    _check_size(len(rows) * (steps + 1), table, scale)
    legs = latent.walk(table.model, table.rows(rows), steps, closed=closed)
    images = generate(G, legs.flatten(0, 1))
    # The end of one leg is the start of the next: shown once in the film.
    film = images.reshape(len(legs), steps + 1, *images.shape[1:])[:, :-1]
    film = film.reshape(-1, *images.shape[1:])
    if not closed:
        film = np.concatenate([film, images[-1:]])
    picture = image_grid(pictures.enlarge(images, scale), columns=steps + 1)
    return pictures.gif(pictures.enlarge(film, scale), fps), pictures.png(picture)


def arithmetic(
    G: nn.Module, table: Table, concepts: Sequence[Sequence[int]], noise: float, scale: int
) -> bytes:
    """A PNG like the paper's figure 7: mean(a) - mean(b) + mean(c), and images around it."""
    _check_size(sum(map(len, concepts)), table, scale)
    exemplars = [table.rows(rows) for rows in concepts]
    means, result = latent.arithmetic(table.model, *exemplars)
    around = latent.neighbours(table.model, result, noise, table.seed)
    images = pictures.enlarge(generate(G, torch.cat([*exemplars, means, around])), scale)
    ends = np.cumsum([*map(len, exemplars), 3])
    *parts, of_means, results = np.split(images, ends)
    return pictures.png(pictures.sum_figure(parts, of_means, results))


def _check_size(count: int, table: Table, scale: int) -> None:
    """Before any of so many images is made."""
    numbers = count * (table.model.image_size * scale) ** 2 * table.model.channels
    pictures.check_size(numbers, "fewer rows or steps, or a smaller --scale")
