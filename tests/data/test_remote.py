"""Downloads from servers that know no byte ranges, break off, refuse, lie or are slow."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
from conftest import CountingServer, write_shards
from launching import TIMEOUT, free_port, run, started, train, wait_for

from pipeline.data import remote, shards
from pipeline.data.cache import HOME_FOLDER, Cache, node_folder
from pipeline.data.shards import Index, read_index
from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.errors import DataError
from pipeline.runtime.signals import Stopped

CONTENT = os.urandom(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Answer = Callable[[socket.socket], None]


@pytest.fixture
def answering() -> Iterator[Callable[[Answer], str]]:
    """A function: answer -> URL of a server that gives it to every request, byte by byte."""
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = server.accept()
                        with connection, contextlib.suppress(OSError):
                            connection.recv(65536)
                            answer(connection)

            threading.Thread(target=serve, daemon=True).start()
            stack.callback(server.shutdown, socket.SHUT_RDWR)
            return f"http://127.0.0.1:{server.getsockname()[1]}/file"

        yield start


def head(status: str = "200 OK", *fields: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *fields, "", "")).encode()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between attempts are not what is tested."""
    monkeypatch.setattr(remote, "FETCH_PAUSE", 0.01)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """3,000 gray images in one shard above 5 MiB, and one small shard."""
    index = write_shards(tmp_path_factory.mktemp("big"), [3000, 10], (32, 32, 1))
    assert index.shards[0].filesize > 5 << 20
    return index


@pytest.fixture
def plain_server(big: Index, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, log) of ``python -m http.server`` on that set: it answers no byte ranges."""
    port, log = free_port(), tmp_path / "server.log"
    words = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with log.open("w") as out:
        server = subprocess.Popen([*words, "-d", big.location], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", log
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_training_reads_big_shards_without_byte_ranges(
    plain_server: tuple[str, Path], tiny_config: Path, tmp_path: Path
) -> None:
    """One GET for each shard, into the job's folder on the node, which the log names once.

    A window is set, so that they are downloaded during the run: its rows say what that took.
    """
    url, log = plain_server
    job, run_dir = tmp_path / "job", tmp_path / "run"
    job.mkdir()
    settings = (
        *(f"data.shards={url}", f"run.dir={run_dir}", "train.total_steps=5"),
        *("data.block=3000", "data.window=3010", "train.log_every=1"),
    )
    output = train(1, tiny_config, *settings, SLURM_TMPDIR=str(job))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row["perf/fetch_mb_per_sec"] for row in rows) > 0
    assert all(row["perf/fetch_wait"] >= 0 <= row["perf/cache_gib"] for row in rows)
    folder = job / f"dcgan-pipeline-{os.getuid()}" / "shards"
    assert output.count(f"kept in {folder} (data.cache_dir)\n") == 1
    assert len(list(folder.glob("*.tar"))) == 2
    assert log.read_text().count("shard-000000.tar") == 1
    assert step_of(committed(run_dir)[-1]) == 5
    assert "SLURM" not in (run_dir / "config.yaml").read_text()
    assert str(job) not in (run_dir / "config.yaml").read_text()


@pytest.mark.slow
def test_a_training_whose_server_breaks_off_ends_with_one_message(
    big: Index, serve: Callable[[Path], CountingServer], tiny_config: Path, tmp_path: Path
) -> None:
    """Two transfers of a big shard that end midway are repeated; when all do, one line says so."""
    server = serve(Path(big.location))
    settings = (f"data.shards={server.url}", f"data.cache_dir={tmp_path / 'cache'}")
    words = (1, tiny_config, *settings, f"run.dir={tmp_path / 'run'}", "train.total_steps=3")
    server.cut_short["shard-000000.tar"] = 99
    code, output = run(*words)
    assert code == 2
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "shard-000000.tar: cannot be fetched" in errors[0]
    assert "bytes early" in errors[0]
    assert not list((tmp_path / "cache").glob("*-000000.tar"))
    server.cut_short["shard-000000.tar"] = 2
    train(*words)
    copy = next((tmp_path / "cache").glob("*-000000.tar"))
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == big.shards[0].sha256


REFUSALS = {
    "403 Forbidden": r"refused by the server \(403 Forbidden\)",
    "401 Unauthorized": r"refused by the server \(401 Unauthorized\)",
    "404 Not Found": "not found",
    "302 Found": r"refused by the server \(302 .*file:",
}


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_is_final(
    status: str, answering: Callable[[Answer], str], tmp_path: Path
) -> None:
    """Asked once; a redirection to a file of this machine is not followed."""
    asked = []

    def answer(connection: socket.socket) -> None:
        asked.append(status)
        connection.sendall(head(status, "Location: file:///etc/hostname", "Content-Length: 0"))

    with pytest.raises(DataError, match=REFUSALS[status]):
        remote.fetch(answering(answer), tmp_path / "copy", SHA256, size=len(CONTENT))
    assert len(asked) == 1
    assert not list(tmp_path.iterdir())


LIES = {
    "too long": (head("200 OK", f"Content-Length: {len(CONTENT) + 9}") + CONTENT, ""),
    "too short": (head("200 OK", "Content-Length: 99999") + CONTENT, "bytes early"),
    "empty": (head("200 OK", "Content-Length: 0"), "bytes early"),
    "empty, no length": (head(), "bytes early"),
    "half, no length": (head() + CONTENT[: len(CONTENT) // 2], "bytes early"),
    "more, no length": (head() + CONTENT + b"more", "longer than the"),
    "another file": (head() + CONTENT[::-1], "its sha256 is"),
    "no http": (b"220 mail.example.org ESMTP\r\n", "cannot be fetched"),
    "nothing": (b"", "cannot be fetched"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies_never_gives_wrong_bytes(
    name: str, answering: Callable[[Answer], str], tmp_path: Path
) -> None:
    """The right bytes, where all of them came, or one error and nothing in the folder."""
    bytes_sent, fault = LIES[name]
    url = answering(lambda connection: connection.sendall(bytes_sent))
    if not fault:
        remote.fetch(url, tmp_path / "copy", SHA256, size=len(CONTENT))
        assert (tmp_path / "copy").read_bytes() == CONTENT
        return
    with pytest.raises(DataError, match=fault):
        remote.fetch(url, tmp_path / "copy", SHA256, size=len(CONTENT))
    assert not list(tmp_path.iterdir())


def test_a_chunked_answer_is_read(answering: Callable[[Answer], str], tmp_path: Path) -> None:
    """No Content-Length, but pieces with a length each: whole, or broken off."""
    cuts = [0, 1, 70_000, len(CONTENT)]
    parts = [CONTENT[a:b] for a, b in itertools.pairwise(cuts)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    begin = head("200 OK", "Transfer-Encoding: chunked")
    whole = answering(lambda connection: connection.sendall(begin + body + b"0\r\n\r\n"))
    remote.fetch(whole, tmp_path / "copy", SHA256)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    broken = answering(lambda connection: connection.sendall(begin + body[:200_000]))
    with pytest.raises(DataError, match="cannot be fetched"):
        remote.fetch(broken, tmp_path / "other", SHA256)
    assert not (tmp_path / "other").exists()


def test_an_answer_that_drips_fails_in_bounded_time(
    answering: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then keeps a connection alive, but is no download."""
    monkeypatch.setattr(remote, "IDLE_SECONDS", 0.3)
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(head("200 OK", f"Content-Length: {len(CONTENT)}"))
        while not over.wait(0.05):
            connection.sendall(b"x")

    url = answering(drip)
    try:
        with pytest.raises(DataError, match="slower than 1024 bytes per second"):
            remote.fetch(url, tmp_path / "copy", SHA256, size=len(CONTENT))
        with pytest.raises(DataError, match="slower than 1024 bytes per second"):
            read_index(url.removesuffix("/file"))
    finally:
        over.set()


def test_a_stop_is_seen_while_a_server_is_slow(
    answering: Callable[[Answer], str], tmp_path: Path
) -> None:
    """After the bytes that have come, not after a MiB; and between two attempts."""
    over = threading.Event()

    def slow(connection: socket.socket) -> None:
        connection.sendall(head("200 OK", f"Content-Length: {len(CONTENT)}") + CONTENT[:9])
        over.wait(60)

    try:
        with pytest.raises(Stopped):
            remote.fetch(answering(slow), tmp_path / "copy", SHA256, stop=lambda: True)
        over.set()
        refused = answering(lambda connection: None)
        with pytest.raises(Stopped):
            remote.fetch(refused, tmp_path / "copy", SHA256, stop=lambda: True)
    finally:
        over.set()
    assert not list(tmp_path.iterdir())


# -- servers that never end ---------------------------------------------------------------------


def silent(_: socket.socket, over: threading.Event) -> None:
    over.wait(120)


def silent_after_the_head(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(head("200 OK", f"Content-Length: {len(CONTENT)}") + CONTENT[:9])
    over.wait(120)


def head_that_drips(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not over.wait(0.05):
        connection.sendall(b"X-More: 1\r\n")


def body_that_drips(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(head("200 OK", f"Content-Length: {len(CONTENT)}"))
    while not over.wait(0.05):
        connection.sendall(b"x")


def chunks_that_drip(connection: socket.socket, over: threading.Event) -> None:
    connection.sendall(head("200 OK", "Transfer-Encoding: chunked"))
    while not over.wait(0.05):
        connection.sendall(b"1\r\nx\r\n")


STALLS = {
    each.__name__: each
    for each in (
        silent,
        silent_after_the_head,
        head_that_drips,
        body_that_drips,
        chunks_that_drip,
    )
}


@pytest.fixture
def stalling(answering: Callable[[Answer], str]) -> Iterator[Callable[[str], str]]:
    """A function: name of a stall -> URL of a server that stalls so until the test is over."""
    over = threading.Event()
    yield lambda name: answering(lambda connection: STALLS[name](connection, over))
    over.set()


@pytest.mark.parametrize("name", STALLS)
def test_a_server_that_stalls_is_given_up(
    name: str,
    stalling: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every attempt ends, for a shard as for an index; the message says why and what to do."""
    monkeypatch.setattr(remote, "IDLE_SECONDS", 0.4)
    monkeypatch.setattr(remote, "FETCH_ATTEMPTS", 2)
    url = stalling(name)
    for attempt in (
        lambda: remote.fetch(url, tmp_path / "copy", SHA256, size=len(CONTENT)),
        lambda: read_index(url.removesuffix("/file")),
    ):
        with pytest.raises(DataError, match=r"cannot be fetched.*See that its server answers"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STALLS)
def test_a_stop_ends_the_wait_for_a_server_that_stalls(
    name: str, stalling: Callable[[str], str], tmp_path: Path
) -> None:
    """Long before the server is given up: within two seconds and not half a minute."""
    url, began = stalling(name), time.monotonic()
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        remote.fetch(url, tmp_path / "copy", SHA256, size=len(CONTENT), stop=stop.is_set)
    with pytest.raises(Stopped):
        read_index(url.removesuffix("/file"), stop=stop.is_set)
    assert time.monotonic() - began < remote.IDLE_SECONDS / 2
    assert not list(tmp_path.iterdir())


STOPPED = """
import sys
from pathlib import Path
from pipeline.runtime import signals
signals.install()
from pipeline.data.cache import Cache
from pipeline.data.remote import fetch
from pipeline.data.shards import Shard, Index, read_index
from pipeline.runtime.errors import exit_on_user_error

url, folder = sys.argv[1], Path(sys.argv[2])
print("ready", flush=True)
with exit_on_user_error():
    if sys.argv[3] == "index":
        read_index(url)
    elif sys.argv[3] == "file":
        fetch(url + "/file", folder / "copy", "0" * 64)
    else:
        index = Index(url, "npy", (8, 8, 3), (), None)
        Cache(index, str(folder)).path(Shard("a.tar", 1, 9999, "0" * 64))
"""


@pytest.mark.parametrize("what", ["index", "file", "shard"])
def test_sigterm_ends_any_command_that_waits_for_a_server(
    what: str, stalling: Callable[[str], str], tmp_path: Path
) -> None:
    """Also those that pass no stop function: one message, exit code 2, nothing left behind."""
    url = stalling("silent").removesuffix("/file")
    words = [sys.executable, "-c", STOPPED, url, str(tmp_path), what]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        began = time.monotonic()
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT)
        assert time.monotonic() - began < remote.IDLE_SECONDS / 2
    assert process.returncode == 2
    assert "a stop was requested while a server was waited for" in said.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_file_system_of_fsspec_that_stalls_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own timeouts do not matter: opening or reading that never ends."""
    monkeypatch.setattr(remote, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(remote, "FETCH_ATTEMPTS", 2)
    over = threading.Event()

    class Stalling(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "stalling"

        def _open(self, path: str, *_: object, **__: object) -> object:
            over.wait(120)
            raise FileNotFoundError(path)

    fsspec.register_implementation("stalling", Stalling, clobber=True)
    try:
        with pytest.raises(DataError, match="no byte for"):
            remote.fetch("stalling://a/b", tmp_path / "copy", SHA256)
        with pytest.raises(Stopped):
            remote.read_url("stalling://a/b", 99, stop=lambda: True)
    finally:
        over.set()


def test_an_index_without_an_end_is_refused(
    answering: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more is read than the largest document; nor of a shard of unknown size."""
    monkeypatch.setattr(shards, "LARGEST_INDEX", 1 << 20)
    monkeypatch.setattr(remote, "LARGEST", 1 << 20)
    sent = []

    def endless(connection: socket.socket) -> None:
        connection.sendall(head("200 OK"))
        while True:
            connection.sendall(b" " * 65536)
            sent.append(65536)

    url = answering(endless)
    with pytest.raises(DataError, match=r"index\.json: has more than 1048576 bytes"):
        read_index(url.removesuffix("/file"))
    assert sum(sent) < 64 << 20


def test_a_file_of_unknown_size_without_an_end_is_refused(
    answering: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are fetched without their size; the disk is not filled."""
    monkeypatch.setattr(remote, "LARGEST", 1 << 20)

    def endless(connection: socket.socket) -> None:
        connection.sendall(head("200 OK"))
        while True:
            connection.sendall(b" " * 65536)

    with pytest.raises(DataError, match="longer than the 1048576 bytes"):
        remote.fetch(answering(endless), tmp_path / "copy", SHA256)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
def test_redirections_in_a_circle_end(
    status: str, answering: Callable[[Answer], str], tmp_path: Path
) -> None:
    """Ten or so, then one message; a reason with escape codes is printed without them."""
    asked = []

    def answer(connection: socket.socket) -> None:
        asked.append(status)
        connection.sendall(head(f"{status}\x1b[2J", "Location: /file", "Content-Length: 0"))

    with pytest.raises(DataError, match="refused by the server") as caught:
        remote.fetch(answering(answer), tmp_path / "copy", SHA256, size=len(CONTENT))
    assert str(caught.value).isprintable()
    assert len(asked) < 20


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.faults)])
@pytest.mark.parametrize("window", [0, 100])
def test_sigterm_ends_a_training_whose_shard_server_went_silent(
    workers: int,
    window: int,
    serve: Callable[[Path], CountingServer],
    make_shards: Callable[..., Index],
    tiny_config: Path,
    tmp_path: Path,
) -> None:
    """Before the first step, or amid the run: out within seconds, no traceback, no process left."""
    make_shards(tmp_path / "set", [40, 40, 40], (32, 32, 1))
    server = serve(tmp_path / "set")
    server.hold.clear()
    settings = (
        *(f"data.shards={server.url}", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"run.dir={tmp_path / 'run'}", f"data.workers={workers}", f"data.window={window}"),
        *("train.total_steps=3", "data.block=8"),
    )
    try:
        with started(1, tiny_config, *settings) as process:
            wait_for(
                lambda: any(name.endswith(".tar") for name in server.gets), "request for a shard"
            )
            children = psutil.Process(process.pid).children(recursive=True)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=TIMEOUT)
            assert time.monotonic() - began < 60, output
            _, left = psutil.wait_procs(children, timeout=30)
            assert not left
    finally:
        server.hold.set()
    assert "Traceback" not in output
    if window:
        assert process.returncode == 2, output
        assert "a stop was requested while a shard was waited for" in output
    else:
        assert process.returncode == 0, output
        assert (tmp_path / "run" / "PREEMPTED").exists()


# -- where the copies are kept ------------------------------------------------------------------


def test_the_cache_is_in_the_first_usable_folder_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM_TMPDIR, TMPDIR, then home; what is missing, relative or no folder is passed over."""
    job, tmp = tmp_path / "job", tmp_path / "tmp"
    job.mkdir()
    tmp.mkdir()
    mine = f"dcgan-pipeline-{os.getuid()}/shards"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for slurm, other, expected in (
        (job, tmp, job / mine),
        ("", tmp, tmp / mine),
        (tmp_path / "missing", tmp, tmp / mine),
        (__file__, tmp, tmp / mine),
        ("job", "tmp", tmp_path / "home" / HOME_FOLDER.removeprefix("~/")),
    ):
        monkeypatch.setenv("SLURM_TMPDIR", str(slurm))
        monkeypatch.setenv("TMPDIR", str(other))
        assert node_folder() == expected
    assert (job / mine).parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_another_user_made_is_not_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a /tmp of all users, someone else may have put shards of theirs under our name."""
    name = f"dcgan-pipeline-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).symlink_to(tmp_path / "theirs")
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "a"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "b"))
    assert node_folder() == tmp_path / "b" / name / "shards"
    if os.getuid() == 0:
        os.chown(tmp_path / "b" / name, 12345, 12345)
        assert node_folder() == Path(HOME_FOLDER).expanduser()


def test_local_shards_need_no_cache_folder(
    uneven: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made in TMPDIR for a set that is not downloaded."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    Cache(uneven, "").path(uneven.shards[2])
    assert not list(tmp_path.iterdir())
