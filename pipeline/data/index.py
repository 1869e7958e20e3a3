"""Describe a shard set: its tars, and where each sample lies in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.locations import beside, is_url
from pipeline.runtime.errors import DataError

ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """A tar of a set: its file name, number of samples, size in bytes, and sha256 in hex.

    ``folder`` and ``field`` are those of the ``Index``, where several sets are read as one.
    """

    url: str
    nsamples: int
    filesize: int
    sha256: str
    folder: str = ""
    field: str = ""


@dataclass(frozen=True)
class Index:
    """The checked index of a shard set.

    Args:
        location: folder or URL of the shards; of several sets as one, all of them.
        field: extension of the images in the tars, e.g. ``npy``.
        shape: (H, W, C) of every image.
        shards: the tars, in the order of the sample ids.
        table: a row of dtype ``ROW`` for each sample id.
        made_by: how the images were made: source, crop, resize.
    """

    location: str
    field: str
    shape: tuple[int, int, int]
    shards: tuple[Shard, ...]
    table: NDArray[np.void]
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 (N,), -1 = no label."""
        found: NDArray[np.int32] = self.table["label"]
        return found

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each shard."""
        return [shard.nsamples for shard in self.shards]

    @property
    def is_remote(self) -> bool:
        """Whether some of the shards are."""
        return is_url(self.location)

    def folder_of(self, shard: Shard) -> str:
        """Return the folder or URL of a shard."""
        return shard.folder or self.location

    def place_of(self, shard: Shard) -> str:
        """Return the path or URL of a shard."""
        return beside(self.folder_of(shard), shard.url)

    @property
    def local_shards(self) -> list[Shard]:
        """The shards that are not behind a URL."""
        return [shard for shard in self.shards if not is_url(self.folder_of(shard))]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the shards' sizes and checksums, equal for every copy of the set."""
        listed = [[shard.nsamples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def require_shape(self, wanted: tuple[int, int, int], field: str) -> None:
        """Raise ``DataError`` if the images do not have the shape (H, W, C) that a model takes.

        Args:
            wanted: the shape that the model takes.
            field: the option that named this set, for the message.
        """
        if self.shape != wanted:
            raise DataError(
                f"{field} ({self.location}): images of {described(self.shape)}, the model wants "
                f"{described(wanted)}. Prepare them with --size {wanted[0]} --channels "
                f"{wanted[2]}, give another set, or train with other model.image_size and "
                "model.channels."
            )


def described(shape: tuple[int, int, int]) -> str:
    """Return a shape (H, W, C) for a message."""
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
