"""Images -> shards: cropped, resized, shuffled and packed into indexed WebDataset tars.

    python -m pipeline.prepare fashion-mnist --out data/fashion_32 --size 32
    python -m pipeline.prepare ~/photos --out data/photos_64 --size 64   # folder or zip of images
    python -m pipeline.prepare data/tars             # index tars of another tool where they are
    python -m pipeline.prepare data/tars --out data/tars_64 --size 64    # or make smaller ones
    python -m pipeline.prepare 's3://bucket/train-{000..127}.tar' --index train.json   # elsewhere
    python -m pipeline.prepare --verify data/photos_64
    python -m pipeline.prepare --upgrade data/photos_64  # an index of an earlier version

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
import contextlib
import math
import time
from collections.abc import Sequence
from functools import partial
from os.path import realpath
from pathlib import Path

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
from pipeline.data.index_writer import upgrade
from pipeline.data.merging import FILES, LostShards, merge
from pipeline.data.packing import (
    WORK_FOLDER,
    Job,
    begin,
    finished_numbers,
    hold,
    num_unfinished,
    pack,
    stale_shards,
    tar_bytes,
)
from pipeline.data.preview import PREVIEW_NAME, write_preview
from pipeline.data.shards import INDEX_NAME, Index, read_index
from pipeline.data.skipped import account, listed_types
from pipeline.data.source import Choice, Source
from pipeline.data.sources import find
from pipeline.data.squares import FITS, Square
from pipeline.runtime.arguments import HelpFormatter, adder, integer, number, seed
from pipeline.runtime.console import progress, say
from pipeline.runtime.errors import DataError, UserError, exit_on_user_error
from pipeline.runtime.host import cores
from pipeline.runtime.process_pool import map_in_processes
from pipeline.runtime.signals import exit_on_interrupt
from pipeline.runtime.work_folder import SETTINGS_NAME, FolderInUse


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
    newer = "give the index of the shards in DIR, which an earlier version made, what this one adds"
    add("--upgrade DIR", newer, type=local_path)
    options = parser.parse_args(arguments)
    if [options.verify, options.source, options.upgrade].count(None) != 2:
        parser.error("give either SOURCE, with --out DIR, or --verify DIR, or --upgrade DIR")
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
        return _prepare_all(job, options, packed=True)
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


def _prepare_all(job: Job, options: argparse.Namespace, *, packed: bool = False) -> str:
    """Pack the shards that are missing and write the index; returns the summary.

    ``packed``: all have a record, and those who packed them have compared their bytes.
    """
    out = job.out
    with hold(job):
        if job.is_complete:
            index, source = _read_complete(job), job.source
            account(index.made_by, len(source.names), out, options.strict)
            if not (out / PREVIEW_NAME).exists():
                write_preview(index, out / PREVIEW_NAME)
            return f"already complete, nothing to do: {index.num_samples} samples in {out}"
        begin(job)
        index = _pack_all(job, options, packed=packed)
    size, _, channels = index.shape
    labels = f", {len(index.label_counts)} classes" if min(index.label_counts) >= 0 else ""
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


def _pack_all(job: Job, options: argparse.Namespace, *, packed: bool) -> Index:
    """Pack the shards that are missing, then write the index."""
    if packed:
        with contextlib.suppress(LostShards):
            return merge(job, options.strict)
    _pack(job, range(job.num_shards), options.workers)
    return merge(job, options.strict)


def _pack(job: Job, numbers: Sequence[int], workers: int) -> None:
    """Pack those of the shards that are not finished; all of them are read and checked."""
    done = finished_numbers(job, numbers)
    missing = [number for number in numbers if number not in done]
    if done:
        _note(f"continuing: {len(done)} of {len(numbers)} shards are finished")
    if not missing:
        return
    total = sum(len(job.rows(number)) for number in missing)
    import webdataset  # noqa: F401  once, before the fork: it imports torch

    with progress("pack", total) as advance:
        map_in_processes(partial(pack, job), missing, workers, advance)
    if lost := len(numbers) - len(finished_numbers(job, numbers)):
        raise DataError(
            f"--out ({job.out}): {lost} shards were changed while others were packed. Run the same "
            "command again: it packs them again."
        )


def _note(text: str) -> None:
    say(f"note: {text}")


def main() -> None:
    """Run the command; exit code 2 on a user's mistake or a fault found, 128 + n on signal n."""
    options = parse()
    again = ": finished shards are kept, the same command continues" if options.source else ""
    advice = f"--workers ({options.workers}): give fewer, or use a machine with more memory."
    with exit_on_user_error(advice), exit_on_interrupt(f"interrupted{again}"):
        if options.upgrade:
            print(upgrade(str(options.upgrade)))
        else:
            print(verify(options.verify, options.workers) if options.verify else prepare(options))


if __name__ == "__main__":
    main()
