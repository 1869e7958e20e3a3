"""Write generated images as PNG files, or as the npz file that evaluators read."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import encode, npy_header


def add_png(folder: Path, first: int, images: NDArray[np.uint8]) -> None:
    """Write images (n, H, W, C) uint8 as ``ROW.png``; the first one is row ``first``."""
    for row, pixels in enumerate(images, first):
        with (folder / f"{row:08d}.png").open("wb") as file:
            file.write(encode(pixels, "png"))
            file.flush()
            os.fsync(file.fileno())


def assemble_npz(
    path: Path, parts: Sequence[Path], shape: tuple[int, int, int, int], record: dict[str, Any]
) -> None:
    """Join raw parts into the array ``arr_0`` of an npz file, without loading it into memory.

    Equal images give equal bytes.

    Args:
        path: the npz file.
        parts: files of raw uint8 pixels, in the order of the images.
        shape: (N, H, W, C) of the array.
        record: settings of the set, stored as JSON in the array ``made_by``.
    """
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
