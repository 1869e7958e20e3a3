"""A Docker engine for the tests: dockerd with folders of its own, gone when they end.

It runs in a mount namespace, so no mount of a container outlives it. To run containers it also gets
a network namespace: its bridges and firewall rules are not the machine's, and the containers reach
each other and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launching import REPO

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcgan-pipeline/docker"
# Debian's client before one of another package: it builds with BuildKit without a plugin.
CLIENT = shutil.which("docker", path=f"/usr/bin{os.pathsep}{os.environ.get('PATH', '')}")
PROGRAMS = ("dockerd", "docker", "mmdebstrap", "unshare", "setpriv")


@dataclass(frozen=True)
class Engine:
    """A running dockerd; ``docker`` is its command line."""

    socket: Path

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(CACHE / "config"),  # where the compose plugin is
            "DOCKER_BUILDKIT": "1",
        }

    def start(self, *words: object, **env: str) -> subprocess.Popen[str]:
        """Start a command of docker; its output is one stream."""
        return subprocess.Popen(
            [CLIENT or "docker", *map(str, words)],
            cwd=REPO,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, *words: object, timeout: float = 600, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of docker to its end, whatever its exit code."""
        process = self.start(*words, **env)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def docker(self, *words: object, timeout: float = 600, **env: str) -> str:
        """Run a command of docker and return its output; a failure shows the end of it."""
        done = self.run(*words, timeout=timeout, **env)
        shown = " ".join(map(str, words))[:200]
        assert done.returncode == 0, f"docker {shown}: {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout.strip()


@contextmanager
def engine(*, isolated: bool) -> Iterator[Engine]:
    """Run dockerd until the block ends.

    Args:
        isolated: in a network namespace of its own, with bridges. Else without bridges, for builds
            that reach package indexes through the machine's network.
    """
    (CACHE / "config").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="dcgan-docker-"))
    made = Engine(folder / "socket")
    words = ["dockerd", "--data-root", CACHE / "root", "--exec-root", folder / "exec"]
    words += ["--pidfile", folder / "pid", "--host", f"unix://{made.socket}", "--bridge=none"]
    if isolated:
        # setpriv: the engine ends with the tests, even with killed ones.
        start = ["setpriv", "--pdeathsig", "TERM", "unshare", "--mount", "--net"]
    else:
        start = ["setpriv", "--pdeathsig", "TERM", "unshare", "--mount"]
        words += ["--iptables=false", "--ip-forward=false"]
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen([*start, *map(str, words)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while made.run("version").returncode != 0:
            said = (folder / "log").read_text()[-2000:]
            assert daemon.poll() is None, f"dockerd ended with {daemon.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{said}"
            time.sleep(0.2)
        remove_containers(made)  # of tests that were killed
        yield made
        remove_containers(made)
    finally:
        daemon.terminate()
        daemon.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def remove_containers(engine: Engine) -> None:
    if left := engine.docker("ps", "--all", "--quiet").split():
        engine.docker("rm", "--force", *left)


def has_compose(engine: Engine) -> bool:
    """Return whether this is Compose 2 of at least 2.24, whose files know ``!reset``."""
    found = re.search(r"(\d+)\.(\d+)", engine.run("compose", "version").stdout)
    return found is not None and tuple(map(int, found.groups())) >= (2, 24)
