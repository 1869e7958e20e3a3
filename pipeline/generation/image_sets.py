"""Write sets of generated images to disk, by all ranks together: PNG files, an npz, or shards.

A set is cut into parts, and which image is in which part depends only on the number of images.
Hence any number of ranks and interruptions leads to the same bytes. The set is written in
``OUT.tmp`` and renamed when it is complete. The work folder ``OUT.tmp/.generate`` holds a marker
for each finished part. A finished part is not made again.

    OUT/00000000.png ... generated.json            png
    OUT                                            npz: arr_0 (N, H, W, C) uint8, made_by (JSON)
    OUT/shard-000000.tar ... index.json            shards, as of ``pipeline.prepare``
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from pipeline.data.shard_writer import write_shard
from pipeline.data.shards import NO_LABEL, read_index, scan, shard_name, write_index
from pipeline.generation.image_files import add_png, assemble_npz
from pipeline.models.noise import BLOCK
from pipeline.models.sampling import Images
from pipeline.runtime.errors import DataError, GenerationError
from pipeline.runtime.files import sync_folder, write_atomic
from pipeline.runtime.ranks import gather, on_rank_zero
from pipeline.runtime.signals import Agreement, received
from pipeline.runtime.work_folder import WorkFolder

RECORD_NAME = "generated.json"
WORK_FOLDER = ".generate"
INFORMATIVE = ("snapshot", "torch", "device")
"""Keys of the record that may differ from those of a complete set."""
MOST_BLOCKS = 16
Add = Callable[[int, NDArray[np.uint8]], object]
"""Appends images (n, H, W, C) uint8 to a part, given the row of the first of them."""


@dataclass(frozen=True)
class ImageSet:
    """A set of images to write.

    Args:
        out: the folder, or the file of an npz.
        format: ``png``, ``npz`` or ``shards``.
        num: number of images; image i is ``images(i, i + 1)``.
        shape: (H, W, C) of each image.
        record: everything that decides the pixels, as JSON; kept with the set.
        label: returns the class of an image, which is written into shards; None = no class.
    """

    out: Path
    format: str
    num: int
    shape: tuple[int, int, int]
    record: dict[str, Any] = field(default_factory=dict)
    label: Callable[[int], int | None] = lambda _: None

    @property
    def unfinished(self) -> Path:
        """The folder in which the set is written."""
        return self.out.with_name(f"{self.out.name}.tmp")

    @property
    def work(self) -> WorkFolder:
        """The records of what is written; a resumed command may name the snapshot otherwise."""
        path = self.unfinished / WORK_FOLDER
        return WorkFolder(path, self.out, self.record, free={"snapshot"})

    @property
    def blocks_per_part(self) -> int:
        """Blocks of ``BLOCK`` images in a part: 16 parts of a small set, 1024 images of a large."""
        return min(MOST_BLOCKS, -(-self.num // (16 * BLOCK)))

    def parts(self) -> list[range]:
        """Return the rows of each part."""
        size = self.blocks_per_part * BLOCK
        return [range(k, min(k + size, self.num)) for k in range(0, self.num, size)]


def write(
    job: ImageSet,
    images: Images,
    accelerator: Accelerator,
    advance: Callable[[int], None] = lambda _: None,
) -> str:
    """Write the missing parts of a set; every rank calls it.

    Args:
        job: the same on all ranks.
        images: returns the rows [start, stop), which lie within one block of ``BLOCK`` rows.
        accelerator: the accelerator of this rank.
        advance: called with the number of images done, in total at most ``job.num``.

    Returns:
        ``"written"``, ``"complete"`` if the set was complete before, or ``"stopped"`` by a signal.

    Raises:
        UserError: on all ranks; ``out`` holds something else, or it cannot be written.
    """
    agreement = Agreement(accelerator.num_processes)
    with contextlib.ExitStack() as held:
        missing = on_rank_zero(accelerator, lambda: _begin(job, held))
        if missing is None:
            return "complete"
        parts = job.parts()
        advance(job.num - sum(len(parts[k]) for k in missing))
        stopped, failure = _write_parts(job, missing, images, accelerator, agreement, advance)
        agreement.close()
        for message in filter(None, gather(accelerator, failure)):
            raise GenerationError(message)
        if not stopped:
            on_rank_zero(accelerator, lambda: _finish(job), lengthy=True)
        return "stopped" if stopped else "written"


def _write_parts(
    job: ImageSet,
    missing: list[int],
    images: Images,
    accelerator: Accelerator,
    agreement: Agreement,
    advance: Callable[[int], None],
) -> tuple[bool, str]:
    """Write parts until all are finished, or a rank stops or fails.

    All ranks return after the same block.

    Returns:
        (whether a signal stopped it, the message of this rank's failure or "").
    """
    parts, world, failure = job.parts(), accelerator.num_processes, ""
    for turn in range(0, len(missing), world):
        numbers = missing[turn : turn + world]
        mine = numbers[accelerator.process_index :][:1]  # none on some ranks in the last turn
        part = _write_part(job, mine[0], images) if mine else iter(())
        for block in range(job.blocks_per_part):
            if not failure:
                try:
                    next(part, None)
                except OSError as error:
                    failure = str(job.work.unwritable(error))
            stop, failed = agreement.agree(received() is not None, flag=bool(failure))
            if stop or failed:
                return stop and not failed, failure
            advance(sum(len(parts[k][block * BLOCK : (block + 1) * BLOCK]) for k in numbers))
    return False, failure


def _write_part(job: ImageSet, number: int, images: Images) -> Iterator[None]:
    """Write one block of images per ``next()``; the last one marks the part as finished."""
    part = job.parts()[number]
    with _part_writer(job, number) as add:
        for start in range(part.start, part.stop, BLOCK):
            if start > part.start:
                yield
            add(start, images(start, min(start + BLOCK, part.stop)))
    job.work.mark(_marker(number))
    yield


# -- the three formats --------------------------------------------------------------------------


@contextlib.contextmanager
def _part_writer(job: ImageSet, number: int) -> Iterator[Add]:
    """Open a part for writing; after the block its bytes are on disk."""
    if job.format == "png":
        yield lambda first, images: add_png(job.unfinished, first, images)
        sync_folder(job.unfinished)
    elif job.format == "shards":
        with write_shard(job.unfinished / shard_name(number), "png") as shard:

            def add(first: int, images: NDArray[np.uint8]) -> None:
                for row, pixels in enumerate(images, first):
                    label = job.label(row)
                    shard.add(f"{row:08d}", pixels, NO_LABEL if label is None else label)

            yield add
    else:
        with _raw(job, number).open("wb", buffering=1 << 20) as file:
            yield lambda _, images: file.write(images.tobytes())
            file.flush()
            os.fsync(file.fileno())


# -- the folder in which the set is written -----------------------------------------------------


def _begin(job: ImageSet, held: contextlib.ExitStack) -> list[int] | None:
    """Lock the work folder; returns the parts that are missing, None if the set is complete."""
    if job.out.exists() and not (job.out.is_dir() and not any(job.out.iterdir())):
        found = _record_at(job)
        if not found:
            raise GenerationError(f"--out ({job.out}): holds something else. Give another --out.")
        job.work.refuse_differences(found, job.out, free=INFORMATIVE)
        _refuse_gaps(job)
        shutil.rmtree(_left_at_the_end(job), ignore_errors=True)  # after a kill at the very end
        return None
    if job.out.is_dir() and job.format == "npz":
        raise GenerationError(f"--out ({job.out}): is a folder; --format npz writes a file.")
    if os.path.ismount(job.out) or job.out == Path.cwd():
        kind = "a mount point" if os.path.ismount(job.out) else "the current folder"
        raise GenerationError(
            f"--out ({job.out}): is {kind}, which cannot be replaced. Name a new folder in it."
        )
    if not job.work.begun and _is_foreign(job.unfinished):
        raise GenerationError(
            f"--out ({job.out}): is written in {job.unfinished}, which holds something else. Move "
            "that away, or give another --out."
        )
    held.enter_context(job.work.hold())
    try:
        job.work.begin()
    except OSError as error:
        raise job.work.unwritable(error) from None
    return _missing(job)


def _is_foreign(folder: Path) -> bool:
    """Return whether a folder holds something else than the work folder, which is made first."""
    if folder.is_dir():
        return any(path.name != WORK_FOLDER for path in folder.iterdir())
    return folder.exists()


def _finish(job: ImageSet) -> None:
    """Check that every part is present, add the record, and rename the set to ``out``."""
    if missing := _missing(job):
        raise GenerationError(
            f"--out ({job.out}): {len(missing)} of {len(job.parts())} parts cannot be seen by rank "
            "0. With several nodes it must be on a file system that they share."
        )
    try:
        if job.format == "npz":
            joined = job.unfinished / "joined.npz"
            raw = [_raw(job, k) for k in range(len(job.parts()))]
            assemble_npz(joined, raw, (job.num, *job.shape), job.record)
            os.replace(joined, job.out)
        else:
            if job.format == "shards":
                scans = [scan(job.unfinished / shard_name(k)) for k in range(len(job.parts()))]
                write_index(job.unfinished, scans, job.shape, job.record)
            else:
                record = json.dumps(job.record, indent=1).encode()
                write_atomic(job.unfinished / RECORD_NAME, record)
            os.replace(job.unfinished, job.out)
        sync_folder(job.out.parent)
    except OSError as error:
        raise job.work.unwritable(error) from None
    shutil.rmtree(_left_at_the_end(job), ignore_errors=True)


def _left_at_the_end(job: ImageSet) -> Path:
    """Return the folder to remove when the set has its name."""
    if job.format == "npz" and job.work.path.is_dir():
        return job.unfinished
    return job.out / WORK_FOLDER


def _refuse_gaps(job: ImageSet) -> None:
    """Raise ``GenerationError`` if files of a complete set were removed."""
    wanted: Iterable[str] = ()
    if job.format == "png":
        wanted = (f"{row:08d}.png" for row in range(job.num))
    elif job.format == "shards":
        wanted = (shard_name(k) for k in range(len(job.parts())))
    present = {path.name for path in job.out.iterdir()} if job.out.is_dir() else set()
    if missing := [name for name in wanted if name not in present]:
        raise GenerationError(
            f"--out ({job.out}): {len(missing)} files of the set are missing, the first is "
            f"{missing[0]}. Give another --out, or remove what is left."
        )


def _record_at(job: ImageSet) -> dict[str, Any]:
    """Return the record of the set at ``out``; {} if it is no set of this format."""
    try:
        if job.format == "npz":
            with np.load(job.out, allow_pickle=False) as archive:
                found = json.loads(str(archive["made_by"]))
        elif job.format == "shards":
            found = read_index(str(job.out)).made_by
        else:
            found = json.loads((job.out / RECORD_NAME).read_text())
    except (OSError, ValueError, KeyError, EOFError, TypeError, RecursionError, DataError):
        return {}
    except (zipfile.BadZipFile, zlib.error):
        return {}
    return found if isinstance(found, dict) else {}


def _missing(job: ImageSet) -> list[int]:
    """Return the numbers of the parts that are not finished."""
    return [int(part) for part in job.work.unfinished(map(_marker, range(len(job.parts()))))]


def _marker(number: int) -> str:
    return f"{number:06d}"


def _raw(job: ImageSet, number: int) -> Path:
    return job.work.path / f"{number:06d}.raw"
