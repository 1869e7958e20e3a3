"""Images -> shards: cropped, resized, shuffled and packed into indexed WebDataset tars.

    python -m pipeline.prepare fashion-mnist --out data/fashion_32 --size 32
    python -m pipeline.prepare ~/photos --out data/photos_64 --size 64   # folder or zip of images
    python -m pipeline.prepare data/tars             # index tars of another tool where they are
    python -m pipeline.prepare data/tars --out data/tars_64 --size 64    # or make smaller ones
    python -m pipeline.prepare 's3://bucket/train-{000..127}.tar' --index train.json   # elsewhere
    python -m pipeline.prepare --verify data/photos_64

Several machines share the work when each runs the command with its own --part: 0/8, 1/8, ... 7/8.
The machine that ends last writes the index.

To continue after an interruption, run the same command again. The bytes depend only on the source
and the options, not on the number of workers or interruptions. A folder with an index.json is
complete. Images that cannot be read are listed in skipped.txt.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from os.path import realpath
from pathlib import Path

import numpy as np
from PIL import ImageColor

from pipeline.config.schema import DCGAN_SIZES, SIZES
from pipeline.data.audit import index_tars, verify
from pipeline.data.borders import (
    has_tars,
    index_file,
    local_folder,
    local_path,
    part,
    path_of,
    require_apart,
    require_writable,
    say_models_of,
)
from pipeline.data.cache import check_shards
from pipeline.data.packing import (
    WORK_FOLDER,
    Job,
    Packed,
    begin,
    finished,
    hold,
    num_unfinished,
    pack,
    stale_shards,
    tar_bytes,
)
from pipeline.data.preview import PREVIEW_NAME, write_preview
from pipeline.data.shards import INDEX_NAME, Index, read_index, write_index
from pipeline.data.skipped import SKIPPED_NAME, SKIPPED_SUM, account, listed_types, write_list
from pipeline.data.source import Choice, Source
from pipeline.data.sources import find
from pipeline.data.squares import FITS, Square
from pipeline.runtime.arguments import HelpFormatter, adder, integer, number, seed
from pipeline.runtime.console import printable, progress, say
from pipeline.runtime.errors import DataError, UserError, exit_on_user_error
from pipeline.runtime.host import cores
from pipeline.runtime.process_pool import map_in_processes
from pipeline.runtime.signals import exit_on_interrupt
from pipeline.runtime.work_folder import SETTINGS_NAME, FolderInUse

FILES = "source_files"
"""Key of the index: the record of the files of each shard."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.prepare", description=__doc__, formatter_class=HelpFormatter
    )
    add, pixels = adder(parser), integer(1, 65536)
    source = (
        "what to pack: fashion-mnist, a folder, a zip archive, or tars, which are indexed where "
    )
    source += "they are unless --out is given; docs/data.md has the whole list"
    add("source SOURCE", source, nargs="?", type=path_of)
    out = "write the shards into this folder, a new one or that of an interrupted prepare"
    add("--out DIR", out, type=local_folder)
    add("--index FILE", "write the index of tars into this file; they may be behind URLs")
    add(
        "--size", "make images of this height and width in pixels", type=integer(*SIZES), default=64
    )
    channels = "make gray (1) or RGB (3) images (default: 1 for IDX files, else 3)"
    add("--channels", channels, type=int, choices=(1, 3))
    formats = "store images so: npy decodes fastest, png is lossless and smaller, jpg is smallest"
    add("--format", formats, choices=("npy", "png", "jpg"), default="npy")
    background = "put this colour behind transparent pixels, e.g. #ff8800"
    add("--background COLOUR", background, default="white")
    add("--seed N", "shuffle the whole set with this seed", type=seed, default=0)
    add("--shard-mib N", "make shards of about N MiB", type=number(0.001, 65536), default=32)
    add("--workers N", "pack with N processes", type=integer(1, 1024), default=cores())
    add("--part I/N", "pack only part I (0 to N-1) of N, e.g. 0/8; see above", type=part)
    strict = "fail unless every file of SOURCE is an image that is used as it is stored"
    add("--strict", strict, action="store_true")
    fit = "make an image square: take the central square, pad it with bars of the background, or "
    add("--fit", fit + "stretch its sides", choices=tuple(FITS), default="crop")
    crop = "cut out the central N x N pixels first; 0 cuts nothing"
    add("--crop N", crop, type=pixels, default=0)
    smallest = "leave out images with a side of fewer pixels"
    add("--min-size N", smallest, type=pixels, default=0)
    add("--split NAME", "use train, test, a folder of SOURCE, or all (IDX files: train by default)")
    add("--image-field FIELD", "use this image of each sample, e.g. left.jpg (default: all)")
    label = "take the label of a sample from here, e.g. label (default: the usual places)"
    add("--label-field FIELD", label)
    add("--idx FOLDER", "read the IDX files of fashion-mnist from this folder", type=path_of)
    add("--no-download", "never use the network for fashion-mnist", action="store_true")
    verify = "check every checksum of the shards in this folder, and decode every sample"
    add("--verify DIR", verify, type=local_path)
    options = parser.parse_args(arguments)
    if (options.verify is None) == (options.source is None):
        parser.error("give either SOURCE, with --out DIR, or --verify DIR")
    if options.idx is not None and options.source != "fashion-mnist":
        parser.error(f"--idx belongs to fashion-mnist; SOURCE is {options.source}")
    try:
        options.colour = ImageColor.getrgb(options.background)[:3]
    except ValueError:
        parser.error(f"--background ({options.background}): must be a colour: white, #ff8800, ...")
    return options


def prepare(options: argparse.Namespace) -> str:
    """Pack a source, or index tars where they are; returns the summary for the user."""
    folder = Path(options.source)
    if file := index_file(options.index, options.source, options.out):
        done = index_tars(options.source, options.workers, file)
        return f"{done}\ntrain with: data.shards={file}"
    if has_tars(folder):
        if (folder / WORK_FOLDER / SETTINGS_NAME).exists() and not (folder / INDEX_NAME).exists():
            raise UserError(
                f"SOURCE ({folder}): holds the shards of an interrupted prepare. Run the command "
                "again that began it."
            )
        if options.out is None or realpath(options.out) == realpath(folder):
            require_writable(folder)
            return index_tars(options.source, options.workers)
    if options.out is None:
        raise UserError("--out: is missing. Give the folder to write the shards into.")
    out: Path = options.out
    require_apart(out, folder)
    say_models_of(options.size)
    choice = Choice(
        split=options.split,
        idx=options.idx,
        download=not options.no_download,
        image_field=options.image_field,
        label_field=options.label_field,
    )
    source = find(options.source, choice)
    job = _job(source, out, options)
    if options.part is None:
        return _prepare_all(job, options)
    unfinished = _prepare_part(job, options)
    packed = f"part {options.part[0]}/{options.part[1]} is packed"
    if unfinished:
        return f"{packed}; {unfinished} of {job.num_shards} shards are left to other parts"
    try:
        return _prepare_all(job, options)
    except FolderInUse:
        return f"{packed}; another part completes {out}"


def _prepare_part(job: Job, options: argparse.Namespace) -> int:
    """Pack the shards of one part; returns how many shards of the set are unfinished then."""
    part, parts = options.part
    numbers = range(part, job.num_shards, parts)
    while not (job.work.begun or job.is_complete):
        try:
            with hold(job):
                begin(job)
        except FolderInUse:  # another part is doing the same
            time.sleep(0.2)
    with hold(job, numbers):
        if job.is_complete:
            return 0
        begin(job)
        _pack(job, numbers, options.workers)
    # Counted without the lock: of two parts that end together, the one that is still cleaning up
    # would keep the other from completing the set, and leave that to it.
    unfinished = num_unfinished(job)
    return 0 if job.is_complete else unfinished


def _prepare_all(job: Job, options: argparse.Namespace) -> str:
    """Pack the shards that are missing and write the index; returns the summary."""
    out = job.out
    with hold(job):
        if job.is_complete:
            index, source = _read_complete(job), job.source
            account(index.made_by, len(source.names), out, options.strict)
            if not (out / PREVIEW_NAME).exists():
                write_preview(index, out / PREVIEW_NAME)
            return f"already complete, nothing to do: {index.num_samples} samples in {out}"
        begin(job)
        index = _pack_all(job, options)
    size, _, channels = index.shape
    labelled = (index.table["label"] >= 0).all()
    labels = f", {len(np.unique(index.table['label']))} classes" if labelled else ""
    return (
        f"{index.num_samples} samples in {len(index.shards)} shards, "
        f"{'x'.join(map(str, index.shape))} {index.field}{labels}: {out}\n"
        f"train with: data.shards={out} model.image_size={size} model.channels={channels}"
        + (" model.architecture=mlp" if size not in DCGAN_SIZES else "")
    )


def _job(source: Source, out: Path, options: argparse.Namespace) -> Job:
    channels = options.channels or (1 if source.kind == "idx" else 3)
    total = tar_bytes(options.size, channels, options.format) * len(source.names)
    shards = max(1, min(len(source.names), math.ceil(total / (options.shard_mib * 2**20))))
    if source.left_out:
        _note(f"not used: {listed_types(source.left_out)}")
    for line in source.said:
        _note(line)
    return Job(
        source=source,
        out=out,
        square=Square(
            options.size, channels, options.colour, options.fit, options.crop, options.min_size
        ),
        field=options.format,
        background=options.background,
        seed=options.seed,
        num_shards=shards,
    )


def _read_complete(job: Job) -> Index:
    """Return the index of a complete set, after a check that it is this job's."""
    index = read_index(str(job.out))
    if "source_sha256" not in index.made_by:
        raise UserError(
            f"--out ({job.out}): holds tars of another tool, says {INDEX_NAME}. Give another --out."
        )
    job.work.refuse_differences(index.made_by, INDEX_NAME, job.out, free={"source", "pillow"})
    check_shards(index, "auto")
    records = dict(enumerate(index.made_by.get(FILES, [])))
    if stale := stale_shards(job, records):
        raise UserError(
            f"--out ({job.out}): images of SOURCE were edited since they were packed, in "
            f"{len(stale)} of {len(index.shards)} shards; their names and sizes are the same. Give "
            f"another --out, or remove {job.out} to make the set anew."
        )
    return index


def _pack_all(job: Job, options: argparse.Namespace) -> Index:
    """Pack the shards that are missing, then write the index."""
    packed = _pack(job, range(job.num_shards), options.workers)
    done = [packed[number] for number in range(job.num_shards)]
    skipped = sorted(entry for one in done for entry in one.skipped)
    altered = sum((one.done for one in done), Counter[str]())
    listed = write_list(job.out, skipped)
    if len(skipped) == len(job.source.names):
        name, why = skipped[0]
        raise DataError(
            f"SOURCE ({job.source.location}): none of its {len(skipped)} images can be read, e.g. "
            f"{printable(name)}: {printable(why)}. All are listed in {job.out / SKIPPED_NAME}."
        )
    counts = {
        **{"skipped": len(skipped), SKIPPED_SUM: listed, "done": dict(altered)},
        **{"left_out": job.source.left_out, "said": job.source.said},
    }
    account(counts, len(job.source.names), job.out, options.strict)
    made_by, size = job.describe() | counts | {FILES: [one.files for one in done]}, job.square.size
    scans = [(one.shard, one.table, one.field) for one in done]
    index = write_index(job.out, scans, (size, size, job.square.channels), made_by)
    write_preview(index, job.out / PREVIEW_NAME)
    return index


def _pack(job: Job, numbers: Sequence[int], workers: int) -> dict[int, Packed]:
    """Pack those of the shards that are not finished; returns all of them, read and checked."""
    packed = finished(job, numbers)
    missing = [number for number in numbers if number not in packed]
    if packed:
        _note(f"continuing: {len(packed)} of {len(numbers)} shards are finished")
    if not missing:
        return packed
    total = sum(len(job.rows(number)) for number in missing)
    import webdataset  # noqa: F401  once, before the fork: it imports torch

    with progress("pack", total) as advance:
        map_in_processes(partial(pack, job), missing, workers, advance)
    packed = finished(job, numbers)
    if lost := len(numbers) - len(packed):
        raise DataError(
            f"--out ({job.out}): {lost} shards were changed while others were packed. Run the same "
            "command again: it packs them again."
        )
    return packed


def _note(text: str) -> None:
    say(f"note: {text}")


def main() -> None:
    """Run the command; exit code 2 on a user's mistake or a fault found, 128 + n on signal n."""
    options = parse()
    again = "" if options.verify else ": finished shards are kept, the same command continues"
    advice = f"--workers ({options.workers}): give fewer, or use a machine with more memory."
    with exit_on_user_error(advice), exit_on_interrupt(f"interrupted{again}"):
        print(verify(options.verify, options.workers) if options.verify else prepare(options))


if __name__ == "__main__":
    main()
