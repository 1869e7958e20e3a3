"""Draw some samples of a shard set as the training will see them, for a look before it begins."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import Config
from pipeline.data.cache import Cache
from pipeline.data.order import Order
from pipeline.data.reader import Reader
from pipeline.data.remote import Patience
from pipeline.data.shards import INDEX_NAME, Index
from pipeline.runtime.console import say
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.signals import Stopped

PREVIEW_NAME = "preview.png"
TILES = 64
MOST_PIXELS = 1 << 23
"""Pixels of the largest picture; of larger samples it has fewer, but at least one."""


def preview_of(index_file: Path) -> Path:
    """Return where the picture of a set lies: beside its index file."""
    if index_file.name == INDEX_NAME:
        return index_file.with_name(PREVIEW_NAME)
    return index_file.with_suffix(".preview.png")


def write_preview(index: Index, path: Path) -> None:
    """Write a square grid of samples, 8 x 8 if they are small, from all over the set.

    A sample that cannot be read is named in a note, and there is no picture.
    """
    height, width, _ = index.shape
    side = min(math.isqrt(TILES), math.isqrt(MOST_PIXELS // (height * width)) or 1)
    ids = np.linspace(0, index.num_samples - 1, min(side**2, index.num_samples)).astype(np.int64)
    _write_grid(Reader(index, Cache(index, "")), ids, side, path)


def write_reals(config: Config, index: Index, order: Order) -> None:
    """Write samples/reals.png of a run, once: 8 x 8 images, the first of the data order.

    It has the size and layout of the grids of G's samples, to be looked at beside them.
    """
    path = Path(config.run.dir).expanduser() / "samples" / "reals.png"
    if path.exists():
        return
    cache = Cache(index, config.data.cache_dir, config.data.cache_gib, Patience())
    ids = order.ids(np.arange(min(TILES, index.num_samples), dtype=np.int64))
    try:
        path.parent.mkdir(exist_ok=True)
        _write_grid(Reader(index, cache, config.data.skip_damaged), ids, math.isqrt(TILES), path)
    except Stopped:  # amid a wait for a shard; the loader ends the run
        return
    except OSError as error:  # the run's own files will meet it, too
        say(f"note: no {path.name}: {error.strerror}")


def _write_grid(reader: Reader, ids: NDArray[np.int64], side: int, path: Path) -> None:
    """Write a grid of side x side samples; with a note instead if one cannot be read."""
    height, width, channels = shape = reader.index.shape
    tiles = np.zeros((side, side, *shape), np.uint8)
    try:
        reader.read_intact(ids, tiles.reshape(-1, *shape)[: len(ids)])
    except DataError as error:
        say(f"note: no {path.name}: {error}")
        return
    grid = tiles.swapaxes(1, 2).reshape(side * height, side * width, channels)
    out = io.BytesIO()
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(out, "PNG")
    write_atomic(path, out.getvalue())
