"""Write the parts of a set of images: PNG files, tars, or raw pixels that become an npz file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import encode, npy_header
from pipeline.data.labels import NO_LABEL
from pipeline.data.shard_writer import write_shard
from pipeline.generation.image_set import ImageSet
from pipeline.runtime.documents import open_regular
from pipeline.runtime.errors import GenerationError
from pipeline.runtime.files import new_file, sync_folder
from pipeline.runtime.work_folder import FileSum, sum_of

Add = Callable[[int, NDArray[np.uint8]], object]
"""Appends images (n, H, W, C) uint8 to a part, given the row of the first of them."""
PIECE = 1 << 20


@contextlib.contextmanager
def part_writer(job: ImageSet, number: int, sums: dict[str, FileSum]) -> Iterator[Add]:
    """Open a part for writing; after the block its bytes are on disk.

    ``sums`` then has size and checksum of each of its files.
    """
    folder, files = job.parts_folder, job.files_of(number)
    if job.format == "png":
        yield lambda first, images: sums.update(add_png(folder, first, images))
        sync_folder(folder)
    elif job.format == "shards":
        with write_shard(folder / files[0], "png") as shard:

            def add(first: int, images: NDArray[np.uint8]) -> None:
                for row, pixels in enumerate(images, first):
                    label = job.label(row)
                    shard.add(f"{row:08d}", pixels, NO_LABEL if label is None else label)

            yield add
        sums[files[0]] = sum_of(folder / files[0])
    else:
        digest = hashlib.sha256()
        with new_file(folder / files[0]) as file:

            def add_raw(_: int, images: NDArray[np.uint8]) -> None:
                content = images.tobytes()
                digest.update(content)
                file.write(content)

            yield add_raw
            file.flush()
            os.fsync(file.fileno())
            sums[files[0]] = [file.tell(), digest.hexdigest()]


def add_png(folder: Path, first: int, images: NDArray[np.uint8]) -> dict[str, FileSum]:
    """Write images (n, H, W, C) uint8 as ``ROW.png``; the first one is row ``first``.

    Returns their sums by name.
    """
    sums: dict[str, FileSum] = {}
    for row, pixels in enumerate(images, first):
        content, name = encode(pixels, "png"), f"{row:08d}.png"
        with new_file(folder / name) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sums[name] = [len(content), hashlib.sha256(content).hexdigest()]
    return sums


def assemble_npz(
    path: Path,
    parts: Sequence[tuple[Path, FileSum]],
    shape: tuple[int, int, int, int],
    record: Mapping[str, Any],
) -> None:
    """Join raw parts into the array ``arr_0`` of an npz file, without loading it into memory.

    Equal images give equal bytes.

    Args:
        path: the npz file.
        parts: files of raw uint8 pixels with their sums, in the order of the images.
        shape: (N, H, W, C) of the array.
        record: settings of the set, stored as JSON in the array ``made_by``.

    Raises:
        GenerationError: a part changed since its sum was taken.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # The name that evaluators of published sample batches look for.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            member.write(npy_header(shape))
            for raw, sums in parts:
                digest = hashlib.sha256()
                with open_regular(raw) as part:
                    while content := part.read(PIECE):
                        digest.update(content)
                        member.write(content)
                if digest.hexdigest() != sums[1]:
                    raise GenerationError(
                        f"{raw}: was changed while the parts were joined. Run the same command "
                        "again: it makes this part again."
                    )
        with archive.open(zipfile.ZipInfo("made_by.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(record)), allow_pickle=False)
    with path.open("rb") as file:
        os.fsync(file.fileno())
