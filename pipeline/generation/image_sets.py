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
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

from pipeline.data.index_writer import write_index
from pipeline.data.shards import shard_name
from pipeline.data.tar_scan import scan
from pipeline.generation.finished_sets import (
    RECORD_NAME,
    read_record,
    record_name,
    record_of,
    refuse_changes,
)
from pipeline.generation.image_files import assemble_npz, part_writer
from pipeline.generation.image_set import WORK_FOLDER, ImageSet, marker_of
from pipeline.models.noise import BLOCK
from pipeline.models.sampling import Images
from pipeline.runtime.documents import write_document
from pipeline.runtime.errors import GenerationError
from pipeline.runtime.files import sync_folder
from pipeline.runtime.ranks import gather, on_rank_zero
from pipeline.runtime.signals import Agreement, received
from pipeline.runtime.work_folder import SETTINGS_NAME, FileSum, remove_folder

INFORMATIVE = ("snapshot", "torch", "device")
"""Keys of the record that may differ from those of a complete set."""


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
        missing = on_rank_zero(accelerator, lambda: _begin(job, held), lengthy=True)
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
    sums: dict[str, FileSum] = {}
    with part_writer(job, number, sums) as add:
        for start in range(part.start, part.stop, BLOCK):
            if start > part.start:
                yield
            add(start, images(start, min(start + BLOCK, part.stop)))
    job.work.mark(marker_of(number), sums)
    yield


# -- the folder in which the set is written -----------------------------------------------------


def _begin(job: ImageSet, held: contextlib.ExitStack) -> list[int] | None:
    """Lock the work folder; returns the parts that are missing, None if the set is complete."""
    if job.out.exists() and not (job.out.is_dir() and not any(job.out.iterdir())):
        found = read_record(job)
        job.work.refuse_differences(found, record_name(job), job.out, free=INFORMATIVE)
        refuse_changes(job, found)
        remove_folder(_left_at_the_end(job))  # after a kill at the very end
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
            f"--out ({job.out}): is written in {job.unfinished}, which holds something else: it "
            f"has no {WORK_FOLDER}/{SETTINGS_NAME}. Move that away, or give another --out."
        )
    held.enter_context(job.work.hold())
    try:
        job.work.begin()
        finished = job.finished()
    except OSError as error:
        raise job.work.unwritable(error) from None
    return [part for part in range(len(job.parts())) if part not in finished]


def _is_foreign(folder: Path) -> bool:
    """Return whether a folder holds something else than the work folder, which is made first."""
    if folder.is_dir():
        return any(path.name != WORK_FOLDER for path in folder.iterdir())
    return folder.exists()


def _finish(job: ImageSet) -> None:
    """Check every part, add the record, and rename the set to ``out``."""
    try:
        finished = job.finished()
        if lost := len(job.parts()) - len(finished):
            raise GenerationError(
                f"--out ({job.out}): {lost} of {len(job.parts())} parts were changed while others "
                "were written, or cannot be seen by rank 0. Run the same command again: it makes "
                "them again. With several nodes --out must be on a file system that they share."
            )
        record = record_of(job, finished)
        if job.format == "npz":
            joined = job.unfinished / "joined.npz"
            joined.unlink(missing_ok=True)  # of a killed process
            raw = [
                (job.parts_folder / n, s) for k in sorted(finished) for n, s in finished[k].items()
            ]
            assemble_npz(joined, raw, (job.num, *job.shape), record)
            os.replace(joined, job.out)
        else:
            if job.format == "shards":
                scans = [scan(job.unfinished / shard_name(k)) for k in sorted(finished)]
                write_index(job.unfinished, scans, job.shape, record)
            else:
                write_document(job.unfinished / RECORD_NAME, record, indent=1)
            os.replace(job.unfinished, job.out)
        sync_folder(job.out.parent)
    except OSError as error:
        raise job.work.unwritable(error) from None
    remove_folder(_left_at_the_end(job))


def _left_at_the_end(job: ImageSet) -> Path:
    """Return the folder to remove when the set has its name."""
    if job.format == "npz" and job.work.path.is_dir():
        return job.unfinished
    return job.out / WORK_FOLDER
