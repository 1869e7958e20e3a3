"""Write one WebDataset tar, and note where its samples lie."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import encode
from pipeline.data.labels import NO_LABEL
from pipeline.data.pictures import Pixels
from pipeline.data.shards import ROW
from pipeline.runtime.files import new_file


@dataclass
class ShardWriter:
    """A tar that grows sample by sample; equal samples make equal bytes."""

    tar: Any
    extension: str
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    """Offset and length in bytes, and label, of each sample."""

    def add(self, key: str, pixels: Pixels, label: int = NO_LABEL) -> None:
        """Append an image (H, W, C) uint8, and its class in a file ``KEY.cls`` if it has one."""
        payload = encode(pixels, self.extension)
        sample: dict[str, str | bytes] = {"__key__": key, self.extension: payload}
        if label != NO_LABEL:
            sample["cls"] = b"%d" % label
        self.tar.write(sample)
        # webdataset writes members by name, so the image is last. It is padded to a whole block.
        padded = -(-len(payload) // BLOCKSIZE) * BLOCKSIZE
        self.rows.append((self.tar.tarstream.offset - padded, len(payload), label))

    @property
    def table(self) -> NDArray[np.void]:
        """The shard's rows of the index, of dtype ``ROW``."""
        return np.array(self.rows, dtype=ROW)


@contextlib.contextmanager
def write_shard(path: Path, extension: str) -> Iterator[ShardWriter]:
    """Open a tar for writing; after the block its bytes are on disk.

    Args:
        path: the file; one that exists is replaced.
        extension: ``npy``, ``png`` or ``jpg``; the format of the images.
    """
    from webdataset import TarWriter  # imports torch, which takes seconds

    with new_file(path) as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            yield ShardWriter(tar, extension)
        file.flush()
        os.fsync(file.fileno())
