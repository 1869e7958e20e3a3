"""Read samples of a shard set by id: memory-map the shard, decode the image at its offset.

Python keeps a descriptor for each map, so the shards that are mapped at a time are bounded. A
shard that is read again later is mapped again, which takes some 40 microseconds.
"""

from __future__ import annotations

import contextlib
import mmap
import tarfile

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Cache
from pipeline.data.codecs import DecodeError, decoder
from pipeline.data.shards import Index
from pipeline.runtime.errors import CorruptSample, DataError
from pipeline.runtime.host import SCARCE_FILES, raise_open_files, remedy_for

OTHER_FILES = 256
"""Descriptors that are left to the rest of the process: checkpoints, logs, W&B, sockets."""
FEWEST_MAPS, EVICTABLE_MAPS = 8, 64


class Reader:
    """Random access to the samples of an index; each process makes its own.

    Args:
        index: the shard set.
        cache: where the files of its shards are.
    """

    def __init__(self, index: Index, cache: Cache) -> None:
        self.index, self.cache = index, cache
        self._starts = np.cumsum([0, *index.sizes])
        self._maps: dict[int, memoryview] = {}  # in the order in which they were mapped
        self._room = max(FEWEST_MAPS, raise_open_files() - OTHER_FILES)
        if index.is_remote and cache.limit:  # evicted files take room on the disk while mapped
            self._room = min(self._room, EVICTABLE_MAPS)
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
        while len(self._maps) >= self._room:
            del self._maps[next(iter(self._maps))]
        try:
            view = self._map(number)
        except OSError as error:
            if error.errno not in SCARCE_FILES or not self._maps:
                raise self._unreadable(number, error) from None
            self._room = max(1, len(self._maps) // 2)  # others of this process need some too
            self._maps.clear()
            return self._open(number)
        self._maps[number] = view
        return view

    def _map(self, number: int) -> memoryview:
        with self.cache.open(self.index.shards[number]) as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _unreadable(self, number: int, error: OSError) -> DataError:
        what = f"{self.index.location}/{self.index.shards[number].url}: cannot be read"
        remedy = remedy_for(error) if error.errno in SCARCE_FILES else ""
        return DataError(f"{what}: {remedy or error.strerror}.")

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
