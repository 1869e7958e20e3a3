"""Keep node-local copies of remote shards, and check local ones before a run."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from pipeline.data.remote import FETCH_ATTEMPTS, fetch
from pipeline.data.shards import INDEX_NAME, Index, Shard
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.locks import FileLock
from pipeline.runtime.signals import Stopped, never

HASH_ALL_BELOW = 2 << 30
"""Bytes; a set up to this size is hashed before a run with ``data.verify=auto``."""


class Cache:
    """Node-local copies of remote shards: one download per node, checked, published atomically.

    ``stop`` is asked between the pieces of a download; where it says so, ``Stopped`` is raised.
    """

    def __init__(
        self,
        index: Index,
        folder: str,
        limit_gib: float = 0.0,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.index, self.stop = index, stop
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
                with FileLock(self.folder / f"{target.name}.lock") as lock:
                    lock.acquire()
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
        """Download a shard, whose lock this process holds: no other download is in progress."""
        for abandoned in self.folder.glob(f"{glob.escape(target.name)}.*.tmp"):
            abandoned.unlink(missing_ok=True)
        url = f"{self.index.location}/{shard.url}"
        fetch(url, target, shard.sha256, size=shard.filesize, stop=self.stop)

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


def check_shards(index: Index, how: str, stop: Callable[[], bool] = never) -> None:
    """Check the local shards of an index before a run: ``size``, ``sha256`` or ``auto``.

    Raises:
        DataError: one is missing, truncated or changed.
        Stopped: ``stop``, asked before each shard, said so.
    """
    if index.is_remote:
        return  # the cache checks every byte as it comes
    folder = Path(index.location).expanduser()
    total = sum(shard.filesize for shard in index.shards)
    every_byte = how == "sha256" or (how == "auto" and total <= HASH_ALL_BELOW)

    def check(shard: Shard) -> None:
        if stop():
            raise Stopped
        check_size(folder / shard.url, shard)
        if every_byte and sha256_of(folder / shard.url) != shard.sha256:
            raise DataError(
                f"{folder / shard.url}: its checksum differs from the index: changed since it was "
                f"indexed; list the damage with: python -m pipeline.prepare --verify {folder}"
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, index.shards))
