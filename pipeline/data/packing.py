"""Shards from a source: which image goes where, and each shard written whole or not at all.

The place of an image is a function of (listing, seed, number of shards) alone, and shards are
written independently of each other, so any number of workers and any interruptions lead to the same
bytes. A finished shard leaves a marker with its checksum in the work folder; the index is written
when all have one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from pipeline.data.codecs import DecodeError, encode
from pipeline.data.order import permutation
from pipeline.data.shards import INDEX_NAME, NO_LABEL, ROW, Shard, shard_name
from pipeline.data.sources import Source, reader
from pipeline.runtime.errors import DataError, UserError
from pipeline.runtime.files import sha256_of, write_atomic
from pipeline.runtime.locks import FileLock

FORMAT_VERSION = 1
WORK_FOLDER = ".prepare"
SETTINGS_NAME = "settings.json"
SKIPPED_NAME = "skipped.txt"
ENCODERS = {"npy": "raw pixels", "png": "zlib level 6", "jpg": "quality 95, 4:4:4"}


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of a shard set."""

    source: Source
    out: Path
    size: int
    channels: int
    field: str
    background: str
    colour: tuple[int, int, int]
    seed: int
    num_shards: int

    def describe(self) -> dict[str, Any]:
        """The record of these decisions in the index; equal records make equal pixels."""
        return {
            "version": FORMAT_VERSION,
            "source": self.source.location,
            "source_kind": self.source.kind,
            "source_images": len(self.source.names),
            "source_sha256": self.source.digest,
            "size": self.size,
            "channels": self.channels,
            "format": self.field,
            "encoder": ENCODERS[self.field],
            "crop": "upright by EXIF, central square",
            "filter": "Pillow Lanczos, antialiased",
            "background": self.background,
            "seed": self.seed,
            "shards": self.num_shards,
            "classes": list(self.source.classes),
            "pillow": PIL.__version__,
        }

    def rows(self, shard: int) -> NDArray[np.int64]:
        """Rows of the listing that go into a shard: a near-equal cut of one global shuffle."""
        n = len(self.source.names)
        order = _shuffled(n, self.seed)
        return order[n * shard // self.num_shards : n * (shard + 1) // self.num_shards]


@lru_cache(maxsize=1)
def _shuffled(n: int, seed: int) -> NDArray[np.int64]:
    return permutation(n, f"prepare|{seed}")


@dataclass(frozen=True)
class Packed:
    """A finished shard: its index entry, its table rows, what was skipped and enlarged."""

    number: int
    shard: Shard
    table: NDArray[np.void]
    field: str
    skipped: list[tuple[str, str]]
    enlarged: int


def pack(job: Job, number: int, report: Callable[[int], None]) -> Packed:
    """Write one shard, and its marker last; ``report(1)`` is called after each image.

    Raises:
        DataError: the source cannot be read any more.
        OSError: the folder cannot be written.
    """
    from webdataset import TarWriter  # imports torch: seconds, for nothing when all is done

    pixels_of = reader(job.source, job.size, job.channels, job.colour)
    table: list[tuple[int, int, int]] = []
    skipped: list[tuple[str, str]] = []
    enlarged = 0
    target = job.out / shard_name(number)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb", buffering=1 << 20) as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                for row in job.rows(number).tolist():
                    try:
                        pixels, is_enlarged = pixels_of(row)
                    except DecodeError as error:
                        skipped.append((job.source.names[row], str(error)))
                    else:
                        enlarged += is_enlarged
                        # The key is the row in the sorted listing: it leads back to the original.
                        payload, label = encode(pixels, job.field), int(job.source.labels[row])
                        sample = {"__key__": f"{row:08d}", job.field: payload}
                        if label != NO_LABEL:
                            sample["cls"] = b"%d" % label
                        tar.write(sample)
                        # Members are written by name, so the image is last, padded to a block.
                        blocks = -(-len(payload) // BLOCKSIZE) * BLOCKSIZE
                        table.append((tar.tarstream.offset - blocks, len(payload), label))
                    report(1)
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(target.name, len(table), partial.stat().st_size, sha256_of(partial))
        rows = np.array(table, dtype=ROW)
        packed = Packed(number, shard, rows, job.field if table else "", skipped, enlarged)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    _mark(job, packed)
    return packed


# -- the work folder ----------------------------------------------------------------------------


class FolderInUse(UserError):
    """Another prepare works in the folder."""


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """DIR/.prepare, held by this process alone; partial files of a killed run are removed.

    Raises:
        FolderInUse: another prepare works in this folder.
        UserError: it cannot be written.
    """
    with _opened(out) as (work, lock):
        if not lock.acquire(wait=False):
            raise FolderInUse(
                f"--out ({out}): another prepare is writing there; wait for it to end, or give "
                "another folder."
            )
        leftovers = ("shard-*.tmp", f"{INDEX_NAME}*.tmp", f"{WORK_FOLDER}/*.tmp")
        try:
            _remove(out, leftovers)
            yield work
        finally:
            _remove(out, leftovers)
            if (out / INDEX_NAME).exists():
                shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def shared_work_folder(out: Path, mine: Sequence[int]) -> Iterator[Path]:
    """DIR/.prepare, held by all processes that pack parts of it; waits while one holds it alone.

    Partial files of the shards in ``mine`` are removed, and no others.

    Raises:
        UserError: it cannot be written.
    """
    with _opened(out) as (work, lock):
        lock.acquire(shared=True)
        leftovers = [
            f"{folder}{shard_name(number)}*.tmp"
            for folder in ("", f"{WORK_FOLDER}/")
            for number in mine
        ]
        try:
            _remove(out, leftovers)
            yield work
        finally:
            _remove(out, leftovers)


@contextlib.contextmanager
def _opened(out: Path) -> Iterator[tuple[Path, FileLock]]:
    work = out / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock") as lock:
            yield work, lock
    except OSError as error:
        raise UserError(
            f"--out ({out}): cannot be written: {error}. Make room or change the permissions, then "
            "run the same command: it continues with the shards that are missing."
        ) from None


def _remove(out: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)


def begin(job: Job, work: Path) -> None:
    """Record the settings of a new folder; refuse one that was begun with others.

    Raises:
        UserError: naming each difference.
    """
    settings = work / SETTINGS_NAME
    if settings.exists():
        refuse_differences(job, json.loads(settings.read_text()), pillow=True)
        return
    foreign = sorted(path.name for path in job.out.glob("*.tar"))
    if foreign:
        raise UserError(
            f"--out ({job.out}): holds {len(foreign)} tars of something else ({foreign[0]}, ...); "
            "give an empty folder. To index those tars as they are: "
            f"python -m pipeline.prepare {job.out}"
        )
    _check_room(job)
    write_atomic(settings, json.dumps(job.describe(), indent=1).encode())


def refuse_differences(job: Job, begun: dict[str, Any], *, pillow: bool) -> None:
    """Raise ``UserError`` unless a folder's settings are this job's."""
    wanted = job.describe()
    free = {"source"} if pillow else {"source", "pillow"}  # the digest says which source it is
    differing = [
        f"{key}: {begun.get(key)} there, {wanted[key]} now"
        for key in wanted
        if key not in free and begun.get(key) != wanted[key]
    ]
    if differing:
        raise UserError(
            f"--out ({job.out}): was begun with other settings:\n  "
            + "\n  ".join(differing)
            + "\nGive another folder, or remove this one to prepare it anew."
        )


def finished(job: Job, work: Path, numbers: Sequence[int]) -> dict[int, Packed]:
    """Those of the shards that are whole already: marked, and of the bytes that were marked."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda number: _marked(job, work, number), numbers)
        return {packed.number: packed for packed in found if packed is not None}


def begun(out: Path) -> bool:
    """Whether a folder has settings, or is complete."""
    return (out / WORK_FOLDER / SETTINGS_NAME).exists() or (out / INDEX_NAME).exists()


def num_unfinished(job: Job) -> int:
    """How many shards nobody has finished; their bytes are not looked at."""
    work = job.out / WORK_FOLDER
    return sum(not _marker(work, number).exists() for number in range(job.num_shards))


def _mark(job: Job, packed: Packed) -> None:
    document = asdict(packed) | {"table": packed.table.tolist()}
    write_atomic(_marker(job.out / WORK_FOLDER, packed.number), json.dumps(document).encode())


def _marked(job: Job, work: Path, number: int) -> Packed | None:
    try:
        found = json.loads(_marker(work, number).read_text())
        shard = Shard(**found["shard"])
        if sha256_of(job.out / shard.url) != shard.sha256:
            return None
        table = np.array([tuple(row) for row in found["table"]], dtype=ROW)
        skipped = [(name, why) for name, why in found["skipped"]]
        return Packed(number, shard, table, found["field"], skipped, found["enlarged"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _marker(work: Path, number: int) -> Path:
    return work / f"{shard_name(number)}.json"


def printable(text: str) -> str:
    """A file name or reason on one line of UTF-8, whatever bytes the name holds."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def tar_bytes(size: int, channels: int, field: str) -> int:
    """About how many bytes a sample takes in a tar; exact for npy, from above for png."""
    raw = size * size * channels
    payload = {"npy": raw + 128, "png": raw, "jpg": raw // 3}[field]
    return 512 + -(-payload // 512) * 512 + 1024  # header, payload, label


def _check_room(job: Job) -> None:
    """Refuse at once what cannot fit; only raw pixels have a size known beforehand."""
    needed = tar_bytes(job.size, job.channels, job.field) * len(job.source.names)
    free = shutil.disk_usage(job.out).free
    if job.field == "npy" and needed > free:
        raise DataError(
            f"--out ({job.out}): the shards need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB "
            "are free; make room, or use --format jpg."
        )
