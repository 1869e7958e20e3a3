"""Many images on disk: PNG files, an npz or WebDataset shards, written by all ranks together.

A set is cut into parts, and which image is in which part follows from the number of images alone:
any number of processes and interruptions leads to the same bytes. All is written in ``OUT.tmp`` and
renamed when it is whole; parts that are finished there are not made again.

    OUT/00000000.png ... generated.json            png
    OUT                                            npz: arr_0 (N, H, W, C) uint8, made_by (JSON)
    OUT/shard-000000.tar ... index.json            shards, as of ``pipeline.prepare``
"""

from __future__ import annotations

import contextlib
import errno
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

from pipeline.data.shards import read_index, scan, shard_name, write_index
from pipeline.generation.image_files import Add, add_png, assemble_npz, tar
from pipeline.models.noise import BLOCK
from pipeline.models.sampling import Images
from pipeline.runtime.errors import DataError, GenerationError
from pipeline.runtime.files import sync_folder, write_atomic
from pipeline.runtime.locks import FileLock
from pipeline.runtime.ranks import gather, on_rank_zero
from pipeline.runtime.signals import Agreement, received

FORMATS = ("png", "npz", "shards")
RECORD_NAME = "generated.json"
WORK_FOLDER = ".generate"
FREE = ("snapshot", "torch", "device")  # said in the record, but no reason to refuse a whole set
MOST_BLOCKS = 16


@dataclass(frozen=True)
class ImageSet:
    """What is to be written, and where.

    Args:
        out: the folder, or the file of an npz.
        format: of ``FORMATS``.
        num: images; image i is ``images(i, i + 1)``.
        shape: (H, W, C) of each.
        record: everything that decides the pixels, as JSON; kept with the set.
        label: the class of an image, which goes into shards; None: it has none.
    """

    out: Path
    format: str
    num: int
    shape: tuple[int, int, int]
    record: dict[str, Any] = field(default_factory=dict)
    label: Callable[[int], int | None] = lambda _: None

    @property
    def work(self) -> Path:
        """Where it grows."""
        return self.out.with_name(f"{self.out.name}.tmp")

    @property
    def blocks_per_part(self) -> int:
        """Forward passes a part takes: sixteen parts of a small set, 1024 images of a large one."""
        return min(MOST_BLOCKS, -(-self.num // (16 * BLOCK)))

    def parts(self) -> list[range]:
        """The images of each part."""
        size = self.blocks_per_part * BLOCK
        return [range(k, min(k + size, self.num)) for k in range(0, self.num, size)]


def write(
    job: ImageSet,
    images: Images,
    accelerator: Accelerator,
    advance: Callable[[int], None] = lambda _: None,
) -> str:
    """Write what is missing of a set; called on all ranks.

    Args:
        job: the same on all ranks.
        images: rows [start, stop) within one block of ``sampling.BLOCK``.
        accelerator: of this rank.
        advance: called with the number of images done, in total at most ``job.num``.

    Returns:
        ``"written"``, ``"complete"`` if it was there already, ``"stopped"`` after a signal.

    Raises:
        GenerationError: on all ranks; something else is there, or it cannot be written.
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
    """(stopped by a signal, what went wrong on this rank); all ranks leave at the same block."""
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
                    failure = str(_unwritable(job, error))
            stop, failed = agreement.agree(received() is not None, flag=bool(failure))
            if stop or failed:
                return stop and not failed, failure
            advance(sum(len(parts[k][block * BLOCK : (block + 1) * BLOCK]) for k in numbers))
    return False, failure


def _write_part(job: ImageSet, number: int, images: Images) -> Iterator[None]:
    """One block of images at each step; the last step marks the part as finished."""
    part = job.parts()[number]
    with _writer(job, number) as add:
        for start in range(part.start, part.stop, BLOCK):
            if start > part.start:
                yield
            add(start, images(start, min(start + BLOCK, part.stop)))
    write_atomic(_marker(job, number), b"")
    yield


# -- the three formats --------------------------------------------------------------------------


@contextlib.contextmanager
def _writer(job: ImageSet, number: int) -> Iterator[Add]:
    """A function (first row, images) that adds to a part; its bytes are on disk after the block."""
    if job.format == "png":
        yield lambda first, images: add_png(job.work, first, images)
        sync_folder(job.work)
        return
    path = job.work / shard_name(number) if job.format == "shards" else _raw(job, number)
    with path.open("wb", buffering=1 << 20) as file:
        if job.format == "shards":
            with tar(file, job.label) as add:
                yield add
        else:

            def add_raw(_: int, images: NDArray[np.uint8]) -> None:
                file.write(images.tobytes())

            yield add_raw
        file.flush()
        os.fsync(file.fileno())


# -- the folder it grows in ---------------------------------------------------------------------


def _begin(job: ImageSet, held: contextlib.ExitStack) -> list[int] | None:
    """Parts that are missing, None if the set is complete; holds the work folder's lock."""
    if job.out.exists() and not (job.out.is_dir() and not any(job.out.iterdir())):
        _refuse_differences(job, job.out, _record_at(job), free=FREE)
        _refuse_gaps(job)
        shutil.rmtree(_left_at_the_end(job), ignore_errors=True)  # a kill at the very end
        return None
    if job.out.is_dir() and job.format == "npz":
        raise GenerationError(f"--out ({job.out}): is a folder; --format npz writes a file.")
    if os.path.ismount(job.out) or job.out == Path.cwd():
        kind = "a mount point" if os.path.ismount(job.out) else "the current folder"
        raise GenerationError(
            f"--out ({job.out}): is {kind}, which cannot be replaced; name a new folder in it."
        )
    settings = job.work / WORK_FOLDER / "settings.json"
    if not settings.exists() and _is_foreign(job.work):
        raise GenerationError(
            f"--out ({job.out}): would grow in {job.work}, which holds something else; move that "
            "away, or give another name."
        )
    try:
        settings.parent.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(FileLock(settings.parent / "lock"))
        if not lock.acquire(wait=False):
            raise GenerationError(
                f"--out ({job.out}): another process is writing {job.work}; wait for it to end, or "
                "give another name."
            )
        if settings.exists():
            begun = json.loads(settings.read_text())
            if not isinstance(begun, dict):
                raise ValueError
            _refuse_differences(job, job.work, begun, free=FREE[:1])
        else:
            write_atomic(settings, json.dumps(job.record).encode())
    except OSError as error:
        raise _unwritable(job, error) from None
    except (ValueError, RecursionError):
        raise GenerationError(f"{settings}: is damaged; remove {job.work}.") from None
    return [k for k in range(len(job.parts())) if not _marker(job, k).exists()]


def _is_foreign(work: Path) -> bool:
    """Whether something not begun by this command is there: its own folder comes first of all."""
    if work.is_dir():
        return any(path.name != WORK_FOLDER for path in work.iterdir())
    return work.exists()


def _finish(job: ImageSet) -> None:
    """Check that every part is there, add the record, and give the set its name."""
    lost = [k for k in range(len(job.parts())) if not _marker(job, k).exists()]
    if lost:
        raise GenerationError(
            f"--out ({job.out}): {len(lost)} of {len(job.parts())} parts cannot be seen by the "
            "first process: with several machines it must be on a file system they all share."
        )
    try:
        if job.format == "npz":
            whole = job.work / "whole.npz"
            raw = [_raw(job, k) for k in range(len(job.parts()))]
            assemble_npz(whole, raw, (job.num, *job.shape), job.record)
            os.replace(whole, job.out)
        else:
            if job.format == "shards":
                scans = [scan(job.work / shard_name(k)) for k in range(len(job.parts()))]
                write_index(job.work, scans, job.shape, job.record)
            else:
                write_atomic(job.work / RECORD_NAME, json.dumps(job.record, indent=1).encode())
            os.replace(job.work, job.out)
        sync_folder(job.out.parent)
    except OSError as error:
        raise _unwritable(job, error) from None
    shutil.rmtree(_left_at_the_end(job), ignore_errors=True)


def _left_at_the_end(job: ImageSet) -> Path:
    """What is removed when the set has its name."""
    if job.format == "npz" and (job.work / WORK_FOLDER).is_dir():
        return job.work
    return job.out / WORK_FOLDER


def _refuse_gaps(job: ImageSet) -> None:
    """A folder that somebody took files from is not the whole set."""
    wanted: Iterable[str] = ()
    if job.format == "png":
        wanted = (f"{row:08d}.png" for row in range(job.num))
    elif job.format == "shards":
        wanted = (shard_name(k) for k in range(len(job.parts())))
    there = {path.name for path in job.out.iterdir()} if job.out.is_dir() else set()
    if missing := [name for name in wanted if name not in there]:
        raise GenerationError(
            f"--out ({job.out}): files are gone from there, {len(missing)} of them, the first is "
            f"{missing[0]}; give another --out, or remove what is left."
        )


def _record_at(job: ImageSet) -> dict[str, Any]:
    """The record of what lies at ``out``; {} if it is nothing of ours."""
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


def _refuse_differences(
    job: ImageSet, where: Path, found: dict[str, Any], free: tuple[str, ...]
) -> None:
    if not found:
        raise GenerationError(f"--out ({where}): holds something else. Give another --out.")
    remedy = f"Give another --out, or remove {where}."
    differing = [
        f"{key}: {found.get(key)} there, {value} now"
        for key, value in job.record.items()
        if key not in free and found.get(key) != value
    ]
    if differing:
        lines = "\n  ".join(differing)
        raise GenerationError(f"--out ({where}): holds other images:\n  {lines}\n{remedy}")


def _unwritable(job: ImageSet, error: OSError) -> GenerationError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    return GenerationError(
        f"--out ({job.out}): cannot be written: {reason}. Make room or give another place; the "
        "same command continues with the parts that are missing."
    )


def _marker(job: ImageSet, number: int) -> Path:
    return job.work / WORK_FOLDER / f"{number:06d}"


def _raw(job: ImageSet, number: int) -> Path:
    return job.work / WORK_FOLDER / f"{number:06d}.raw"
