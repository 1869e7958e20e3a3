"""Read the record of a set of images that is complete, and compare its files with it.

The record holds the settings of the set and a checksum of each part. It has one of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.data.codecs import npy_header, parse_npy
from pipeline.data.pictures import DecodeError
from pipeline.data.shards import INDEX_NAME, read_index
from pipeline.generation.image_files import PIECE
from pipeline.generation.image_set import ImageSet
from pipeline.runtime.documents import (
    DIGEST,
    DamagedFile,
    digest_of,
    open_regular,
    parse_json,
    read_bytes,
    sealed,
    unseal,
)
from pipeline.runtime.errors import DataError, GenerationError
from pipeline.runtime.work_folder import FileSum, fault_of, sum_of

RECORD_NAME = "generated.json"
PARTS = "parts_sha256"
"""Key of the record: a checksum of the sizes and checksums of each part's files."""
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError)
LARGEST_RECORD = 16 << 20
"""Bytes of the largest array ``made_by`` that is read; that of a million images has 0.1 MB."""


def record_of(job: ImageSet, parts: Mapping[int, dict[str, FileSum]]) -> dict[str, Any]:
    """Return the record of a set: its settings, a checksum of each part, and one of the record."""
    return sealed(job.record | {PARTS: [digest_of(parts[k]) for k in sorted(parts)]})


def record_name(job: ImageSet) -> str:
    """Return the name of the file that holds the record."""
    return {"png": RECORD_NAME, "shards": INDEX_NAME}.get(job.format, job.out.name)


def read_record(job: ImageSet) -> dict[str, Any]:
    """Return the record of the set at ``out``.

    Raises:
        GenerationError: it is no set of this format, or the record is damaged.
        OSError: it cannot be read, which is no damage.
    """
    try:
        if job.format == "shards":
            name = f"{job.out}/{INDEX_NAME}, made_by"
            found = read_index(str(job.out)).made_by
        elif job.format == "png":
            name = str(job.out / RECORD_NAME)
            found = parse_json(read_bytes(job.out / RECORD_NAME), name)
        else:
            name = f"{job.out}, made_by"
            with _opened(job.out) as archive:
                text = parse_npy(memoryview(_member(archive, "made_by.npy")))
            found = parse_json(str(text).encode(), name)
        if not unseal(found, must_be_sealed=PARTS in found):
            raise DamagedFile(f"{name}: is damaged: it differs from its {DIGEST}")
        return found
    except (FileNotFoundError, NotADirectoryError):
        detail = ""
    except (DamagedFile, DataError, DecodeError, *DAMAGED_ZIP) as error:
        detail = f", or a damaged set ({' '.join(str(error).split())})"
    raise GenerationError(
        f"--out ({job.out}): holds something else{detail}. Give another --out, or remove it."
    )


def refuse_changes(job: ImageSet, record: Mapping[str, Any]) -> None:
    """Read all files of a complete set, and compare them with its record.

    Raises:
        GenerationError: files were removed or changed.
        OSError: a file cannot be read, which is no damage.
    """
    remedy = "Give another --out, or remove what is left."
    names = [name for part in range(len(job.parts())) for name in job.files_of(part)]
    missing = [name for name in names if job.format != "npz" and not (job.out / name).exists()]
    if missing:
        raise GenerationError(
            f"--out ({job.out}): {len(missing)} files of the set are missing, the first is "
            f"{missing[0]}. {remedy}"
        )
    try:
        faults = _shard_faults(job) if job.format == "shards" else _part_faults(job, record)
    except (DamagedFile, FileNotFoundError, *DAMAGED_ZIP) as error:
        faults = [str(error)]
    if faults:
        raise GenerationError(
            f"--out ({job.out}): {len(faults)} parts are damaged, the first: {faults[0]}. {remedy}"
        )


def _shard_faults(job: ImageSet) -> list[str]:
    """Return what is wrong with the tars of a complete set."""
    with ThreadPoolExecutor(8) as pool:
        shards = read_index(str(job.out)).shards
        faults = pool.map(lambda s: fault_of(job.out / s.url, s.filesize, s.sha256), shards)
        return [fault for fault in faults if fault]


def _part_faults(job: ImageSet, record: Mapping[str, Any]) -> list[str]:
    """Return which parts of a complete set differ; sets of early versions have no checksums."""
    if (wanted := record.get(PARTS)) is None:
        return []
    found = _npz_digests(job) if job.format == "npz" else _png_digests(job)
    if not isinstance(wanted, list) or len(wanted) != len(found):
        return [f"{record_name(job)} must list {len(found)} checksums"]
    return [
        f"images {rows.start} to {rows.stop - 1}: their pixels or files differ from their checksum "
        f"in {record_name(job)}"
        for rows, *digests in zip(job.parts(), found, wanted, strict=True)
        if digests[0] != digests[1]
    ]


def _png_digests(job: ImageSet) -> list[str]:
    def digest(part: int) -> str:
        return digest_of({name: sum_of(job.out / name) for name in job.files_of(part)})

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(digest, range(len(job.parts()))))


def _npz_digests(job: ImageSet) -> list[str]:
    """Return the digests of the raw parts that an npz was joined from."""
    found = []
    with _opened(job.out) as archive, archive.open("arr_0.npy") as array:
        if array.read(len(header := npy_header((job.num, *job.shape)))) != header:
            raise DamagedFile(f"{job.out}: arr_0 is no array of {job.num} images")
        for part, rows in enumerate(job.parts()):
            digest, size = hashlib.sha256(), len(rows) * math.prod(job.shape)
            for start in range(0, size, PIECE):
                digest.update(array.read(min(PIECE, size - start)))
            digests = {name: [size, digest.hexdigest()] for name in job.files_of(part)}
            found.append(digest_of(digests))
        if array.read(1):
            raise DamagedFile(f"{job.out}: arr_0 is longer than {job.num} images")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a small member of an archive."""
    with archive.open(name) as member:
        content = member.read(LARGEST_RECORD + 1)
    if len(content) > LARGEST_RECORD:
        raise DamagedFile(f"{name} is larger than {LARGEST_RECORD} bytes")
    return content
