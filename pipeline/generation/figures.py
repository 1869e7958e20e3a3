"""Grids, walks and vector arithmetic from rows of z, as the bytes of PNG and GIF files.

``scale`` is the side of the square that a pixel of an image becomes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from pipeline.data.codecs import encode
from pipeline.generation import latent
from pipeline.generation.latent import Table
from pipeline.models.sampling import draw_images, image_grid
from pipeline.runtime.errors import GenerationError

Pixels = NDArray[np.uint8]

WHITE = 255
CAPTION = 13  # pixels of the row number below an image
CAPTION_FONT = 10
SIGN = 24  # pixels between the columns of the arithmetic figure
MAX_VALUES = 1 << 29
"""Pixels times channels of a figure, half a GiB. Drawing it takes a multiple of this memory."""


def grid(
    G: nn.Module, table: Table, rows: Sequence[int], columns: int, scale: int, numbers: bool
) -> bytes:
    """Return a PNG of these rows, left to right; with ``numbers``, row numbers below the images.

    Raises:
        GenerationError: the figure is too large, or a row number is wider than its image.
    """
    check_size(len(rows) * scale**2 * math.prod(table.model.image_shape))
    images = enlarge(draw_images(G, table.rows(rows)), scale)
    cells = _add_numbers(images, rows) if numbers else images
    return png(image_grid(cells, min(columns, len(rows))))


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
    """Return (GIF, PNG) of a walk through z (section 6.1): a film, and a grid with one leg a line.

    The walk takes ``steps`` steps from one row to the next. With ``closed`` it returns to the first
    row. ``fps`` is frames per second of the film.

    Raises:
        GenerationError: fewer than two rows, or the figure is too large.
    """
    if len(rows) < 2:
        raise GenerationError(f"--rows ({rows[0]}): must be two rows or more for a walk.")
    check_size(len(rows) * (steps + 1) * scale**2 * math.prod(table.model.image_shape))
    legs = latent.walk(table.model, table.rows(rows), steps, closed=closed)
    images = draw_images(G, legs.flatten(0, 1))
    # The last image of a leg is the first of the next one: the film shows it once.
    film = images.reshape(len(legs), steps + 1, *images.shape[1:])[:, :-1]
    film = film.reshape(-1, *images.shape[1:])
    if not closed:
        film = np.concatenate([film, images[-1:]])
    picture = image_grid(enlarge(images, scale), columns=steps + 1)
    return _gif(enlarge(film, scale), fps), png(picture)


def arithmetic(
    G: nn.Module, table: Table, concepts: Sequence[Sequence[int]], noise: float, scale: int
) -> bytes:
    """Return a PNG like figure 7 of the paper: mean(a) - mean(b) + mean(c), and eight variations.

    ``concepts`` are the row numbers of the exemplars of a, b and c. ``noise`` is the half width of
    the uniform noise that makes the variations.

    Raises:
        GenerationError: the figure is too large.
    """
    check_size(sum(map(len, concepts)) * scale**2 * math.prod(table.model.image_shape))
    exemplars = [table.rows(rows) for rows in concepts]
    means, result = latent.arithmetic(table.model, *exemplars)
    results = latent.neighbours(table.model, result, noise, table.seed)
    images = enlarge(draw_images(G, torch.cat([*exemplars, means, results])), scale)
    ends = np.cumsum([*map(len, exemplars), len(means)])
    *columns, of_means, of_results = np.split(images, ends)
    return png(_arithmetic_figure(columns, of_means, of_results))


def check_size(values: int, remedy: str = "fewer rows or steps, or a smaller --scale") -> None:
    """Raise ``GenerationError`` for a figure of too many pixels times channels; name the remedy."""
    if values > MAX_VALUES:
        raise GenerationError(
            f"--out: would have {values:,} pixel values, at most {MAX_VALUES:,} can be drawn; give "
            f"{remedy}."
        )


def enlarge(images: Pixels, scale: int) -> Pixels:
    """Turn each pixel into a square: (N, H, W, C) -> (N, scale * H, scale * W, C)."""
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def png(picture: Pixels) -> bytes:
    """Return the PNG file of an (H, W, C) uint8 picture, C = 1 or 3."""
    return encode(np.ascontiguousarray(picture), "png")


def _gif(frames: Pixels, fps: float) -> bytes:
    """Return a GIF file that repeats (N, H, W, C) uint8 frames for ever.

    Gray frames keep every level. Colours are reduced to the 256 best of each frame.
    """
    pictures = [
        Image.fromarray(frame[:, :, 0] if frame.shape[2] == 1 else frame) for frame in frames
    ]
    if frames.shape[3] == 3:
        # Dithering would flicker from frame to frame.
        pictures = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    out = io.BytesIO()
    # Pillow takes milliseconds, a GIF stores hundredths of a second.
    duration = 10 * max(2, round(100 / fps))
    pictures[0].save(
        out, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0
    )
    return out.getvalue()


def _add_numbers(images: Pixels, numbers: Sequence[int]) -> Pixels:
    """Write a number on white below each image: (N, H, W, C) -> (N, H + CAPTION, W, C)."""
    count, height, width, channels = images.shape
    widest = ImageFont.load_default(CAPTION_FONT).getlength(str(max(numbers)))
    if widest > width:
        raise GenerationError(
            f"--numbers: row number {max(numbers)} is wider than an image of {width} pixels; give "
            "a larger --scale."
        )
    cells = np.full((count, height + CAPTION, width, channels), WHITE, np.uint8)
    cells[:, :height] = images
    for cell, number in zip(cells, numbers, strict=True):
        _write_text(cell, str(number), width / 2, height + CAPTION / 2, CAPTION_FONT)
    return cells


def _arithmetic_figure(concepts: Sequence[Pixels], means: Pixels, results: Pixels) -> Pixels:
    """Lay out figure 7 of the paper, from uint8 images.

    The exemplars of a concept, (n, H, W, C), are a column above the image of their mean z, of
    ``means`` (3, H, W, C). To the right are the ``results`` (9, H, W, C) as a 3x3 grid.
    """
    _, height, width, channels = means.shape
    most = max(len(concept) for concept in concepts)
    gap = max(4, height // 8)  # between the exemplars and their mean
    total = max(most + 1, 3) * height + gap
    columns: list[Pixels] = []
    for concept, mean, sign in zip(concepts, means, "-+=", strict=True):
        column = np.full((total, width, channels), WHITE, np.uint8)
        column[: len(concept) * height] = image_grid(concept, columns=1)
        column[-height:] = mean
        strip = np.full((total, SIGN, channels), WHITE, np.uint8)
        _write_text(strip, sign, SIGN / 2, total - height / 2, size=20)
        columns += [column, strip]
    block = np.full((total, 3 * width, channels), WHITE, np.uint8)
    block[-3 * height :] = image_grid(results, columns=3)
    return np.concatenate([*columns, block], axis=1)


def _write_text(picture: Pixels, text: str, x: float, y: float, size: int) -> None:
    """Write black text, centred at (x, y), on an (H, W, C) picture, in place."""
    drawn = Image.fromarray(picture[:, :, 0])
    font = ImageFont.load_default(size)
    ImageDraw.Draw(drawn).text((x, y), text, fill=0, anchor="mm", font=font)
    ink = np.asarray(drawn) != picture[:, :, 0]
    picture[ink] = np.asarray(drawn)[ink][:, None]
