"""Read samples of a shard set by id: read the image at its offset, decode it.

Shards are read with ``pread`` and not mapped: a file that shrinks, or a disk that fails, under a
map ends the process with SIGBUS, without a word. The shards that are open at a time are bounded.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import time
import weakref

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Cache
from pipeline.data.checksums import check_bytes, unreadable
from pipeline.data.codecs import decoder, npy_header
from pipeline.data.pictures import DecodeError
from pipeline.data.shards import Index
from pipeline.data.tars import open_tar
from pipeline.runtime.errors import CorruptSample, DataError
from pipeline.runtime.host import SCARCE_FILES, raise_open_files
from pipeline.runtime.text import printable

OTHER_FILES = 256
"""Descriptors that are left to the rest of the process: checkpoints, logs, W&B, sockets."""
FEWEST_OPEN = 8
LOOK_SECONDS = 1.0
"""How often open shards are looked at: one that was written to is compared again."""


class Reader:
    """Random access to the samples of an index; each process makes its own.

    Args:
        index: the shard set.
        cache: where the files of its shards are.
        skip_damaged: damaged samples that ``read_intact`` may pass over.
    """

    def __init__(self, index: Index, cache: Cache, skip_damaged: int = 0) -> None:
        self.index, self.cache = index, cache
        self._may_skip, self._damaged = skip_damaged, set[int]()
        self._starts = index.starts
        self._files: dict[int, int] = {}  # descriptors, in the order in which they were opened
        weakref.finalize(self, _close, self._files)
        self._written: dict[int, tuple[int, int]] = {}  # size and time of the last change
        self._looked = time.monotonic()
        self._room = max(FEWEST_OPEN, raise_open_files() - OTHER_FILES)
        fields = {shard.field or index.field for shard in index.shards}
        self._decoders = {field: decoder(field, index.shape) for field in fields}
        # Raw pixels behind this header are read to their place, without a copy in between.
        at_once = "npy" in fields and hasattr(os, "preadv")  # not on every macOS
        self._header = npy_header(index.shape) if at_once else b""
        self._found = bytearray(len(self._header))
        self._raw = len(self._header) + int(np.prod(index.shape)) if self._header else -1

    def read(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Decode the samples of ``ids`` (n,) into ``out`` (n, H, W, C) uint8; return their labels.

        Labels are int64 (n,), -1 = no label.

        Raises:
            CorruptSample: a sample cannot be decoded; the message names shard, key and offset.
            DataError: a shard is missing, cannot be read, or was changed while it was read.
        """
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        rows = self.index.table[ids]
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        if not out.flags.c_contiguous:
            raise ValueError("out must be contiguous: samples are read to their place in it")
        places = out.reshape(len(out), -1) if len(out) else out
        for k, (shard, offset, length) in enumerate(
            zip(shards.tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True)
        ):
            file = self._files.get(shard)
            if file is None:
                file = self._open(shard)
            try:
                if length == self._raw:
                    found = os.preadv(file, (self._found, places[k]), offset)
                    if found == length and self._found == self._header:
                        continue
                payload = os.pread(file, length, offset)
            except OSError as error:
                raise unreadable(self._name(shard), error) from None
            if len(payload) < length:
                raise self._cut(shard, offset)
            try:
                field = self.index.shards[shard].field or self.index.field
                self._decoders[field](memoryview(payload), out[k])
            except DecodeError as error:
                raise self._corrupt(shard, offset, error) from None
        labels: NDArray[np.int64] = rows["label"].astype(np.int64)
        return labels

    def read_intact(
        self, ids: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Read like ``read``; the next sample of the set takes the place of a damaged one.

        Which one does depends on the set alone, so the batch is the same on any number of ranks.

        Returns:
            Labels and ids of the samples that were read, (n,) int64 each.

        Raises:
            CorruptSample: more are damaged than may be passed over.
            DataError: as ``read``.
        """
        try:
            return self.read(ids, out), ids
        except CorruptSample:
            if not self._may_skip:
                raise
        found = [self._next_intact(one, out[k : k + 1]) for k, one in enumerate(ids.tolist())]
        labels, used = np.array(found, np.int64).T
        return labels, used

    def _next_intact(self, wanted: int, out: NDArray[np.uint8]) -> tuple[int, int]:
        """Read a sample (1, H, W, C), or the first after it that is intact; return (label, id)."""
        for step in range(self.index.num_samples):
            one = (wanted + step) % self.index.num_samples
            if one in self._damaged:
                continue
            try:
                return int(self.read(np.array([one]), out)[0]), one
            except CorruptSample as error:
                self._damaged.add(one)
                if len(self._damaged) > self._may_skip:
                    raise CorruptSample(
                        f"{error} data.skip_damaged ({self._may_skip}): this is one more."
                    ) from None
        raise DataError(f"data.shards ({self.index.location}): every sample is damaged.")

    def _look(self) -> None:
        """Close the shards that were evicted or written to since they were opened.

        Local ones that were written to are compared first: the time of the last change alone is no
        fault, on some clusters users touch their files.
        """
        self._close_evicted()
        for number, file in list(self._files.items()):
            if _written(file) != self._written[number]:
                os.close(self._files.pop(number))
                shard = self.index.shards[number]
                if not self.cache.is_copied(shard):  # ``Cache`` compares copies itself
                    check_bytes(self.cache.path(shard), shard, self.cache.stop)
        self._looked = time.monotonic()

    def _close_evicted(self) -> None:
        """Close the copies that were evicted: the disk has their room again only then."""
        for number, file in list(self._files.items()) if self.cache.limit else ():
            if os.fstat(file).st_nlink == 0:
                os.close(self._files.pop(number))

    def _open(self, number: int) -> int:
        while len(self._files) >= self._room:
            os.close(self._files.pop(next(iter(self._files))))
        try:
            with self.cache.open(self.index.shards[number]) as opened:
                file = os.dup(opened.fileno())
        except OSError as error:
            if error.errno not in SCARCE_FILES or not self._files:
                raise unreadable(self._name(number), error) from None
            self._room = max(1, len(self._files) // 2)  # others of this process need some too
            _close(self._files)
            return self._open(number)
        self._close_evicted()  # this download may have taken their place
        self._files[number], self._written[number] = file, _written(file)
        return file

    def _name(self, number: int) -> str:
        return self.index.place_of(self.index.shards[number])

    def _cut(self, number: int, offset: int) -> DataError:
        return DataError(
            f"{self._name(number)}: was cut while it was read: it ends before the sample at offset "
            f"{offset} does. Restore it, then run the same command again."
        )

    def _corrupt(self, number: int, offset: int, error: DecodeError) -> CorruptSample:
        shard = self.index.shards[number]
        path = self.cache.path(shard)
        key = "unknown"
        with contextlib.suppress(tarfile.TarError, OSError), open_tar(path) as tar:
            key = next((printable(m.name) for m in tar if m.offset_data == offset), key)
        return CorruptSample(
            f"{path}: sample {key} at offset {offset} is damaged: {error}. Check the whole set "
            f"with: python -m pipeline.prepare --verify {self.index.location}"
        )


def _written(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _close(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
