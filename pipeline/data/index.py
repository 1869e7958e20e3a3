"""Describe a shard set: its tars, and where each sample lies in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.locations import beside, is_url
from pipeline.runtime.errors import DataError

ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])
COLUMN = 1 << 22
"""Rows that are read at a time where all labels are."""


@dataclass(frozen=True, slots=True)
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


class Table(Protocol):
    """A row of dtype ``ROW`` for each sample id: an array, or a file that is read in parts."""

    def __len__(self) -> int: ...
    def __getitem__(self, wanted: Any, /) -> Any:
        """Return the rows of a slice or of an array of ids, or a whole column by its name."""


@dataclass(frozen=True)
class Index:
    """The checked index of a shard set.

    Args:
        location: folder or URL of the shards; of several sets as one, all of them.
        field: extension of the images in the tars, e.g. ``npy``.
        shape: (H, W, C) of every image.
        shards: the tars, in the order of the sample ids.
        table: where each sample lies.
        made_by: how the images were made: source, crop, resize.
        counted: number of samples of each label, -1 = none, as the index says; None = unknown.
    """

    location: str
    field: str
    shape: tuple[int, int, int]
    shards: tuple[Shard, ...]
    table: Table
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)
    counted: dict[int, int] | None = None

    @property
    def num_samples(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 (N,), -1 = no label: the whole column is read. See ``labels_of``."""
        found: NDArray[np.int32] = self.table["label"]
        return found

    def labels_of(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the labels (n,) of some samples."""
        found: NDArray[np.int32] = self.table[ids]["label"]
        return found

    @cached_property
    def label_counts(self) -> dict[int, int]:
        """Number of samples of each label, -1 = none, in the order of the labels."""
        return self.counted or counted(self.table)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The id of the first sample of each shard, and the number of samples: (shards + 1,)."""
        found: NDArray[np.int64] = np.cumsum([0, *self.sizes], dtype=np.int64)
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

    @cached_property
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


def counted(table: Table) -> dict[int, int]:
    """Return the number of rows of each label, in the order of the labels."""
    found: Counter[int] = Counter()
    for start in range(0, len(table), COLUMN):
        labels, counts = np.unique(table[start : start + COLUMN]["label"], return_counts=True)
        found.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
    return dict(sorted(found.items()))


def described(shape: tuple[int, int, int]) -> str:
    """Return a shape (H, W, C) for a message."""
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"
