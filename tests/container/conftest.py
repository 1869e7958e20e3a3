"""The image, built from the shipped Dockerfile by a Docker engine, and containers of it."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launching import REPO

from .engine import PROGRAMS, Engine, engine

IMAGE = "dcgan-pipeline"  # the name in docker/README.md and compose.yaml
CPU_IMAGE = "dcgan-pipeline-cpu"
BARE, STANDIN = "dcgan-standin-bare", "dcgan-standin-base"
UID = 1000
DATA = "/data/fashion-mnist-32"
DEMO = ["train", "--config", "configs/demo.yaml", f"data.shards={DATA}"]
QUIET = ["train.checkpoint_every=0", "train.log_every=10", "tracking.wandb=offline"]
# Settings of the host for its package index: pip, uv, and certificates of a proxy.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
REACH = (Path("/etc/pip.conf"), Path("/etc/uv/uv.toml"), CERTIFICATES)
REACH_AT_HOME = (".config/pip/pip.conf", ".pip/pip.conf", ".config/uv/uv.toml")


@dataclass
class Container:
    """A container that runs in the background."""

    docker: Engine
    name: str

    def log(self) -> str:
        return self.docker.run("logs", self.name).stdout

    def is_running(self) -> bool:
        state = self.docker.run("inspect", "--format", "{{.State.Running}}", self.name)
        return state.stdout.strip() == "true"

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end and return the exit code."""
        try:
            return int(self.docker.docker("wait", self.name, timeout=timeout))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs after {timeout} s:\n{self.log()}") from None


@dataclass(frozen=True)
class Folders:
    """Folders of the image's user, mounted as /runs and /data into each container."""

    docker: Engine
    runs: Path
    data: Path
    image: str = IMAGE
    # One core, so that a busy machine does not make PyTorch's threads wait for each other.
    options: list[str] = field(default_factory=lambda: ["--cpuset-cpus=0"])

    def words(self, *words: object, options: Sequence[object], **env: object) -> list[object]:
        mounts = ["-v", f"{self.runs}:/runs", "-v", f"{self.data}:/data"]
        raw = Path("/usr/share/datasets")  # where Debian puts Fashion-MNIST
        mounts += ["-v", f"{raw}:{raw}:ro"] if raw.is_dir() else []
        settings = [f"--env={name}={value}" for name, value in env.items()]
        return [*self.options, *mounts, *settings, *options, self.image, *words]

    def run(
        self, *words: object, options: Sequence[object] = (), **env: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end: `docker run --rm OPTIONS IMAGE words`."""
        return self.docker.run("run", "--rm", *self.words(*words, options=options, **env))

    @contextmanager
    def started(
        self, name: str, *words: object, options: Sequence[object] = (), **env: object
    ) -> Iterator[Container]:
        """A container in the background, removed at the end of the block."""
        said = self.words(*words, options=options, **env)
        self.docker.docker("run", "--detach", "--name", name, *said)
        try:
            yield Container(self.docker, name)
        finally:
            self.docker.run("rm", "--force", name)


def steps(run: Path) -> list[int]:
    rows = run / "metrics.jsonl"
    return (
        [json.loads(row)["step"] for row in rows.read_text().splitlines()] if rows.exists() else []
    )


def wait_for_step(run: Path, *containers: Container, after: int = 0) -> None:
    """Wait until a run has logged a step after the given one; fail if a container ends before."""
    deadline = time.monotonic() + 300
    while not any(step > after for step in steps(run)):
        for one in containers:
            assert one.is_running(), one.log()
        assert time.monotonic() < deadline, f"no step after {after} within 300 s"
        time.sleep(0.2)


def _reach(folder: Path) -> None:
    """Copy the host's settings for its package index below a folder, by their paths."""
    for path in [*REACH, *(Path("/root") / one for one in REACH_AT_HOME)]:
        source = Path.home() / path.relative_to("/root") if path.is_relative_to("/root") else path
        if source.exists():
            copy = folder / path.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def _make_standin(docker: Engine, folder: Path) -> None:
    """Make a Debian 12 with Python and pip, in place of the Dockerfile's base image.

    It also knows how this machine reaches its package index, so the shipped Dockerfile need not.
    """
    if not docker.docker("images", "--quiet", BARE):
        packages = "--include=python3,python3-pip,ca-certificates"
        root = folder / "root.tar"
        subprocess.run(
            ["mmdebstrap", "--variant=minbase", packages, "bookworm", root],
            check=True,
            capture_output=True,
            timeout=600,
        )
        docker.docker("import", root, BARE)
        root.unlink()
    _reach(folder / "reach")
    (folder / "Dockerfile").write_text(f"FROM {BARE}\nCOPY reach /\n")
    docker.docker("build", "--tag", STANDIN, folder)


def build(docker: Engine, tag: str, *settings: str) -> None:
    """Build the shipped Dockerfile on the stand-in for its base image."""
    words = ["--build-arg", f"BASE_IMAGE={STANDIN}", *settings]
    if CERTIFICATES.exists():
        words += ["--build-arg", f"SSL_CERT_FILE={CERTIFICATES}"]
    file = ["--file", "docker/Dockerfile", "--network", "host", "--progress", "plain"]
    began = time.monotonic()
    log = docker.docker("build", *words, *file, "--tag", tag, REPO, timeout=1500)
    print(f"docker build of {tag}: {time.monotonic() - began:.0f} s; the end of its log:")
    print(*[line for line in log.splitlines() if line][-8:], sep="\n")


def cpu_wheel() -> Path | None:
    """Return a wheel of PyTorch for CPUs from where pip looks for files, if there is one."""
    places = os.environ.get("PIP_FIND_LINKS", "").split()
    found = [path for place in places for path in Path(place).glob("torch-*+cpu-cp311-*.whl")]
    return max(found, default=None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder of wheels to the build, as a find-links page."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    try:  # the same address as last time, so that the layers of an earlier build are found
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 28765), handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def tidy(docker: Engine) -> None:
    """Remove what earlier builds left, but the layers and packages that the next one needs."""
    docker.docker("image", "prune", "--force")
    docker.docker("builder", "prune", "--force", "--keep-storage", "16GB")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the image and, if this machine has a CPU build of PyTorch, the CPU image."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; see make test-container")
    if os.geteuid() != 0:
        pytest.skip("a Docker engine needs root")
    with engine(isolated=False) as docker:
        _make_standin(docker, tmp_path_factory.mktemp("base"))
        build(docker, IMAGE)
        if (wheel := cpu_wheel()) is None:
            tidy(docker)
            return {IMAGE}
        with served(wheel.parent) as url:
            torch = f"TORCH=torch=={wheel.name.split('-')[1]}"
            build(docker, CPU_IMAGE, "--build-arg", torch, "--build-arg", f"UV_FIND_LINKS={url}")
        tidy(docker)
    return {IMAGE, CPU_IMAGE}


@pytest.fixture(scope="session")
def docker(built: set[str]) -> Iterator[Engine]:
    """An engine whose containers reach each other and nothing else."""
    with engine(isolated=True) as running:
        yield running


@pytest.fixture(scope="session")
def folders(docker: Engine, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made = []
    for name in ("runs", "data"):
        folder = tmp_path_factory.mktemp(name)
        os.chown(folder, UID, UID)
        folder.chmod(0o755)
        made.append(folder)
    for parent in made[0].parents[:2]:  # pytest's folders are its user's own
        parent.chmod(parent.stat().st_mode | 0o011)
    return Folders(docker, *made)


@pytest.fixture(scope="session")
def data(folders: Folders) -> Path:
    """Fashion-MNIST as shards of 32x32 pixels, prepared by the image."""
    done = folders.run("prepare", "fashion-mnist", "--out", DATA, "--size", 32, "--channels", 1)
    if "/usr/share/datasets" in done.stdout and done.returncode:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout
    return folders.data / Path(DATA).name
