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
from pipeline.runtime.console import say
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.host import SCARCE_FILES
from pipeline.runtime.locks import FileLock
from pipeline.runtime.signals import Stopped, never_stop

HOME_FOLDER = "~/.cache/dcgan-pipeline/shards"
HASH_ALL_BELOW = 2 << 30
"""Bytes; a set up to this size is hashed before a run with ``data.verify=auto``."""

_announced: Path | None = None


class Cache:
    """Node-local copies of remote shards; local shards are used where they are.

    The processes of a node share a folder. Each shard is downloaded once per node.

    Args:
        index: the shard set.
        folder: where the copies are kept; ``data.cache_dir``. "" = ``node_folder()``.
        limit_gib: size of the cache in GiB; 0 = unlimited.
        stop: called during a download; the download raises ``Stopped`` when it returns True.
    """

    def __init__(
        self,
        index: Index,
        folder: str,
        limit_gib: float = 0.0,
        stop: Callable[[], bool] = never_stop,
    ) -> None:
        self.index, self.stop = index, stop
        needs_default = index.is_remote and not folder
        self.folder = node_folder() if needs_default else Path(folder).expanduser()
        self.limit = int(limit_gib * 2**30)

    def path(self, shard: Shard) -> Path:
        """Return the local file of a shard; download it first if it is remote and not in the cache.

        Raises:
            DataError: it cannot be downloaded, or the cache folder cannot be used.
        """
        if not self.index.is_remote:
            return Path(self.index.location).expanduser() / shard.url
        target = self.folder / f"{shard.sha256[:16]}-{shard.url}"
        try:
            if not target.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                self.announce()
                with FileLock(self.folder / f"{target.name}.lock") as lock:
                    lock.acquire()
                    if not target.exists():  # another process of this node may have been first
                        self._make_room(shard.filesize)
                        self._fetch(shard, target)
            elif self.limit:
                with contextlib.suppress(FileNotFoundError):  # another process evicted it just now
                    os.utime(target)
        except OSError as error:
            if error.errno in SCARCE_FILES:
                raise  # no fault of the folder: ``Reader`` may close some
            raise DataError(f"data.cache_dir ({self.folder}): cannot be used: {error}.") from None
        return target

    def announce(self) -> None:
        """Say once where the copies of remote shards are kept; only the first rank of a node does.

        Data workers inherit by fork that it was said.
        """
        global _announced
        if self.index.is_remote and self.folder != _announced:
            _announced = self.folder
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"downloaded shards are kept in {self.folder} (data.cache_dir)")

    def open(self, shard: Shard) -> IO[bytes]:
        """Open a shard of the size that the index says; download it again if it was just evicted.

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
        raise DataError(f"{path}: evicted as soon as it was downloaded. Raise data.cache_gib.")

    def fetch_all(self, threads: int = 8) -> None:
        """Download every shard, in threads; locks keep other ranks from downloading it again."""
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
        """Evict the least recently used shards. A process that has one mapped can still read it."""
        if not self.limit:
            return
        kept = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                status = path.stat()
                kept.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + needed <= self.limit:
                break
            total -= size
            path.unlink(missing_ok=True)


def node_folder() -> Path:
    """Return this user's folder for shards on the node's own disk, or the one in the home folder.

    Schedulers make a folder for the job there and name it in SLURM_TMPDIR or TMPDIR. A folder that
    another user owns is not used: whoever can write in it can change what is read.
    """
    for base in (Path(os.environ.get(name, "")) for name in ("SLURM_TMPDIR", "TMPDIR")):
        if not base.is_absolute() or not os.access(base, os.W_OK | os.X_OK):
            continue
        folder = base / f"dcgan-pipeline-{os.getuid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                return folder / "shards"
    return Path(HOME_FOLDER).expanduser()


def check_size(path: Path, shard: Shard) -> None:
    """Raise ``DataError`` if a shard is missing or has another size than the index says."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: missing, but listed in {INDEX_NAME}.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
    if found != shard.filesize:
        raise DataError(
            f"{path}: {found} bytes, the index says {shard.filesize}: truncated or changed since "
            "it was indexed. Restore it, or prepare the set again."
        )


def check_shards(index: Index, how: str, stop: Callable[[], bool] = never_stop) -> None:
    """Check the local shards of an index before a run.

    Args:
        index: the shard set; remote shards are checked when they are downloaded.
        how: ``size``; ``sha256``: every byte; or ``auto``: every byte of sets up to 2 GiB.
        stop: called before each shard; the check ends when it returns True.

    Raises:
        DataError: a shard is missing, truncated or changed.
        Stopped: ``stop`` returned True.
    """
    if index.is_remote:
        return
    folder = Path(index.location).expanduser()
    total = sum(shard.filesize for shard in index.shards)
    every_byte = how == "sha256" or (how == "auto" and total <= HASH_ALL_BELOW)

    def check(shard: Shard) -> None:
        if stop():
            raise Stopped
        check_size(folder / shard.url, shard)
        if every_byte and sha256_of(folder / shard.url) != shard.sha256:
            raise DataError(
                f"{folder / shard.url}: its checksum differs from the index: it was changed "
                f"since. List the damage with: python -m pipeline.prepare --verify {folder}"
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, index.shards))
