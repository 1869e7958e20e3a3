"""Pack the images of a source into shards, each of them complete or absent.

The place of an image depends only on the listing, the seed and the number of shards, and each shard
is written by one process. Hence any number of workers and interruptions leads to the same bytes.
The work folder ``OUT/.prepare`` holds a marker for each finished shard; the index is written when
all shards have one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from pipeline.data import staleness
from pipeline.data.locations import prepare_command
from pipeline.data.order import permutation
from pipeline.data.pictures import DecodeError
from pipeline.data.shard_writer import write_shard
from pipeline.data.shards import INDEX_NAME, ROW, Shard, shard_name
from pipeline.data.skipped import SKIPPED_NAME
from pipeline.data.source import Source
from pipeline.data.sources import reader
from pipeline.data.squares import Square
from pipeline.runtime.console import say
from pipeline.runtime.errors import DataError, UserError
from pipeline.runtime.text import printable
from pipeline.runtime.work_folder import SETTINGS_NAME, WorkFolder, remove_folder, sum_of

FORMAT_VERSION = 2
"""1 took colours as they are stored, and damaged images as far as Pillow reads them."""
WORK_FOLDER = ".prepare"
MARKER = ".json"
"""Ending of a marker, after the name of its shard."""
AT_ONCE = 256
"""Shards whose records are in memory at a time."""
ENCODERS = {"npy": "raw pixels", "png": "zlib level 6", "jpg": "quality 95, 4:4:4"}


@dataclass(frozen=True)
class Job:
    """A shard set to write: everything that decides its bytes, and where it goes.

    Args:
        source: the images.
        out: the folder of the shards.
        square: what is packed of an image.
        field: format of the packed images: ``npy``, ``png`` or ``jpg``.
        background: the colour behind transparent pixels, as the user wrote it.
        seed: seed of the global shuffle.
        num_shards: number of tars.
    """

    source: Source
    out: Path
    square: Square
    field: str
    background: str
    seed: int
    num_shards: int

    def describe(self) -> dict[str, Any]:
        """Return the record for the index; equal records make equal pixels."""
        return {
            "version": FORMAT_VERSION,
            "source": self.source.location,
            "source_kind": self.source.kind,
            "source_images": len(self.source.names),
            "source_sha256": self.source.digest,
            "size": self.square.size,
            "channels": self.square.channels,
            "format": self.field,
            "encoder": ENCODERS[self.field],
            "crop": self.square.describe(),
            "filter": "Pillow Lanczos, antialiased",
            "background": self.background,
            "seed": self.seed,
            "shards": self.num_shards,
            "classes": list(self.source.classes),
            "pillow": PIL.__version__,
        }

    @property
    def work(self) -> WorkFolder:
        """The records of what is packed; the digest, not the path, says which source it is."""
        return WorkFolder(self.out / WORK_FOLDER, self.out, self.describe(), free={"source"})

    @property
    def is_complete(self) -> bool:
        """Whether the folder has an index, which is written last."""
        return (self.out / INDEX_NAME).exists()

    def rows(self, shard: int) -> NDArray[np.int64]:
        """Return the rows of the listing in a shard: a near-equal cut of one global shuffle."""
        n = len(self.source.names)
        order = _shuffled(n, self.seed)
        return order[n * shard // self.num_shards : n * (shard + 1) // self.num_shards]


@lru_cache(maxsize=1)
def _shuffled(n: int, seed: int) -> NDArray[np.int64]:
    return permutation(n, f"prepare|{seed}")


@dataclass(frozen=True)
class Packed:
    """A finished shard, as its marker describes it.

    ``table`` holds its rows of the index (dtype ``ROW``). ``field`` is the image format, "" for an
    empty shard. ``skipped`` lists (name, reason) of images that could not be read. ``done`` counts
    what was done to images, like a conversion to sRGB. ``files`` is the record of the images' files
    (``staleness``).
    """

    shard: Shard
    table: NDArray[np.void]
    field: str
    skipped: list[tuple[str, str]]
    done: Counter[str]
    files: dict[str, str]


def pack(job: Job, number: int, report: Callable[[int], None]) -> None:
    """Write one shard, then its marker; call ``report(1)`` after each image.

    Raises:
        DataError: the source cannot be read any more.
        OSError: the folder cannot be written.
    """
    rows = job.rows(number).tolist()
    files = staleness.Record(job.source, rows)
    read = reader(job.source, job.square, files.add)
    skipped: list[tuple[str, str]] = []
    done: Counter[str] = Counter()
    target = job.out / shard_name(number)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with write_shard(partial, job.field) as writer:
            for row in rows:
                try:
                    pixels, notes = read(row)
                except DecodeError as error:
                    skipped.append((job.source.names[row], str(error)))
                else:
                    done.update(notes)
                    # The key is the row of the sorted listing, which leads back to the original.
                    writer.add(f"{row:08d}", pixels, int(job.source.labels[row]))
                report(1)
        table = writer.table
        sums = sum_of(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    document = {
        "table": table.tolist(),
        "field": job.field if len(table) else "",
        "skipped": skipped,
        "done": done,
        "source_files": files.describe(),
    }
    job.work.mark(_marker(number), {target.name: sums}, document)


def finished(job: Job, numbers: Sequence[int], *, whole: bool = True) -> dict[int, Packed]:
    """Return those of the shards that have a marker and the bytes that it names.

    What is damaged is set aside, so that its shard is packed again.

    Args:
        job: the set.
        numbers: of the shards; the rows of all of them are in memory at a time.
        whole: read every byte of the shards; False = compare their sizes alone.

    Raises:
        OSError: a file cannot be read, which is no damage.
    """
    markers = {_marker(number): number for number in numbers}
    found = job.work.finished(markers, job.out, _packed, whole=whole)
    packed = {markers[name]: one for name, one in found.items()}
    stale = stale_shards(job, {number: one.files for number, one in packed.items()})
    if stale:
        say(f"note: images of {len(stale)} finished shards changed since: they are packed again")
    return {number: one for number, one in packed.items() if number not in stale}


def finished_numbers(job: Job, numbers: Sequence[int]) -> set[int]:
    """Return the numbers of the shards that ``finished`` returns."""
    starts = range(0, len(numbers), AT_ONCE)
    return {number for k in starts for number in finished(job, numbers[k : k + AT_ONCE])}


def stale_shards(job: Job, records: Mapping[int, Mapping[str, str]]) -> list[int]:
    """Return the numbers of the shards whose images are others than their records say."""

    def is_stale(number: int) -> bool:
        if not records[number]:
            return False
        return staleness.is_stale(job.source, job.rows(number).tolist(), records[number])

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(is_stale, records))
    return [number for number, yes in zip(records, found, strict=True) if yes]


def _packed(document: dict[str, Any]) -> Packed:
    """Return what a checked marker says."""
    name = document["part"].removesuffix(MARKER)
    shard = Shard(name, len(document["table"]), *document["files"][name])
    table = np.array([tuple(row) for row in document["table"]], dtype=ROW)
    ends = table["offset"] + table["length"]
    if np.any(ends > shard.filesize) or np.any(table["offset"] > ends):  # beyond 64 bits
        raise ValueError("an image lies outside of its shard")
    skipped = [(str(name), str(why)) for name, why in document["skipped"]]
    done = Counter({str(what): int(count) for what, count in document["done"].items()})
    if not staleness.is_record(files := document.get("source_files", {})):
        raise ValueError("source_files is no record of files")
    return Packed(shard, table, str(document["field"]), skipped, done, files)


def num_unfinished(job: Job) -> int:
    """Return the number of shards without a marker; their bytes are not checked."""
    return len(job.work.unfinished(map(_marker, range(job.num_shards))))


def _marker(number: int) -> str:
    return f"{shard_name(number)}{MARKER}"


# -- the work folder ----------------------------------------------------------------------------


@contextlib.contextmanager
def hold(job: Job, part: Sequence[int] | None = None) -> Iterator[None]:
    """Hold ``OUT/.prepare``, and remove the partial files of killed processes.

    Args:
        job: the set.
        part: the shards of this process, if others pack theirs at the same time. Only partial files
            of these shards are removed. None: hold the folder alone, and remove it at the end if
            the set is complete.

    Raises:
        FolderInUse: ``part`` is None and another process packs the set.
        UserError: the folder cannot be written.
    """
    partial = [f"{name}*.tmp" for name in ("shard-", INDEX_NAME, SKIPPED_NAME, f"{WORK_FOLDER}/")]
    if part is not None:
        names = [shard_name(number) for number in part]
        partial = [f"{folder}{name}*.tmp" for folder in ("", f"{WORK_FOLDER}/") for name in names]
    try:
        with job.work.hold(shared=part is not None):
            try:
                _remove(job.out, partial)
                yield
            finally:
                _remove(job.out, partial)
                if part is None and job.is_complete:
                    remove_folder(job.work.path)
    except OSError as error:
        raise job.work.unwritable(error) from None


def _remove(out: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)


def begin(job: Job) -> None:
    """Record the settings of a new set, or compare them with those of a set that was begun.

    Raises:
        UserError: they differ, or the folder holds tars of something else.
        DataError: there is too little room.
    """
    foreign = [] if job.work.begun else sorted(path.name for path in job.out.glob("[!.]*"))
    if foreign and any(job.work.path.glob(f"*{MARKER}")):
        raise UserError(
            f"{job.work.path / SETTINGS_NAME}: is missing, so nobody knows the settings of the "
            f"{len(foreign)} tars in {job.out}. Restore it; or remove {job.out} and run the same "
            "command."
        )
    if foreign:
        tars = [name for name in foreign if name.endswith(".tar")]
        index = f" To index those tars as they are: {prepare_command(job.out)}" if tars else ""
        raise UserError(
            f"--out ({job.out}): holds {len(tars or foreign)} {'tars' if tars else 'files'} of "
            f"something else ({printable((tars or foreign)[0])}, ...). Give an empty or a new "
            f"folder.{index}"
        )
    if not job.work.begun:
        _check_room(job)
    job.work.begin()


def tar_bytes(size: int, channels: int, field: str) -> int:
    """Return about how many bytes a sample takes in a tar; for png this is an upper bound."""
    raw = size * size * channels
    payload = {"npy": raw + 128, "png": raw, "jpg": raw // 3}[field]
    return 512 + -(-payload // 512) * 512 + 1024  # header, payload, label


def _check_room(job: Job) -> None:
    """Raise ``DataError`` if raw pixels cannot fit; the other formats have no known size."""
    needed = tar_bytes(job.square.size, job.square.channels, job.field) * len(job.source.names)
    free = shutil.disk_usage(job.out).free
    if job.field == "npy" and needed > free:
        raise DataError(
            f"--out ({job.out}): the shards need {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free. Make room, or use --format jpg."
        )
