"""A shard server that goes silent, drips, lies, redirects for ever or sends a body without end."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from base import Case, Process, Verdict
from world import World

HOURS = 3 * 3600
LIES = (
    *("silent", "silent before the header", "drip", "half", "reset", "other bytes", "shorter"),
    *("longer", "no length", "negative length", "redirect", "redirect to a file", "endless"),
    *("endless header", "500", "503", "403", "404", "page", "not http", "gzip"),
)


def cases(world: World) -> Iterator[Case]:
    for lie in LIES:
        for what in ("index.json", "index.json.samples.npy", "shard-000001.tar"):
            yield Case("server", lie, f"{lie}: {what}", partial(run, lie, what, False))
    for what in ("index.json", "shard-000001.tar"):
        yield Case("server", "stop", f"SIGTERM: {what}", partial(run, "silent", what, True))


def run(lie: str, what: str, stop: bool, world: World, _: Random) -> Verdict:
    world.baseline("train-url")
    world.restore()
    began = time.time()
    with serving(world.at / "shards", lie, what) as port:
        words = [
            *world.words("train-url")[:-1],
            f"data.shards=http://127.0.0.1:{port}",
        ]
        process = Process(words, world.at, prepare=None if stop else impatient)
        if stop:
            time.sleep(2)  # it waits for the server, or has not begun yet: both must end
            process.signal(signal.SIGTERM)
        ended = process.wait()
    if stop and ended.code == 0 and not ended.late:
        return Verdict("harmless", "stopped")
    return world.judge("train-url", [what], ended, began)


def impatient() -> None:
    """Wait a second for bytes instead of half a minute."""
    from pipeline.data import remote

    remote.IDLE_SECONDS, remote.FETCH_PAUSE = 1.0, 0.01


@contextlib.contextmanager
def serving(folder: Path, lie: str, what: str) -> Iterator[int]:
    """Serve a folder in another process; one of its files is served with a lie."""
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            serve(listener, folder, lie, what)
        os._exit(0)
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve(listener: socket.socket, folder: Path, lie: str, what: str) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if self.path.strip("/").startswith(what) and (
                self.path.strip("/") == what or lie == "redirect"
            ):
                with contextlib.suppress(OSError):
                    self.tell_lie((folder / what).read_bytes())
                self.close_connection = True
            else:
                super().do_GET()

        def head(self, code: int, length: object, **headers: str) -> None:
            self.send_response(code)
            if length is not None:
                self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def tell_lie(self, content: bytes) -> None:
            send, size = self.wfile.write, len(content)
            if lie.isdecimal():
                self.send_error(int(lie))
            elif lie == "silent before the header":
                time.sleep(HOURS)
            elif lie == "silent":
                self.head(200, size)
                send(content[: size // 2])
                time.sleep(HOURS)
            elif lie == "drip":
                self.head(200, size)
                for k in range(size):
                    send(content[k : k + 1])
                    time.sleep(0.5)
            elif lie in ("half", "reset"):
                self.head(200, size)
                send(content[: size // 2])
                if lie == "reset":
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                    )
            elif lie == "other bytes":
                self.head(200, size)
                send(bytes(255 - byte for byte in content))
            elif lie == "shorter":
                self.head(200, size // 2)
                send(content[: size // 2])
            elif lie in ("longer", "no length", "negative length"):
                self.head(200, {"longer": size + 99, "no length": None, "negative length": -5}[lie])
                send(content + b"x" * 99 * (lie == "longer"))
            elif lie == "redirect":
                self.head(302, 0, Location=f"{self.path}x")
            elif lie == "redirect to a file":
                self.head(302, 0, Location="file:///etc/passwd")
            elif lie == "endless":
                self.head(200, None)
                while True:
                    send(bytes(1 << 20))
            elif lie == "endless header":
                send(b"HTTP/1.1 200 OK\r\n")
                while True:
                    send(b"X-A: " + b"b" * 1000 + b"\r\n")
            elif lie == "page":
                self.head(200, 28, Content_Type="text/html")
                send(b"<html>please log in</html>  ")
            elif lie == "gzip":
                self.head(200, size, Content_Encoding="gzip")
                send(content)
            else:
                send(b"\xff\xfe not http at all\r\n\r\n")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(listener.getsockname(), Handler, False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()
