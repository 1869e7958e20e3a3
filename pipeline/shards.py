"""WebDataset tars with an index: written, scanned, verified, opened by offset, cached per node.

A shard set is a folder (or URL) of plain tars that any webdataset tool reads, plus

* ``index.json``: the wids-shard-index-v1 schema (name, samples, size and sha256 of each shard) with
  the image field and shape, and how the images were made;
* ``index.json.samples.npy``: one row of 16 bytes per sample (payload offset, length, label), memory
  mapped, so that a sample is found without reading a tar header.

The index is written last and atomically: a folder with an index is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import io
import json
import mmap
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import IMAGE_FIELDS, DecodeError, decoder
from pipeline.errors import CorruptSample, DataError

INDEX_NAME = "index.json"
TABLE_NAME = "index.json.samples.npy"
KIND = "wids-shard-index-v1"
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])
NO_LABEL = -1
CHUNK = 1 << 20
HASH_ALL_BELOW = 2 << 30
FETCH_ATTEMPTS = 4
FETCH_PAUSE = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One tar: its name beside the index, and what its bytes must be."""

    url: str
    nsamples: int
    filesize: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a shard set holds.

    ``shape`` is (H, W, C) of every image; ``table`` has dtype ``ROW`` and one row per sample in
    shard order; ``made_by`` records how the images were made (crop, resize, source).
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
        """Samples of each shard, in order."""
        return [shard.nsamples for shard in self.shards]

    @property
    def is_remote(self) -> bool:
        return "://" in self.location

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' sizes and checksums: equal for every copy of the same data."""
        listed = [[shard.nsamples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


# -- writing ------------------------------------------------------------------------------------


def scan(path: Path) -> tuple[Shard, NDArray[np.void], str]:
    """(shard, table rows, image field) of one tar on disk, from its headers alone.

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
                if (here := f"{folder}/{stem}") != key:
                    if image is not None:
                        rows.append((*image, label))
                    key, label, image = here, NO_LABEL, None
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
            "Copy it again; unpack a .tar.gz first: samples in it cannot be found by offset."
        ) from None
    if rows and end > path.stat().st_size:
        raise DataError(f"{path}: truncated; its last member ends past the end of the file.")
    with path.open("rb") as file:
        # tarfile takes a damaged header or a cut between two members for the end of the archive.
        file.seek(ends_at)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"{path}: truncated or damaged at byte {ends_at}: a tar must have a member "
                "or its end mark there."
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
    """Publish the index of shards that lie complete in ``folder``; the last write of all."""
    fields = {name for _, _, name in scans if name}
    if not fields:
        raise DataError(f"{folder}: the shards hold no images.")
    if len(fields) > 1:
        raise DataError(f"{folder}: images must share one extension; found {sorted(fields)}.")
    table = np.concatenate([rows for _, rows, _ in scans])
    raw = io.BytesIO()
    np.save(raw, table)
    publish(folder / TABLE_NAME, raw.getvalue())
    document = {
        "__kind__": KIND,
        "wids_version": 1,
        "field": fields.pop(),
        "shape": list(shape),
        "samples_sha256": hashlib.sha256(raw.getvalue()).hexdigest(),
        "made_by": made_by,
        "shardlist": [asdict(shard) for shard, _, _ in scans],
    }
    publish(folder / INDEX_NAME, json.dumps(document, indent=1).encode())
    return read_index(str(folder))


def publish(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading ------------------------------------------------------------------------------------


def read_index(location: str) -> Index:
    """The checked index of a folder or URL.

    Raises:
        DataError: no index there, damaged, or naming files outside its own folder.
    """
    location = location.rstrip("/") if "://" in location else location
    document_bytes = _read_beside(location, INDEX_NAME)
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
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{location}/{INDEX_NAME}: not an index of this project ({error}); "
            f"make it again: python -m pipeline.prepare {location} --out {location}"
        ) from None
    for shard in shards:
        # "::" would chain a second file system behind a remote one.
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
        raise DataError(f"{name}: damaged or not of this index ({error}); index again.") from None
    return table


def _read_beside(location: str, name: str, lazy: bool = False) -> Any:
    """The bytes of a file in the shard folder; a local path instead when ``lazy``."""
    if "://" in location:

        def whole() -> bytes:
            with _remote(f"{location}/{name}") as file:
                content: bytes = file.read()
                return content

        return _patiently(f"{location}/{name}", whole)
    path = Path(location).expanduser() / name
    try:
        return path if lazy and path.is_file() else path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        tars = len(list(path.parent.glob("*.tar"))) if path.parent.is_dir() else 0
        remedy = f"python -m pipeline.prepare SOURCE --out {location} --size SIZE"
        if tars and name == INDEX_NAME:
            found, remedy = (
                f"{tars} tars without an index",
                f"python -m pipeline.prepare {location} --out {location}",
            )
        else:
            found = f"no {name}" if path.parent.is_dir() else "no such folder"
        raise DataError(f"data.shards ({location}): {found}. Make it with: {remedy}") from None
    except OSError as error:
        raise DataError(f"data.shards ({location}): cannot be read: {error}.") from None


@contextlib.contextmanager
def _remote(url: str) -> Iterator[IO[bytes]]:
    import fsspec  # only remote data pays for it

    scheme = url.split("://")[0]
    try:
        opened = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: cannot open {scheme}:// ({error}); use http(s), s3 or gs and install the "
            "extra for it: pip install -e '.[http]', '.[s3]' or '.[gs]'."
        ) from None
    try:
        file = opened.open()
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec says "not found" for every failure of http too
        network = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
        if network and getattr(cause, "status", 0) != 404:
            raise ConnectionError(str(cause)) from None
        raise DataError(f"{url}: not found.") from None
    with file:
        yield file


def _patiently(url: str, transfer: Callable[[], T]) -> T:
    """Try a transfer again when the network fails; a ``DataError`` is final."""
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(FETCH_PAUSE * 2.0**attempt)
        try:
            return transfer()
        except DataError:
            raise
        except Exception as error:  # each scheme has network errors of its own
            reason = repr(error)
    raise DataError(f"{url}: cannot be fetched: {reason}.") from None


class Cache:
    """Node-local copies of remote shards: one download per node, checked, published atomically."""

    def __init__(self, index: Index, folder: str, limit_gib: float = 0.0) -> None:
        self.index = index
        self.folder = Path(folder).expanduser()
        self.limit = int(limit_gib * 2**30)

    def path(self, shard: Shard) -> Path:
        """The local file of a shard, fetched first when it is remote and not yet here."""
        if not self.index.is_remote:
            return Path(self.index.location).expanduser() / shard.url
        target = self.folder / f"{shard.sha256[:16]}-{shard.url}"
        try:
            if not target.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / f"{target.name}.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not target.exists():  # another process of this node was first
                        self._make_room(shard.filesize)
                        self._fetch(shard, target)
            elif self.limit:
                with contextlib.suppress(FileNotFoundError):  # evicted just now
                    os.utime(target)
        except OSError as error:
            raise DataError(f"data.cache_dir ({self.folder}): cannot be used: {error}.") from None
        return target

    def open(self, shard: Shard) -> IO[bytes]:
        """The shard's file, of the size the index says; fetched again if evicted meanwhile.

        Raises:
            DataError: it is missing, has another size, or cannot be fetched.
        """
        for _ in range(FETCH_ATTEMPTS):
            path = self.path(shard)
            try:
                check_size(path, shard)
                return path.open("rb")
            except (DataError, FileNotFoundError):
                if path.exists() or not self.index.is_remote:
                    raise
        raise DataError(f"{path}: evicted as soon as it is fetched: raise data.cache_gib.")

    def fetch_all(self, threads: int = 8) -> None:
        """Bring every shard here, in parallel; ranks of one node share the work by the locks."""
        if self.index.is_remote and not self.limit:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self.path, self.index.shards))

    def _fetch(self, shard: Shard, target: Path) -> None:
        """Download under the shard's lock: whatever unfinished copy is found was abandoned."""
        url = f"{self.index.location}/{shard.url}"
        for abandoned in self.folder.glob(f"{glob.escape(target.name)}.*.tmp"):
            abandoned.unlink(missing_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")

        def transfer() -> str:
            digest = hashlib.sha256()
            with partial.open("wb") as out, _remote(url) as source:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                if out.tell() < shard.filesize:  # a connection may end early without an error
                    raise EOFError(f"ended after {out.tell()} of {shard.filesize} bytes")
            return digest.hexdigest()

        try:
            if _patiently(url, transfer) != shard.sha256:
                raise DataError(f"{url}: its checksum differs from the index; upload it again.")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        """Unlink the least recently used shards; a process that maps one keeps reading it."""
        if not self.limit:
            return
        kept = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                status = path.stat()
                kept.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + needed <= self.limit:
                break
            total -= size
            path.unlink(missing_ok=True)


class Reader:
    """Random access to the samples of an index, in one process."""

    def __init__(self, index: Index, cache: Cache) -> None:
        self.index, self.cache = index, cache
        self._starts = np.cumsum([0, *index.sizes])
        self._maps: dict[int, memoryview] = {}
        self._decode = decoder(index.field, index.shape)

    def read(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Decode samples into ``out`` (n, H, W, C) uint8; returns their labels, int64 (n,).

        Raises:
            CorruptSample: naming shard, key and offset.
            DataError: a shard is missing or has another size than the index says.
        """
        rows = self.index.table[ids]
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for k, (shard, offset, length) in enumerate(
            zip(shards.tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True)
        ):
            view = self._maps.get(shard)
            if view is None:
                view = self._open(shard)
            try:
                self._decode(view[offset : offset + length], out[k])
            except DecodeError as error:
                raise self._corrupt(shard, offset, error) from None
        return rows["label"].astype(np.int64)

    def _open(self, number: int) -> memoryview:
        shard = self.index.shards[number]
        with self.cache.open(shard) as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if self.index.is_remote and self.cache.limit and len(self._maps) >= 64:
            self._maps.clear()  # let go of evicted files
        self._maps[number] = view
        return view

    def _corrupt(self, number: int, offset: int, error: DecodeError) -> CorruptSample:
        shard = self.index.shards[number]
        path = self.cache.path(shard)
        key = "unknown"
        with contextlib.suppress(tarfile.TarError, OSError), tarfile.open(path, "r:") as tar:
            key = next((m.name for m in tar if m.offset_data == offset), key)
        return CorruptSample(
            f"{path}: sample {key} at offset {offset} is damaged: {error}. Check the whole set "
            f"with: python -m pipeline.prepare --verify {self.index.location}"
        )


def check_size(path: Path, shard: Shard) -> None:
    """Refuse a shard that is missing, truncated or grown since it was indexed."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing, but listed in {INDEX_NAME}.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
    if found != shard.filesize:
        raise DataError(
            f"{path}: {found} bytes, the index says {shard.filesize}: truncated or changed since "
            "it was indexed; restore it or prepare the set again."
        )


def check_shards(index: Index, how: str) -> None:
    """Check the local shards of an index before a run: ``size``, ``sha256`` or ``auto``."""
    if index.is_remote:
        return  # the cache checks every byte as it comes
    folder = Path(index.location).expanduser()
    total = sum(shard.filesize for shard in index.shards)
    every_byte = how == "sha256" or (how == "auto" and total <= HASH_ALL_BELOW)

    def check(shard: Shard) -> None:
        check_size(folder / shard.url, shard)
        if every_byte and sha256_of(folder / shard.url) != shard.sha256:
            raise DataError(
                f"{folder / shard.url}: its checksum differs from the index: changed since it was "
                f"indexed; list the damage with: python -m pipeline.prepare --verify {folder}"
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, index.shards))
