"""Files of images that grow part by part: PNG files, WebDataset tars, the npz of evaluators."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import encode, npy_header

Add = Callable[[int, NDArray[np.uint8]], None]
"""Adds images (n, H, W, C) whose first is of this row."""
SHARD_FIELD = "png"


def add_png(folder: Path, first: int, images: NDArray[np.uint8]) -> None:
    """A PNG file for each image, by its row; its bytes are on disk."""
    for row, pixels in enumerate(images, first):
        with (folder / f"{row:08d}.png").open("wb") as file:
            file.write(encode(pixels, "png"))
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def tar(file: IO[bytes], label: Callable[[int], int | None]) -> Iterator[Add]:
    """A function that adds images to a WebDataset tar, with the class of those that have one."""
    from webdataset import TarWriter  # seconds, for nothing in the other formats

    with TarWriter(file, encoder=False, mtime=0) as out:

        def add(first: int, images: NDArray[np.uint8]) -> None:
            for row, pixels in enumerate(images, first):
                sample = {"__key__": f"{row:08d}", SHARD_FIELD: encode(pixels, SHARD_FIELD)}
                if (number := label(row)) is not None:
                    sample["cls"] = b"%d" % number
                out.write(sample)

        yield add


def assemble_npz(
    path: Path, parts: Sequence[Path], shape: tuple[int, int, int, int], record: dict[str, Any]
) -> None:
    """One array from raw parts, never whole in memory; equal images give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # The name that evaluators of published sample batches look for.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            member.write(npy_header(shape))
            for raw in parts:
                with raw.open("rb") as part:
                    shutil.copyfileobj(part, member, 1 << 20)
        with archive.open(zipfile.ZipInfo("made_by.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(record)), allow_pickle=False)
    with path.open("rb") as file:
        os.fsync(file.fileno())
