"""Downloads from servers that know no byte ranges, break off, refuse, lie or are slow."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CountingServer, write_shards
from launching import free_port, run, train

from pipeline.data import remote
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
    """One GET for each shard, into the job's folder on the node, which the log names once."""
    url, log = plain_server
    job, run_dir = tmp_path / "job", tmp_path / "run"
    job.mkdir()
    settings = (f"data.shards={url}", f"run.dir={run_dir}", "train.total_steps=5")
    output = train(1, tiny_config, *settings, SLURM_TMPDIR=str(job))
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
