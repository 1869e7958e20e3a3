"""Write and read the index of a shard set: a folder or URL of plain WebDataset tars, plus

* ``index.json``: the wids-shard-index-v1 schema (name, number of samples, size and sha256 of each
  shard) with the format and shape of the images, and how they were made;
* ``index.json.samples.npy``: a row of 16 bytes per sample (offset and length of the image in its
  tar, label). It is memory-mapped, so a sample is read without reading a tar header.

The index is written last and atomically, so a folder with an index is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import IMAGE_FIELDS
from pipeline.data.remote import open_url, pieces, with_retries
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import sha256_of, write_atomic

INDEX_NAME = "index.json"
TABLE_NAME = "index.json.samples.npy"
KIND = "wids-shard-index-v1"
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])
NO_LABEL = -1


@dataclass(frozen=True)
class Shard:
    """A tar of a set: its file name, number of samples, size in bytes, and sha256 in hex."""

    url: str
    nsamples: int
    filesize: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The checked index of a shard set.

    Args:
        location: folder or URL of the set.
        field: extension of the images in the tars, e.g. ``npy``.
        shape: (H, W, C) of every image.
        shards: the tars, in the order of the sample ids.
        table: a row of dtype ``ROW`` for each sample id.
        made_by: how the images were made: source, crop, resize.
    """

    location: str
    field: str
    shape: tuple[int, int, int]
    shards: tuple[Shard, ...]
    table: NDArray[np.void]
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.table)

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each shard."""
        return [shard.nsamples for shard in self.shards]

    @property
    def is_remote(self) -> bool:
        return "://" in self.location

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the shards' sizes and checksums, equal for every copy of the set."""
        listed = [[shard.nsamples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def require_shape(self, wanted: tuple[int, int, int], field: str) -> None:
        """Raise ``DataError`` if the images do not have the shape (H, W, C) that a model takes.

        Args:
            wanted: the shape that the model takes.
            field: the option that named this set, for the message.
        """
        if self.shape != wanted:
            raise DataError(
                f"{field} ({self.location}): images of {_described(self.shape)}, the model wants "
                f"{_described(wanted)}. Prepare them with --size {wanted[0]} --channels "
                f"{wanted[2]}, give another set, or train with other model.image_size and "
                "model.channels."
            )


def _described(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{width}x{height} with {channels} channel{'s' if channels > 1 else ''}"


# -- writing ------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """Return the file name of a shard that this project writes."""
    return f"shard-{number:06d}.tar"


def scan(path: Path) -> tuple[Shard, NDArray[np.void], str]:
    """Return (shard, rows of the table, extension of the images) of a tar, from its headers.

    Raises:
        DataError: the tar is compressed, truncated or not a WebDataset shard.
    """
    rows: list[tuple[int, int, int]] = []
    fields: set[str] = set()
    key, label, image, end = "", NO_LABEL, None, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored sparse")
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if (sample := f"{folder}/{stem}") != key:
                    if image is not None:
                        rows.append((*image, label))
                    key, label, image = sample, NO_LABEL, None
                extension = extension.lower()
                if extension in IMAGE_FIELDS and image is None:
                    image = (member.offset_data, member.size)
                    fields.add(extension)
                elif extension == "cls":
                    label = _label(tar, member, path)
                end = member.offset_data + member.size
            if image is not None:
                rows.append((*image, label))
            ends_at = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: truncated, damaged or compressed: not readable as a plain tar ({error}). "
            "Copy it again. Samples are read by offset, so unpack a .tar.gz first."
        ) from None
    if rows and end > path.stat().st_size:
        raise DataError(f"{path}: truncated; its last member ends past the end of the file.")
    with path.open("rb") as file:
        # tarfile reads a damaged header, or a cut between two members, as the end of the archive.
        file.seek(ends_at)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"{path}: truncated or damaged at byte {ends_at}, where a tar must have a member "
                "or its end mark. Copy it again."
            )
    if len(fields) > 1:
        raise DataError(f"{path}: images must share one extension; found {sorted(fields)}.")
    if not rows and path.stat().st_size > 10240:
        raise DataError(f"{path}: holds no images; known extensions are {', '.join(IMAGE_FIELDS)}.")
    shard = Shard(path.name, len(rows), path.stat().st_size, sha256_of(path))
    return shard, np.array(rows, dtype=ROW), fields.pop() if fields else ""


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    stored = tar.extractfile(member)
    text = stored.read().strip() if stored else b""
    try:
        label = int(text)
    except ValueError:
        raise DataError(f"{path}: {member.name} holds {text[:20]!r}, not an integer.") from None
    if not 0 <= label < 2**31:
        raise DataError(f"{path}: {member.name} holds {label}; labels are 0 to 2**31 - 1.")
    return label


def write_index(
    folder: Path,
    scans: Sequence[tuple[Shard, NDArray[np.void], str]],
    shape: tuple[int, int, int],
    made_by: dict[str, Any],
) -> Index:
    """Write the index of the complete shards in ``folder``.

    Args:
        folder: where the tars are.
        scans: what ``scan`` returned for each tar.
        shape: (H, W, C) of every image.
        made_by: how the images were made.

    Raises:
        DataError: there are no images, or images of several formats.
    """
    fields = {name for _, _, name in scans if name}
    if not fields:
        raise DataError(f"{folder}: the shards hold no images.")
    if len(fields) > 1:
        raise DataError(f"{folder}: images must share one extension; found {sorted(fields)}.")
    table = np.concatenate([rows for _, rows, _ in scans])
    raw = io.BytesIO()
    np.save(raw, table)
    write_atomic(folder / TABLE_NAME, raw.getvalue())
    document = {
        "__kind__": KIND,
        "wids_version": 1,
        "field": fields.pop(),
        "shape": list(shape),
        "samples_sha256": hashlib.sha256(raw.getvalue()).hexdigest(),
        "made_by": made_by,
        "shardlist": [asdict(shard) for shard, _, _ in scans],
    }
    write_atomic(folder / INDEX_NAME, json.dumps(document, indent=1).encode())
    return read_index(str(folder))


# -- reading ------------------------------------------------------------------------------------


def read_index(location: str, command: str = "", field: str = "data.shards") -> Index:
    """Read and check the index of a folder or URL.

    Args:
        location: folder or URL of the set.
        command: the command that makes the set, for the message when the index is missing.
        field: the option that named the set, for the same message.

    Raises:
        DataError: there is no index, it is damaged, or it names files outside its folder.
    """
    location = location.rstrip("/") if "://" in location else location
    document_bytes = _read_beside(location, INDEX_NAME, command=command, field=field)
    try:
        document = json.loads(document_bytes)
        if document["__kind__"] != KIND:
            raise ValueError(f"__kind__ is {document['__kind__']!r}")
        shards = tuple(
            Shard(str(s["url"]), int(s["nsamples"]), int(s["filesize"]), str(s["sha256"]))
            for s in document["shardlist"]
        )
        height, width, channels = map(int, document["shape"])
        name, digest = str(document["field"]), str(document["samples_sha256"])
        made_by = dict(document.get("made_by", {}))
        if any(shard.nsamples < 0 or shard.filesize < 1 for shard in shards):
            raise ValueError("a shard has a negative number of samples or no bytes")
        if min(height, width, channels) < 1:
            raise ValueError(f"shape is {document['shape']}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{location}/{INDEX_NAME}: not an index of this project ({error}). "
            f"Make it again: python -m pipeline.prepare {location} --out {location}"
        ) from None
    for shard in shards:
        # fsspec would open a second file system for what follows "::".
        odd = shard.url in ("", ".", "..") or "::" in shard.url or not shard.url.isprintable()
        if odd or Path(shard.url).name != shard.url:
            raise DataError(
                f"{location}/{INDEX_NAME}: shard {shard.url!r} must be a plain file name beside it."
            )
    raw = _read_beside(location, TABLE_NAME, lazy=True)
    table = _open_table(raw, digest, f"{location}/{TABLE_NAME}")
    if sum(shard.nsamples for shard in shards) != len(table):
        raise DataError(f"{location}: {INDEX_NAME} and {TABLE_NAME} count different samples.")
    if len(table) == 0:
        raise DataError(f"{location}: the index lists no samples.")
    return Index(location, name, (height, width, channels), shards, table, made_by)


def _open_table(raw: bytes | Path, digest: str, name: str) -> NDArray[np.void]:
    table: NDArray[np.void]
    try:
        if isinstance(raw, Path):
            if sha256_of(raw) != digest:
                raise ValueError("its checksum differs from the index")
            table = np.load(raw, mmap_mode="r", allow_pickle=False)
        else:
            if hashlib.sha256(raw).hexdigest() != digest:
                raise ValueError("its checksum differs from the index")
            table = np.load(io.BytesIO(raw), allow_pickle=False)
        if table.dtype != ROW or table.ndim != 1:
            raise ValueError(f"its dtype is {table.dtype}")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{name}: damaged or not of this index ({error}). Index again.") from None
    return table


def _read_beside(
    location: str, name: str, lazy: bool = False, command: str = "", field: str = "data.shards"
) -> Any:
    """Return the bytes of a file beside the shards, or its path if it is local and ``lazy``."""
    if "://" in location:

        def read() -> bytes:
            with open_url(f"{location}/{name}") as file:
                return b"".join(pieces(file))

        return with_retries(f"{location}/{name}", read)
    path = Path(location).expanduser() / name
    try:
        return path if lazy and path.is_file() else path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        tars = len(list(path.parent.glob("*.tar"))) if path.parent.is_dir() else 0
        remedy = command or f"python -m pipeline.prepare SOURCE --out {location} --size SIZE"
        if tars and name == INDEX_NAME:
            found, remedy = (
                f"{tars} tars without an index",
                f"python -m pipeline.prepare {location} --out {location}",
            )
        else:
            found = f"no {name}" if path.parent.is_dir() else "no such folder"
        raise DataError(f"{field} ({location}): {found}. Make it with: {remedy}") from None
    except OSError as error:
        raise DataError(f"{field} ({location}): cannot be read: {error}.") from None
