"""Read samples of a shard set by id: memory-map the shard, decode the image at its offset."""

from __future__ import annotations

import contextlib
import mmap
import tarfile

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Cache
from pipeline.data.codecs import DecodeError, decoder
from pipeline.data.shards import Index
from pipeline.runtime.errors import CorruptSample


class Reader:
    """Random access to the samples of an index; each process makes its own.

    Args:
        index: the shard set.
        cache: where the files of its shards are.
    """

    def __init__(self, index: Index, cache: Cache) -> None:
        self.index, self.cache = index, cache
        self._starts = np.cumsum([0, *index.sizes])
        self._maps: dict[int, memoryview] = {}
        self._decode = decoder(index.field, index.shape)

    def read(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Decode the samples of ``ids`` (n,) into ``out`` (n, H, W, C) uint8; return their labels.

        Labels are int64 (n,), -1 = no label.

        Raises:
            CorruptSample: a sample cannot be decoded; the message names shard, key and offset.
            DataError: a shard is missing or has another size than the index says.
        """
        rows = self.index.table[ids]
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for k, (shard, offset, length) in enumerate(
            zip(shards.tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True)
        ):
            view = self._maps.get(shard)
            if view is None:
                view = self._open(shard)
            try:
                self._decode(view[offset : offset + length], out[k])
            except DecodeError as error:
                raise self._corrupt(shard, offset, error) from None
        return rows["label"].astype(np.int64)

    def _open(self, number: int) -> memoryview:
        shard = self.index.shards[number]
        with self.cache.open(shard) as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if self.index.is_remote and self.cache.limit and len(self._maps) >= 64:
            self._maps.clear()  # evicted files take room on the disk until they are unmapped
        self._maps[number] = view
        return view

    def _corrupt(self, number: int, offset: int, error: DecodeError) -> CorruptSample:
        shard = self.index.shards[number]
        path = self.cache.path(shard)
        key = "unknown"
        with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(path, "r:") as tar:
            key = next((m.name for m in tar if m.offset_data == offset), key)
        return CorruptSample(
            f"{path}: sample {key} at offset {offset} is damaged: {error}. Check the whole set "
            f"with: python -m pipeline.prepare --verify {self.index.location}"
        )
