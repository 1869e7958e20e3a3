"""Keep node-local copies of remote shards, and check local ones before a run."""

from __future__ import annotations

import contextlib
import copy
import glob
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BufferedReader
from pathlib import Path
from threading import Event

from pipeline.data.checksums import (
    check_bytes,
    fault_of,
    is_compared,
    open_shard,
    record_of,
    remember,
    unreadable,
)
from pipeline.data.locations import is_url
from pipeline.data.remote import FETCH_ATTEMPTS, fetch, raise_on_stop
from pipeline.data.shards import Index, Shard
from pipeline.runtime.console import say
from pipeline.runtime.documents import set_file_aside
from pipeline.runtime.errors import DataError
from pipeline.runtime.host import SCARCE_FILES, cores, remedy_of_file
from pipeline.runtime.locks import FileLock
from pipeline.runtime.signals import Stopped, never_stop
from pipeline.runtime.text import printable

HOME_FOLDER = "~/.cache/dcgan-pipeline/shards"
HASH_ALL_BELOW = 2 << 30
"""Bytes; a set up to this size is hashed before a run with ``data.verify=auto``, a larger one in
the background of its first epoch."""
LOCK_SECONDS, LOCK_POLL = 600.0, 0.1
LONGEST_NAME = 100

_announced: Path | None = None


class Cache:
    """Node-local copies of remote shards; local shards are used where they are.

    The processes of a node share a folder. Each shard is downloaded once per node.

    Args:
        index: the shard set.
        folder: where the copies are kept; ``data.cache_dir``. "" = ``node_folder()``.
        limit_gib: size of the cache in GiB; 0 = unlimited.
        stop: called during waits; they raise ``Stopped`` when it returns True.
    """

    def __init__(
        self,
        index: Index,
        folder: str,
        limit_gib: float = 0.0,
        stop: Callable[[], bool] = raise_on_stop,
    ) -> None:
        self.index, self.stop = index, stop
        needs_default = index.is_remote and not folder
        self.folder = node_folder() if needs_default else Path(folder).expanduser()
        self.limit = int(limit_gib * 2**30)
        self.waited, self.fetched = 0.0, 0
        """Seconds that ``path`` took beyond finding a copy, and bytes that it downloaded."""

    def is_copied(self, shard: Shard) -> bool:
        """Return whether a shard is remote: what is read is a copy of it."""
        return is_url(self.index.folder_of(shard))

    def path(self, shard: Shard, *, anew: bool = False) -> Path:
        """Return the local file of a shard.

        A copy of a remote shard is downloaded first if it is not in the cache. It is compared with
        the index unless these very bytes were. A copy that differs is set aside and replaced.

        Args:
            shard: one of the index.
            anew: compare every byte, whatever the record of an earlier process says.

        Raises:
            DataError: it cannot be downloaded, or the cache folder cannot be used.
            Stopped: ``stop`` returned True meanwhile.
        """
        if not self.is_copied(shard):
            return Path(self.index.place_of(shard)).expanduser()
        target, began = self._target(shard), time.monotonic()
        try:
            if not is_compared(target, shard.sha256, record=not anew):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.announce()
                with FileLock(self.folder / f"{target.name}.lock") as lock:
                    self._wait_for(lock, target)
                    # Another process of this node may have been first.
                    if not is_compared(target, shard.sha256, record=not anew):
                        self._obtain(shard, target)
                self.waited += time.monotonic() - began
            elif self.limit:
                with contextlib.suppress(FileNotFoundError):  # another process evicted it just now
                    os.utime(record_of(target))
        except OSError as error:
            if error.errno in SCARCE_FILES:
                raise  # no fault of the folder: ``Reader`` may close some
            if self.limit and isinstance(error, FileNotFoundError):
                return target  # evicted amid this, as it may be after it: ``open`` tries again
            raise DataError(
                f"data.cache_dir ({self.folder}): cannot be used: {error}. {remedy_of_file(error)}."
            ) from None
        return target

    def _wait_for(self, lock: FileLock, target: Path) -> None:
        """Wait while another process downloads or checks a copy, as long as it makes progress."""
        seen, since = -1, time.monotonic()
        while not lock.acquire(wait=False):
            if self.stop():
                raise Stopped
            arrived = sum(size_of(path) for path in self._partials(target))
            if arrived != seen:
                seen, since = arrived, time.monotonic()
            if time.monotonic() - since > LOCK_SECONDS:
                raise DataError(
                    f"{lock.path}: another process has held this lock for {LOCK_SECONDS:.0f} s "
                    "and downloaded nothing. End that process, or give another data.cache_dir."
                )
            time.sleep(LOCK_POLL)

    def _partials(self, target: Path) -> Iterator[Path]:
        return self.folder.glob(f"{glob.escape(target.name)}.*.tmp")

    def _obtain(self, shard: Shard, target: Path) -> None:
        """Check the copy of a shard, or download it. This process holds its lock."""
        if os.path.lexists(target):
            if not (fault := fault_of(target, shard, self.stop)):
                return remember(target, shard.sha256, record=True)
            aside = set_file_aside(target)
            name = printable(str(target))
            say(f"{name}: {fault}: set aside as {printable(aside.name)} and downloaded again")
        for abandoned in self._partials(target):  # no other download of it is in progress
            abandoned.unlink(missing_ok=True)
        self._make_room(shard.filesize)
        url = self.index.place_of(shard)
        fetch(url, target, shard.sha256, size=shard.filesize, stop=self.stop)
        self.fetched += shard.filesize
        remember(target, shard.sha256, record=True)

    def _arriving(self) -> int:
        """Return the number of downloads in progress; shards of a set have about one size."""
        live, count = time.time() - LOCK_SECONDS, 0
        for path in self.folder.glob("*.tar.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # a record is written beside a copy
                count += ".tar.verified." not in path.name and path.stat().st_mtime > live
        return count

    def announce(self) -> None:
        """Say once where the copies of remote shards are kept; only the first rank of a node does.

        Data workers inherit by fork that it was said.
        """
        global _announced
        if self.index.is_remote and self.folder != _announced:
            _announced = self.folder
            if os.environ.get("LOCAL_RANK", "0") == "0":
                say(f"downloaded shards are kept in {self.folder} (data.cache_dir)")

    def open(self, shard: Shard) -> BufferedReader:
        """Open a shard of the size that the index says; download it again if it was just evicted.

        Raises:
            DataError: it is missing, has another size, or cannot be fetched.
            OSError: too many files are open.
        """
        for _ in range(FETCH_ATTEMPTS):
            path = self.path(shard)
            try:
                return open_shard(path, shard)
            except DataError:
                if path.exists() or not self.is_copied(shard):
                    raise
        raise DataError(f"{path}: evicted as soon as it was downloaded. Raise data.cache_gib.")

    def fetch_all(self, threads: int = 8) -> None:
        """Download and check every shard, in threads; other ranks wait for their locks."""
        if self.index.is_remote and not self.limit:
            self._obtain_all(self.index.shards, threads)

    def check_copies(self, threads: int = 8) -> None:
        """Compare every byte of the copies that are here, whatever their records say."""
        copied = filter(self.is_copied, self.index.shards)
        here = [shard for shard in copied if os.path.lexists(self._target(shard))]
        self._obtain_all(here, threads, anew=True)

    def _obtain_all(self, shards: Sequence[Shard], threads: int, *, anew: bool = False) -> None:
        def obtain(shard: Shard, stop: Callable[[], bool]) -> None:
            hurried = copy.copy(self)
            hurried.stop = stop
            hurried.path(shard, anew=anew)

        map_in_threads(obtain, shards, threads, self.stop)

    def _target(self, shard: Shard) -> Path:
        # The names of its lock, record and download are longer.
        name = shard.url.encode()[-LONGEST_NAME:].decode(errors="ignore")
        return self.folder / f"{shard.sha256[:16]}-{name}"

    def held(self) -> list[int]:
        """Return the numbers of the shards of which there are copies."""
        here = set(self.folder.glob("*.tar"))
        return [k for k, one in enumerate(self.index.shards) if self._target(one) in here]

    def used(self) -> int:
        """Return the bytes of all copies in the folder, of other sets too."""
        return sum(size_of(path) for path in self.folder.glob("*.tar"))

    def release(self, shard: Shard) -> None:
        """Let a copy be the next that is evicted, unless a process uses it anew before."""
        with contextlib.suppress(OSError):
            os.utime(record_of(self._target(shard)), (0, 0))

    def evict(self, shard: Shard) -> None:
        """Remove a copy that was released, unless a process has used it since."""
        target = self._target(shard)
        with contextlib.suppress(OSError):
            if record_of(target).stat().st_mtime == 0:
                target.unlink(missing_ok=True)
                record_of(target).unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        """Evict the least recently used copies. A process that has one open can still read it."""
        if not self.limit:
            return
        kept = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                used = record_of(path) if record_of(path).exists() else path
                kept.append((used.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept) + needed * self._arriving()
        for _, size, path in sorted(kept):
            if total + needed <= self.limit:
                break
            total -= size
            path.unlink(missing_ok=True)
            record_of(path).unlink(missing_ok=True)


def map_in_threads(
    work: Callable[[Shard, Callable[[], bool]], object],
    shards: Sequence[Shard],
    threads: int,
    stop: Callable[[], bool],
) -> None:
    """Call ``work(shard, stop)`` for each shard; the first error stops the other calls."""
    failed = Event()
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(work, one, lambda: failed.is_set() or stop()) for one in shards]
        try:
            for call in as_completed(calls):
                call.result()
        finally:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file; 0 if it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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


def hashed_later(index: Index, how: str) -> bool:
    """Return whether the shards of a run are too many to be hashed before it begins."""
    total = sum(shard.filesize for shard in index.local_shards)
    return how == "auto" and total > HASH_ALL_BELOW


def check_shards(
    index: Index, how: str, stop: Callable[[], bool] = never_stop, *, every_byte: bool = True
) -> None:
    """Check the local shards of an index before they are used.

    Args:
        index: the shard set; copies of remote shards are checked when they are first used.
        how: ``size``; or ``sha256`` and ``auto``: every byte.
        stop: called for each MiB; the check ends when it returns True.
        every_byte: False = sizes alone, as the caller compares the rest later.

    Raises:
        DataError: a shard is missing, truncated or changed.
        Stopped: ``stop`` returned True.
    """

    def check(shard: Shard, stop: Callable[[], bool]) -> None:
        if stop():
            raise Stopped
        path = Path(index.place_of(shard)).expanduser()
        try:
            open_shard(path, shard).close()
        except OSError as error:
            raise unreadable(path, error) from None
        if how != "size" and every_byte:
            check_bytes(path, shard, stop)

    map_in_threads(check, index.local_shards, min(32, cores() + 4), stop)
