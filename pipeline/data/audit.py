"""Decode every sample of tars on disk, to verify a shard set or to index tars of another tool.

All faults are collected before an error is raised: to repair a set one needs the whole list.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.checksums import changes, open_shard
from pipeline.data.codecs import decoder, shape_of
from pipeline.data.colour import CONVERTED
from pipeline.data.index_writer import write_index
from pipeline.data.indexing import folder_of, survey_tar, tars_of
from pipeline.data.labels import NO_LABEL
from pipeline.data.locations import prepare_command
from pipeline.data.pictures import TURNED, DecodeError, alterations
from pipeline.data.preview import preview_of, write_preview
from pipeline.data.shards import INDEX_NAME, Index, read_index
from pipeline.data.skipped import listed_types
from pipeline.data.tar_scan import Scan, lines, number_classes, scan
from pipeline.data.tars import open_tar
from pipeline.runtime.console import progress, say
from pipeline.runtime.documents import open_regular
from pipeline.runtime.errors import DataError
from pipeline.runtime.process_pool import map_in_processes
from pipeline.runtime.text import printable

Shape = tuple[int, int, int]
LISTED_FAULTS = 1000


@dataclass
class TarReport:
    """The content of one tar, as a worker reports it."""

    faults: list[str] = field(default_factory=list)
    """A message for each fault."""
    shapes: Counter[Shape] = field(default_factory=Counter)
    """Number of images of each (H, W, C); only counted for a tar without an index."""
    examples: dict[Shape, str] = field(default_factory=dict)
    """The place of one image of each shape, for messages."""
    altered: Counter[str] = field(default_factory=Counter)
    """Number of images that the loader would not show as viewers do, by what is to be done."""
    scanned: Scan | None = None
    """The result of ``scan``; None if the tar cannot be read, or has an index."""


def verify(folder: Path, workers: int) -> str:
    """Check every checksum and decode every sample of a shard set; returns a one-line summary.

    Raises:
        DataError: there are faults; the message lists each with shard, key and offset.
    """
    faults: list[str] = []
    try:
        index = read_index(str(folder))
    except DataError as error:
        # Without a usable index the tars themselves can still be checked.
        faults.append(str(error))
        if not (tars := sorted(folder.glob("*.tar"))):
            raise
        reports = _audit(tars, workers, "verify", None)
    else:
        if index.is_remote:
            raise DataError(
                f"--verify ({folder}): its shards are in {index.location}. They are checked when "
                "they are downloaded."
            )
        reports = _audit([index.place_of(s) for s in index.shards], workers, "verify", index)
        listed = {shard.url for shard in index.shards}
        extra = sorted(path.name for path in folder.glob("[!.]*.tar") if path.name not in listed)
        faults += [f"{folder / name}: not in {INDEX_NAME}." for name in extra]
        altered = sum((one.altered for one in reports), Counter[str]())
        faults += _refusals(prepare_command(folder, "--out", "OTHER", "--size", "64"), altered)
    faults += [fault for one in reports for fault in one.faults]
    if faults:
        shown = faults[:LISTED_FAULTS]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        bad = sum(bool(one.faults) for one in reports)
        raise DataError(
            f"{folder}: {len(faults)} faults, {bad} of {len(reports)} shards damaged:\n  "
            + "\n  ".join(shown + more)
        )
    labels = index.label_counts
    classes = f"labels 0 to {max(labels)}" if min(labels) >= 0 else "not all labelled"
    return (
        f"ok: {index.num_samples} samples in {len(index.shards)} shards, "
        f"{'x'.join(map(str, index.shape))} {index.field}, {classes}; "
        "every checksum is right and every sample decodes"
    )


def index_tars(source: str | Path, workers: int, file: Path | None = None) -> str:
    """Index tars of other tools where they are; returns a summary.

    Args:
        source: a folder, or names of tars (``tars_of``).
        workers: number of processes.
        file: the index file; None = ``index.json`` beside the tars.

    Raises:
        DataError: tars or samples cannot be read, or images differ in size; all are listed.
    """
    tars = tars_of(str(source))
    if not tars:
        raise DataError(f"SOURCE ({source}): holds no tars.")
    folder = folder_of(tars[0])
    target = Path(source) / INDEX_NAME if file is None else file
    if target.exists():
        index = read_index(str(target))
        fault = changes(index, tars)
        if not fault:
            return f"already complete: {index.num_samples} samples in {len(tars)} shards"
        if index.made_by.get("source_kind") != "indexed":
            raise DataError(
                f"{target}: its tars changed since they were prepared: {fault}. Restore them, or "
                "remove it and run the same command to index them as they are now."
            )
        say(f"note: {target}: made anew, as the tars changed since it was written: {fault}")
    reports = _audit(tars, workers, "index", None)
    faults = [fault for one in reports for fault in one.faults]
    shapes: Counter[Shape] = sum((one.shapes for one in reports), Counter())
    examples = {shape: name for one in reversed(reports) for shape, name in one.examples.items()}
    repacked = prepare_command(folder, "--out", "OTHER", "--size", "64")
    if len({shape[:2] for shape in shapes}) > 1:
        listed = [
            f"{n} of {h} x {w}, e.g. {examples[h, w, c]}" for (h, w, c), n in shapes.most_common(5)
        ]
        faults.append(
            f"images must share one size; found {len(shapes)} shapes: {'; '.join(listed)}. Make "
            f"new shards of one size: {repacked}"
        )
    faults += _refusals(repacked, sum((one.altered for one in reports), Counter()))
    if faults:
        listed = faults[:LISTED_FAULTS]
        if all(one.scanned for one in reports):  # else no tar of it can be read at all
            listed.append(f"Repair these; or leave them out, in new shards: {repacked}")
        raise DataError(f"{folder}: cannot be indexed:\n  " + "\n  ".join(listed))
    if not shapes:
        raise DataError(f"{folder}: its {len(tars)} tars hold no images.")
    shape = max(shapes, key=lambda shape: shape[2])  # gray images among RGB images are read as RGB
    scans, classes, said = number_classes([one.scanned for one in reports if one.scanned])
    left_out = sum((one.contents.left_out for one in scans), Counter[str]())
    for line in lines([one.contents for one in scans]) + said:
        say(f"note: {line}")
    if left_out:
        say(f"note: not used: {listed_types(left_out)}")
    made_by = {
        "source_kind": "indexed",
        "note": "tars of another tool, indexed as they are",
        "classes": list(classes),
    }
    index = write_index(folder, scans, shape, made_by, target, elsewhere=file is not None)
    if not index.is_remote:
        write_preview(index, preview_of(target))
    return (
        f"indexed {index.num_samples} samples in {len(scans)} shards, "
        f"{'x'.join(map(str, shape))} {index.field}: {target}"
    )


def _refusals(repacked: str, altered: Counter[str]) -> list[str]:
    """Return the message for images that are not to be used as they are stored."""
    for what, count in altered.items():
        if what not in (TURNED, CONVERTED):
            say(f"note: {count} images {what}")
    must = [f"{altered[what]} must be {what}" for what in (TURNED, CONVERTED) if altered[what]]
    if not must:
        return []
    listed = ", ".join(must)
    return [
        f"images cannot be used as they are stored: {listed}. Make new shards, in which they are: "
        f"{repacked}"
    ]


def _is_placed(found: Scan, rows: NDArray[np.void], made_by: dict[str, Any]) -> bool:
    """Return whether an index has the places and labels that the headers of a tar say."""
    numbers = {name: k for k, name in enumerate(made_by.get("classes", []))}
    labels = [numbers.get(one, one) for one in found.contents.labels]
    wanted = [NO_LABEL if one is None else one for one in labels]
    placed = all(np.array_equal(found.table[key], rows[key]) for key in ("offset", "length"))
    return placed and wanted == rows["label"].tolist()


def _rename(found: TarReport, path: str, url: str) -> None:
    found.faults = [fault.replace(path, url) for fault in found.faults]


def _audit(
    paths: Sequence[Path | str], workers: int, doing: str, index: Index | None
) -> list[TarReport]:
    """Check each tar against the index; without an index, report its content."""

    def work(number: int, report: Callable[[int], None]) -> TarReport:
        if index is None:
            result = survey_tar(str(paths[number]), _survey, _rename)
            report(1)
            return result
        return _compare(Path(paths[number]), number, index, report)

    total, unit = (index.num_samples, " images") if index else (len(paths), " tars")
    with progress(doing, total, unit) as advance:
        return map_in_processes(work, range(len(paths)), workers, advance)


def _survey(path: Path) -> TarReport:
    """Scan a tar without an index, and decode each image by its own shape."""
    found, bad = TarReport(), []
    try:
        found.scanned = scan(path)
    except DataError as error:
        found.faults.append(str(error))
        return found
    table, extension = found.scanned.table, found.scanned.field
    decoders: dict[Shape, tuple[Callable[[memoryview, Any], None], NDArray[np.uint8]]] = {}
    with open_regular(path) as file:
        for offset, length, _ in table.tolist():
            try:
                payload = _payload(file, offset, length)
                shape = shape_of(payload, extension)
                if shape not in decoders:
                    decoders[shape] = decoder(extension, shape), np.empty(shape, np.uint8)
                    found.examples[shape] = f"{path.name} at offset {offset}"
                decode, out = decoders[shape]
                decode(payload, out)
                found.shapes[shape] += 1
                if extension != "npy":
                    found.altered.update(alterations(payload))
            except DecodeError as error:
                bad.append((offset, str(error)))
    found.faults += _named(path, bad)
    return found


def _compare(path: Path, number: int, index: Index, report: Callable[[int], None]) -> TarReport:
    """Check the size, checksum and headers of a tar, and decode the images that the index lists."""
    found, bad = TarReport(), []
    shard, first = index.shards[number], int(index.starts[number])
    try:
        rows = index.table[first : first + shard.nsamples]
    except DataError as error:
        found.faults.append(str(error))
        return found
    try:
        with open_shard(path, shard) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            found.faults.append(
                f"{path}: its checksum is {digest[:12]}..., the index says {shard.sha256[:12]}...: "
                "it was changed since."
            )
        if not _is_placed(scan(path), rows, index.made_by):
            found.faults.append(f"{path}: its headers and the index place samples differently.")
    except DataError as error:
        found.faults.append(str(error))
    if path.is_file():
        decode, out = decoder(index.field, index.shape), np.empty(index.shape, np.uint8)
        with open_regular(path) as file:
            inside = rows["offset"] + rows["length"] <= os.fstat(file.fileno()).st_size
            for offset, length, _ in rows[inside].tolist():
                try:
                    payload = _payload(file, offset, length)
                    decode(payload, out)
                    if index.made_by.get("source_kind") == "indexed" and index.field != "npy":
                        found.altered.update(alterations(payload))
                except DecodeError as error:
                    bad.append((offset, str(error)))
                report(1)
        found.faults += _named(path, bad)
        if lost := int((~inside).sum()):
            offset = int(rows["offset"][~inside].min())
            found.faults.append(f"{path}: its last {lost} samples, from offset {offset}, are lost.")
    return found


def _payload(file: BufferedReader, offset: int, length: int) -> memoryview:
    content = os.pread(file.fileno(), length, offset)
    if len(content) < length:
        raise DecodeError("it was cut while it was read")
    return memoryview(content)


def _named(path: Path, bad: list[tuple[int, str]]) -> list[str]:
    """Return a message for each (offset, reason), with the name of the sample from the tar."""
    names: dict[int, str] = {}
    if bad:
        wanted = {offset for offset, _ in bad}
        with contextlib.suppress(tarfile.TarError, OSError), open_tar(path) as tar:
            for member in tar:
                if member.offset_data in wanted:
                    names[member.offset_data] = printable(member.name)
    return [f"{path}: sample {names.get(at, 'unknown')} at offset {at}: {why}" for at, why in bad]
