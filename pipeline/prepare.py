"""Images -> shards: cropped, resized, shuffled and packed into indexed WebDataset tars.

    python -m pipeline.prepare fashion-mnist --out data/fashion_32 --size 32
    python -m pipeline.prepare ~/photos --out data/photos_64 --size 64   # folder or zip of images
    python -m pipeline.prepare data/tars             # index tars of another tool, where they lie
    python -m pipeline.prepare data/tars --out data/tars_64 --size 64    # or make smaller ones
    python -m pipeline.prepare --verify data/photos_64

Many machines share the work when each runs the command with its own ``--part``: 0/8, 1/8, ... 7/8;
the one that ends last writes the index.

To continue after an interruption, run the same command again. The bytes written depend on the
source and the options alone, never on the number of workers or interruptions. A folder with an
``index.json`` is complete. An image that cannot be read is listed in ``skipped.txt``.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ImageColor

from pipeline.data.audit import index_tars, verify
from pipeline.data.cache import check_shards
from pipeline.data.packing import (
    SETTINGS_NAME,
    SKIPPED_NAME,
    WORK_FOLDER,
    FolderInUse,
    Job,
    Packed,
    begin,
    begun,
    finished,
    num_unfinished,
    pack,
    printable,
    refuse_differences,
    shared_work_folder,
    tar_bytes,
    work_folder,
)
from pipeline.data.shards import INDEX_NAME, Index, read_index, write_index
from pipeline.data.sources import Source, find
from pipeline.runtime.console import progress
from pipeline.runtime.errors import DataError, UserError, exit_on_user_error
from pipeline.runtime.files import write_atomic
from pipeline.runtime.process_pool import map_in_processes
from pipeline.runtime.signals import exit_on_interrupt

LISTED = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="fashion-mnist, a folder or a zip archive")
    add("--out", type=Path, metavar="DIR", help="folder of the shards")
    add("--size", type=int, default=64, help="height and width of the images (default 64)")
    add("--channels", type=int, choices=(1, 3), help="gray or RGB (default: 1 for IDX, else 3)")
    add(
        "--format",
        choices=("npy", "png", "jpg"),
        default="npy",
        help="npy: fastest; png: lossless and smaller; jpg: smallest (default npy)",
    )
    add("--background", default="white", help="colour behind transparent pixels (default white)")
    add("--seed", type=int, default=0, help="of the global shuffle (default 0)")
    add("--shard-mib", type=float, default=32.0, help="about the size of a shard (default 32)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add("--part", metavar="I/N", help="pack part I of N (0 to N-1), beside others that do theirs")
    add("--strict", action="store_true", help="fail when an image cannot be read")
    add("--split", choices=("train", "test"), default="train", help="of IDX files (default train)")
    add("--idx", metavar="FOLDER", help="where fashion-mnist's IDX files are")
    add("--no-download", action="store_true", help="never use the network for fashion-mnist")
    add("--verify", type=Path, metavar="DIR", help="check every checksum and decode every sample")
    options = parser.parse_args(arguments)
    if (options.verify is None) == (options.source is None):
        parser.error("give either SOURCE, with --out DIR, or --verify DIR")
    if options.idx is not None and options.source != "fashion-mnist":
        parser.error(f"--idx belongs to fashion-mnist; SOURCE is {options.source}")
    for name, value, low, high in (
        ("--size", options.size, 1, 4096),
        ("--workers", options.workers, 1, 1024),
        ("--shard-mib", options.shard_mib, 0.001, 65536),
        ("--seed", options.seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            parser.error(f"{name} ({value}): must be between {low} and {high}")
    if options.part is not None:
        numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", options.part)
        if numbers is None or not int(numbers[1]) < int(numbers[2]):
            parser.error(f"--part ({options.part}): must be I/N with I from 0 to N-1, like 0/8")
        options.part = int(numbers[1]), int(numbers[2])
    try:
        options.colour = ImageColor.getrgb(options.background)[:3]
    except ValueError:
        parser.error(f"--background ({options.background}): must be a colour: white, #ff8800, ...")
    return options


def prepare(options: argparse.Namespace) -> str:
    """Pack a source, or continue to, or index tars; returns what to tell the user at the end."""
    folder = Path(options.source).expanduser()
    if folder.is_dir() and any(folder.glob("*.tar")):
        if (folder / WORK_FOLDER / SETTINGS_NAME).exists() and not (folder / INDEX_NAME).exists():
            raise UserError(
                f"SOURCE ({folder}): an interrupted prepare lies there; finish it with the command "
                "that began it."
            )
        if options.out is None or options.out.expanduser().resolve() == folder.resolve():
            return index_tars(folder, options.workers)
    if options.out is None:
        raise UserError("--out: is missing; give the folder where the shards shall lie.")
    out = options.out.expanduser()
    if out.resolve() == folder.resolve():
        raise UserError(f"--out ({out}): must be another folder than SOURCE.")
    source = find(
        options.source, split=options.split, idx=options.idx, download=not options.no_download
    )
    job = _job(source, out, options)
    if options.part is None:
        return _prepare_all(job, options)
    left = _prepare_part(job, options)
    packed = f"part {options.part[0]}/{options.part[1]} is packed"
    if left:
        return f"{packed}; {left} of {job.num_shards} shards are left to other parts"
    try:
        return _prepare_all(job, options)
    except FolderInUse:
        return f"{packed}; another part completes {out}"


def _prepare_part(job: Job, options: argparse.Namespace) -> int:
    """Pack one part's shards; returns how many of the whole set are missing then."""
    part, parts = options.part
    mine = range(part, job.num_shards, parts)
    while not begun(job.out):
        try:
            with work_folder(job.out) as work:
                begin(job, work)
        except FolderInUse:  # another part is just doing the same
            time.sleep(0.2)
    with shared_work_folder(job.out, mine) as work:
        if (job.out / INDEX_NAME).exists():
            return 0
        begin(job, work)
        _pack(job, work, mine, options.workers)
    # Counted after the lock is gone: of two parts that end together, the one that still cleaned up
    # would stop the other from completing the set, and leave that to it.
    left = num_unfinished(job)
    return 0 if (job.out / INDEX_NAME).exists() else left


def _prepare_all(job: Job, options: argparse.Namespace) -> str:
    out = job.out
    with work_folder(out) as work:
        if (out / INDEX_NAME).exists():
            index = _complete(job)
            _report_skipped(index.made_by["skipped"], out, options.strict)
            return f"already complete, nothing to do: {index.num_samples} samples in {out}"
        begin(job, work)
        index = _pack_all(job, work, options)
    size, _, channels = index.shape
    labels = f", {len(np.unique(index.table['label']))} classes" if _labelled(index) else ""
    return (
        f"{index.num_samples} samples in {len(index.shards)} shards, "
        f"{'x'.join(map(str, index.shape))} {index.field}{labels}: {out}\n"
        f"train with: data.shards={out} model.image_size={size} model.channels={channels}"
    )


def _job(source: Source, out: Path, options: argparse.Namespace) -> Job:
    channels = options.channels or (1 if source.kind == "idx" else 3)
    total = tar_bytes(options.size, channels, options.format) * len(source.names)
    shards = max(1, min(len(source.names), math.ceil(total / (options.shard_mib * 2**20))))
    if source.ignored:
        types = ", ".join(f"{n} {suffix}" for suffix, n in sorted(source.ignored.items()))
        _note(f"files of other types ignored: {types}")
    return Job(
        source=source,
        out=out,
        size=options.size,
        channels=channels,
        field=options.format,
        background=options.background,
        colour=options.colour,
        seed=options.seed,
        num_shards=shards,
    )


def _complete(job: Job) -> Index:
    index = read_index(str(job.out))
    if "source_sha256" not in index.made_by:
        raise UserError(
            f"--out ({job.out}): holds indexed tars of another tool; give another folder."
        )
    refuse_differences(job, index.made_by, pillow=False)
    check_shards(index, "size")
    return index


def _pack_all(job: Job, work: Path, options: argparse.Namespace) -> Index:
    """Pack the shards that are missing, then publish the index: the folder is complete."""
    packed = _pack(job, work, range(job.num_shards), options.workers)
    done = [packed[number] for number in range(job.num_shards)]
    skipped = sorted(entry for one in done for entry in one.skipped)
    enlarged = sum(one.enlarged for one in done)
    if skipped:
        lines = [f"{printable(name)}\t{printable(why)}\n" for name, why in skipped]
        write_atomic(job.out / SKIPPED_NAME, "".join(lines).encode())
    if len(skipped) == len(job.source.names):
        name, why = skipped[0]
        raise DataError(
            f"SOURCE ({job.source.location}): none of its {len(skipped)} images can be read, e.g. "
            f"{printable(name)}: {printable(why)}. All are listed in {job.out / SKIPPED_NAME}."
        )
    _report_skipped(len(skipped), job.out, options.strict)
    if enlarged:
        _note(f"{enlarged} images are smaller than {job.size} px and were enlarged")
    made_by = job.describe() | {"skipped": len(skipped), "enlarged": enlarged}
    scans = [(one.shard, one.table, one.field) for one in done]
    return write_index(job.out, scans, (job.size, job.size, job.channels), made_by)


def _pack(job: Job, work: Path, numbers: Sequence[int], workers: int) -> dict[int, Packed]:
    """All these shards, packed now if they were not already."""
    packed = finished(job, work, numbers)
    missing = [number for number in numbers if number not in packed]
    if packed:
        _note(f"continuing: {len(packed)} of {len(numbers)} shards are finished")
    total = sum(len(job.rows(number)) for number in missing)
    if missing:
        import webdataset  # noqa: F401  once, before the fork: it imports torch
    with progress("pack", total) as advance:
        done = map_in_processes(partial(pack, job), missing, workers, advance)
    return packed | {one.number: one for one in done}


def _report_skipped(skipped: int, out: Path, strict: bool) -> None:
    """Warn about images that could not be read, or fail when every one must be."""
    if not skipped:
        return
    file = out / SKIPPED_NAME
    listed = file.read_text().splitlines() if file.exists() else []
    more = [f"... {len(listed) - LISTED} more in {file}"] if len(listed) > LISTED else []
    text = f"{skipped} images cannot be read, listed in {file}:\n  " + "\n  ".join(
        [line.replace("\t", ": ") for line in listed[:LISTED]] + more
    )
    if strict:
        raise DataError(f"--strict: {text}\nRepair or remove them, or leave out --strict.")
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _labelled(index: Index) -> bool:
    return bool((index.table["label"] >= 0).all())


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command; exit code 2 on a user's mistake or a fault found, 128 + n on signal n."""
    options = parse()
    again = "" if options.verify else ": finished shards are kept, the same command continues"
    with exit_on_user_error(), exit_on_interrupt(f"interrupted{again}"):
        print(verify(options.verify, options.workers) if options.verify else prepare(options))


if __name__ == "__main__":
    main()
