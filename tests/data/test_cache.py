"""Copies of remote shards: compared when they are used, set aside and replaced when damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CountingServer, pixels_of

from pipeline.data import cache as caching
from pipeline.data import checksums, remote
from pipeline.data.cache import Cache, map_in_threads
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, Shard, read_index
from pipeline.runtime.documents import sealed
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.locks import FileLock
from pipeline.runtime.signals import Stopped, never_stop

SHAPE = (8, 8, 3)
SAMPLE = 30  # in the third shard


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FETCH_PAUSE", 0.01)


@pytest.fixture
def served(
    uneven: Index, serve: Callable[[Path], CountingServer], tmp_path: Path
) -> tuple[CountingServer, Index, Path]:
    """(server, index read over http, the copy of its third shard, which was just downloaded)."""
    server = serve(Path(shutil.copytree(uneven.location, tmp_path / "set")))
    index = read_index(server.url)
    copy = Cache(index, str(tmp_path / "cache")).path(index.shards[2])
    new_run()
    return server, index, copy


def new_run() -> None:
    """Forget what this process compared, as a new process does not know it."""
    checksums._compared.clear()


def read(index: Index, folder: Path) -> None:
    """Read a sample through the cache, which must be right."""
    out = np.zeros((1, *SHAPE), np.uint8)
    Reader(index, Cache(index, str(folder))).read(np.array([SAMPLE]), out)
    assert np.array_equal(out[0], pixels_of(SAMPLE, SHAPE))


def inverted(content: bytes) -> bytes:
    return content[:512] + bytes(255 - byte for byte in content[512:])


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


HARM = {
    "inverted": inverted,
    "one bit": flipped,
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + bytes(512),
}


@pytest.mark.parametrize("times_kept", [False, True])
@pytest.mark.parametrize("name", HARM)
def test_a_damaged_copy_is_set_aside_and_downloaded_again(
    name: str,
    times_kept: bool,
    served: tuple[CountingServer, Index, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Said with its name, kept as NAME.damaged, replaced; also if its times were set back."""
    server, index, copy = served
    before, harmed = copy.stat(), HARM[name](copy.read_bytes())
    copy.write_bytes(harmed)
    if times_kept:
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        read(index, copy.parent)
        new_run()
    aside = copy.with_name(f"{copy.name}.damaged")
    assert aside.read_bytes() == harmed
    assert sha256_of(copy) == index.shards[2].sha256
    said = [line for line in capfd.readouterr().err.splitlines() if "set aside" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{copy}: ")
    assert f"set aside as {aside.name} and downloaded again" in said[0]
    assert server.gets[index.shards[2].url] == 2


@pytest.mark.parametrize("what", ["fifo", "folder", "link to nothing", "link to another file"])
def test_what_is_no_copy_is_set_aside_too(
    what: str, served: tuple[CountingServer, Index, Path]
) -> None:
    """A FIFO is not waited for; a link is not written through."""
    _, index, copy = served
    copy.unlink()
    other = copy.with_name("other")
    other.write_bytes(b"precious")
    if what == "fifo":
        os.mkfifo(copy)
    elif what == "folder":
        copy.mkdir()
    else:
        copy.symlink_to(other if "another" in what else copy.with_name("nowhere"))
    read(index, copy.parent)
    assert os.path.lexists(f"{copy}.damaged")
    assert other.read_bytes() == b"precious"
    assert copy.is_file()
    assert not copy.is_symlink()


def test_a_right_copy_is_compared_once_by_all_processes_together(
    served: tuple[CountingServer, Index, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its record none reads it; without one the first does, and writes the record."""
    server, index, copy = served
    compared = []
    real = caching.fault_of
    monkeypatch.setattr(
        caching, "fault_of", lambda path, *rest: compared.append(path) or real(path, *rest)
    )
    read(index, copy.parent)
    assert compared == []
    checksums.record_of(copy).unlink()
    for _ in range(3):
        new_run()
        read(index, copy.parent)
    assert compared == [copy]
    assert server.gets[index.shards[2].url] == 1


def right(copy: Path, index: Index) -> dict[str, object]:
    found = checksums.marks(copy.stat())
    return checksums._record(index.shards[2].sha256, found)


HOSTILE = {
    "no JSON": b"{",
    "a list": b"[]",
    "empty": b"",
    "deep": b"[" * 4000,
    "long": b" " * (1 << 20),
    "another digest": b'{"sha256": 1, "digest": "0"}',
    "numbers": json.dumps(sealed({"sha256": 1e400, "size": "x", "inode": -1})).encode(),
}


@pytest.mark.parametrize("name", [*HOSTILE, "fifo", "folder", "of another file"])
def test_a_record_that_is_not_right_is_not_believed(
    name: str, served: tuple[CountingServer, Index, Path]
) -> None:
    """The copy was harmed; whatever stands in the record, its bytes are compared."""
    _, index, copy = served
    record = checksums.record_of(copy)
    stored = json.loads(record.read_bytes())
    assert stored == right(copy, index)
    record.unlink()
    copy.write_bytes(inverted(copy.read_bytes()))
    if name == "fifo":
        os.mkfifo(record)
    elif name == "folder":
        record.mkdir()
    elif name == "of another file":
        record.write_text(json.dumps(stored))
    else:
        record.write_bytes(HOSTILE[name])
    read(index, copy.parent)
    assert copy.with_name(f"{copy.name}.damaged").exists()


def test_a_copy_that_cannot_be_read_is_not_set_aside(
    served: tuple[CountingServer, Index, Path],
) -> None:
    """Without permission or file descriptors a copy may be whole: a message, and no download."""
    server, index, copy = served
    code = (
        "import os, resource, sys\n"
        "from pipeline.data.cache import *; from pipeline.data.shards import *\n"
        "from pipeline.runtime.errors import DataError\n"
        "index = read_index(sys.argv[1])\n"
        "cache = Cache(index, sys.argv[2])\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: cache.path(index.shards[2])\n"
        "except DataError as error: print(error)\n"
    )
    checksums.record_of(copy).unlink()
    copy.chmod(0)
    for folder in (copy.parent, *copy.parent.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    copy.parent.chmod(0o777)
    copy.with_name(f"{copy.name}.lock").chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-c", code, server.url, str(copy.parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Permission denied" in done.stdout, done.stderr
    assert "Give permission" in done.stdout
    assert copy.exists()
    assert server.gets[index.shards[2].url] == 1


def test_eviction_removes_the_least_recently_used_copy_with_its_record(
    served: tuple[CountingServer, Index, Path],
) -> None:
    """Use is noted on the record, so that the copy itself need not be compared again."""
    _, index, copy = served
    sizes = [shard.filesize for shard in index.shards]
    cache = Cache(index, str(copy.parent), (sizes[2] + sizes[5]) / 2**30 + 1e-6)
    other = cache.path(index.shards[5])
    old = time.time() - 1000
    for path in (copy, other):
        os.utime(checksums.record_of(path), (old, old))
    cache.path(index.shards[2])
    assert checksums.is_compared(copy, index.shards[2].sha256, record=True)
    limit = (sizes[2] + sizes[7]) / 2**30 + 1e-6
    Cache(index, str(copy.parent), limit).path(index.shards[7])
    assert copy.exists()
    assert not other.exists()
    assert not checksums.record_of(other).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_an_evicted_copy_takes_no_room_on_the_disk(
    served: tuple[CountingServer, Index, Path],
) -> None:
    """A reader closes it, and downloads it again when it is read again: the limit is kept."""
    server, index, copy = served
    limit = 2 * max(shard.filesize for shard in index.shards) / 2**30
    reader = Reader(index, Cache(index, str(copy.parent), limit))
    out = np.empty((1, *index.shape), np.uint8)
    starts = np.cumsum([0, *index.sizes[:-1]])
    for turn in (1, 2):
        for first in starts.tolist():
            reader.read(np.array([first]), out)
            opened = [
                (str(file.readlink()), file.stat().st_size)
                for file in Path("/proc/self/fd").iterdir()
                if file.is_symlink()
            ]
            copies = {name: size for name, size in opened if str(copy.parent) in name}
            assert sum(copies.values()) <= limit * 2**30
            assert not any("deleted" in name for name in copies)
        asked = [server.gets[shard.url] for shard in index.shards if shard.nsamples]
        assert min(asked) >= turn


def test_a_name_as_long_as_a_file_system_allows(
    served: tuple[CountingServer, Index, Path], tmp_path: Path
) -> None:
    """The copy has a shorter name, with room for that of its lock and its record."""
    server, index, copy = served
    long = ("x" * 151 + "é" * 50 + ".tar")[:255]
    Path(tmp_path / "set", index.shards[2].url).rename(tmp_path / "set" / long)
    shards = list(index.shards)
    shards[2] = replace(shards[2], url=long)
    copy.unlink()
    read(replace(index, shards=tuple(shards)), copy.parent)
    assert server.gets.total()
    assert len(list(copy.parent.glob("*éé.tar"))) == 1


# -- waits --------------------------------------------------------------------------------------


def locked_elsewhere(copy: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of a copy, until its standard input is closed."""
    code = (
        "import sys; from pathlib import Path; from pipeline.runtime.locks import *\n"
        "lock = FileLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, f"{copy}.lock"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_that_another_process_holds_is_not_waited_for_for_ever(
    served: tuple[CountingServer, Index, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop ends the wait; so does a holder that downloads nothing; a download goes on."""
    _, index, copy = served
    copy.unlink()
    with locked_elsewhere(copy) as holder:
        try:
            with pytest.raises(Stopped):
                Cache(index, str(copy.parent), stop=lambda: True).path(index.shards[2])
            monkeypatch.setattr(caching, "LOCK_SECONDS", 0.5)
            with pytest.raises(DataError, match="End that process, or give another"):
                Cache(index, str(copy.parent)).path(index.shards[2])
            growing, stop = copy.with_name(f"{copy.name}.host.1.tmp"), threading.Event()

            def grow() -> None:
                while not stop.wait(0.02):
                    with growing.open("ab") as file:
                        file.write(b"x")

            monkeypatch.setattr(caching, "LOCK_SECONDS", 30.0)
            grower = threading.Thread(target=grow)
            grower.start()
            until = time.monotonic() + 1
            waiting = Cache(index, str(copy.parent), stop=lambda: time.monotonic() > until)
            with pytest.raises(Stopped):
                waiting.path(index.shards[2])
            stop.set()
            grower.join()
        finally:
            assert holder.stdin is not None
            holder.stdin.close()
            holder.wait()
    with FileLock(Path(f"{copy}.lock")) as lock:
        assert lock.acquire(wait=False)


def test_the_first_error_ends_the_work_on_other_shards(uneven: Index) -> None:
    """Calls that wait are told to stop, and those that have not begun never begin."""
    begun: list[str] = []

    def work(shard: Shard, stop: Callable[[], bool]) -> None:
        begun.append(shard.url)
        if shard == uneven.shards[2]:
            raise DataError("not found")
        while not stop():
            time.sleep(0.01)

    with pytest.raises(DataError, match="not found"):
        map_in_threads(work, uneven.shards, 3, never_stop)
    assert len(begun) <= 4


def test_a_stop_ends_all_downloads_at_once(
    served: tuple[CountingServer, Index, Path], tmp_path: Path
) -> None:
    """Eight threads that wait for a silent server, more shards behind them."""
    server, index, _ = served
    server.hold.clear()
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    try:
        with pytest.raises(Stopped):
            Cache(index, str(tmp_path / "other"), stop=stop.is_set).fetch_all(2)
        assert sum(server.gets[shard.url] for shard in index.shards) <= 3
    finally:
        server.hold.set()
    assert not list((tmp_path / "other").glob("*.tmp"))
