"""Pictures and films from rows of z: grids, walks and arithmetic, as bytes of their files."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from pipeline.data.codecs import encode
from pipeline.generation import figures, latent
from pipeline.generation.latent import Table
from pipeline.models.sampling import draw_images, image_grid
from pipeline.runtime.errors import GenerationError


def grid(
    G: nn.Module, table: Table, rows: Sequence[int], columns: int, scale: int, numbers: bool
) -> bytes:
    """A PNG of these rows' images, left to right; with ``numbers`` its row below each."""
    _check_size(len(rows), table, scale)
    images = figures.enlarge(draw_images(G, table.rows(rows)), scale)
    cells = figures.numbered(images, rows) if numbers else images
    return figures.png(image_grid(cells, min(columns, len(rows))))


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
    images = draw_images(G, legs.flatten(0, 1))
    # The end of one leg is the start of the next: shown once in the film.
    film = images.reshape(len(legs), steps + 1, *images.shape[1:])[:, :-1]
    film = film.reshape(-1, *images.shape[1:])
    if not closed:
        film = np.concatenate([film, images[-1:]])
    picture = image_grid(figures.enlarge(images, scale), columns=steps + 1)
    return figures.gif(figures.enlarge(film, scale), fps), figures.png(picture)


def arithmetic(
    G: nn.Module, table: Table, concepts: Sequence[Sequence[int]], noise: float, scale: int
) -> bytes:
    """A PNG like the paper's figure 7: mean(a) - mean(b) + mean(c), and images around it."""
    _check_size(sum(map(len, concepts)), table, scale)
    exemplars = [table.rows(rows) for rows in concepts]
    means, result = latent.arithmetic(table.model, *exemplars)
    around = latent.neighbours(table.model, result, noise, table.seed)
    images = figures.enlarge(draw_images(G, torch.cat([*exemplars, means, around])), scale)
    ends = np.cumsum([*map(len, exemplars), 3])
    *parts, of_means, results = np.split(images, ends)
    return figures.png(figures.sum_figure(parts, of_means, results))


def _check_size(count: int, table: Table, scale: int) -> None:
    """Before any of so many images is made."""
    numbers = count * (table.model.image_size * scale) ** 2 * table.model.channels
    figures.check_size(numbers, "fewer rows or steps, or a smaller --scale")


Pixels = NDArray[np.uint8]


CAPTION = 13  # pixels under a numbered cell


SIGN = 24  # pixels between the columns of a sum


WHITE = 255


# Of a picture or a film: half a gigabyte, and several times over while it is made.
MOST_NUMBERS = 1 << 29


def check_size(numbers: int, remedy: str) -> None:
    """Refuse a picture or film that would not fit into memory.

    Args:
        numbers: of all its pixels, in all channels.
        remedy: what to ask for instead.

    Raises:
        GenerationError: more than ``MOST_NUMBERS``.
    """
    if numbers > MOST_NUMBERS:
        raise GenerationError(
            f"--out: would have {numbers:,} numbers, at most {MOST_NUMBERS:,} can be drawn; give "
            f"{remedy}."
        )


def enlarge(images: Pixels, scale: int) -> Pixels:
    """(N, H, W, C) -> (N, scale * H, scale * W, C): every pixel a square."""
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def png(picture: Pixels) -> bytes:
    """A PNG file of an (H, W, C) uint8 picture, C = 1 or 3."""
    return encode(np.ascontiguousarray(picture), "png")


def numbered(images: Pixels, numbers: Sequence[int]) -> Pixels:
    """(N, H, W, C) -> (N, H + 13, W, C): its number on white below each image."""
    count, height, width, channels = images.shape
    cells = np.full((count, height + CAPTION, width, channels), WHITE, np.uint8)
    cells[:, :height] = images
    for cell, number in zip(cells, numbers, strict=True):
        _write(cell, str(number), width / 2, height + CAPTION / 2, size=10)
    return cells


def gif(frames: Pixels, per_second: float) -> bytes:
    """A GIF file of (N, H, W, C) uint8 frames that repeats for ever.

    Gray frames keep every level; colours are reduced to the 256 best of each frame.
    """
    pictures = [
        Image.fromarray(frame[:, :, 0] if frame.shape[2] == 1 else frame) for frame in frames
    ]
    if frames.shape[3] == 3:
        # Dithering would flicker from frame to frame.
        pictures = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    out = io.BytesIO()
    # Times in a GIF are hundredths of a second.
    duration = 10 * max(2, round(100 / per_second))
    pictures[0].save(
        out, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0
    )
    return out.getvalue()


def sum_figure(concepts: Sequence[Pixels], means: Pixels, results: Pixels) -> Pixels:
    """The layout of the paper's figure 7: three columns of exemplars over their means, signs
    between them, and the 3x3 grid of results, whose middle is the sum itself.

    Args:
        concepts: exemplars of A, B and C, each (n, H, W, C) uint8.
        means: (3, H, W, C), the images of the mean z.
        results: (9, H, W, C).
    """
    _, height, width, channels = means.shape
    most = max(len(concept) for concept in concepts)
    rows = max(most + 1, 3)
    gap = max(4, height // 8)  # sets the means apart
    total = rows * height + gap
    columns: list[Pixels] = []
    for concept, mean, sign in zip(concepts, means, "-+=", strict=True):
        column = np.full((total, width, channels), WHITE, np.uint8)
        column[: len(concept) * height] = image_grid(concept, columns=1)
        column[-height:] = mean
        strip = np.full((total, SIGN, channels), WHITE, np.uint8)
        _write(strip, sign, SIGN / 2, total - height / 2, size=20)
        columns += [column, strip]
    grid = np.full((total, 3 * width, channels), WHITE, np.uint8)
    grid[-3 * height :] = image_grid(results, columns=3)
    return np.concatenate([*columns, grid], axis=1)


def _write(cell: Pixels, text: str, x: float, y: float, size: int) -> None:
    """Black text around a point of an (H, W, C) picture, in place."""
    picture = Image.fromarray(cell[:, :, 0])
    draw = ImageDraw.Draw(picture)
    draw.text((x, y), text, fill=0, anchor="mm", font=ImageFont.load_default(size))
    ink = np.asarray(picture) != cell[:, :, 0]
    cell[ink] = np.asarray(picture)[ink][:, None]
