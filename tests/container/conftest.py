"""The image, built from the shipped Dockerfile by buildah, which needs no engine and no daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from launching import REPO

PROGRAMS = ("buildah", "mmdebstrap")
IMAGE, STANDIN = "localhost/dcgan-pipeline-test", "localhost/dcgan-standin-base"
CHROOT = ["--isolation", "chroot"]
UID = 1000
# Settings of the host for its package index: pip, uv, and certificates of a proxy.
REACH = ("/etc/pip.conf", "/etc/uv/uv.toml", "/etc/ssl/certs")
REACH_AT_HOME = (".config/pip/pip.conf", ".pip/pip.conf", ".config/uv/uv.toml")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def buildah(*words: object, timeout: float = 1500) -> str:
    """Run a command of buildah and return its output, of a build with the log.

    The end of the output is the message of a failure.
    """
    done = subprocess.run(
        ["buildah", *map(str, words)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if words[0] == "bud" else subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    said = done.stderr or done.stdout
    assert done.returncode == 0, f"buildah {words[0]}: {done.returncode}\n{said[-4000:]}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A working container of the image, with ``work`` mounted as /runs and ``data`` as /data."""

    name: str
    work: Path
    data: Path

    def words(self, *words: object, **env: object) -> list[str]:
        mounts = ["-v", f"{self.work}:/runs", "-v", f"{self.data}:/data"]
        raw = Path("/usr/share/datasets")  # where Debian puts Fashion-MNIST
        mounts += ["-v", f"{raw}:{raw}:ro"] if raw.is_dir() else []
        settings = [f"--env={name}={value}" for name, value in env.items()]
        return ["buildah", "run", *CHROOT, *mounts, *settings, self.name, "--", *map(str, words)]

    def run(self, *words: object, **env: object) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as the user of the image."""
        return subprocess.run(
            self.words(*words, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )

    def pipeline(self, *words: object, **env: object) -> subprocess.CompletedProcess[str]:
        """Run the entry point, as `docker run IMAGE words` does; buildah run ignores it."""
        return self.run("/workspace/docker/entrypoint.sh", *words, **env)


def first_process(runner: subprocess.Popen[str]) -> psutil.Process:
    """Return the oldest process of the image's user, which `docker stop` would signal."""
    inside = [
        process
        for process in psutil.Process(runner.pid).children(recursive=True)
        if process.uids().real == UID and "buildah" not in process.cmdline()[0]
    ]
    return min(inside, key=lambda process: process.create_time())


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build the Dockerfile on a Debian 12 with Python and pip in place of its base image."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; see make test-container")
    if os.geteuid() != 0:
        pytest.skip("building in a chroot needs root")
    if STANDIN not in buildah("images", "--format", "{{.Name}}"):
        folder = tmp_path_factory.mktemp("base")
        packages = "--include=python3,python3-pip,ca-certificates"
        subprocess.run(
            ["mmdebstrap", "--variant=minbase", packages, "bookworm", folder / "root.tar"],
            check=True,
            capture_output=True,
            timeout=600,
        )
        (folder / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
        buildah("bud", *CHROOT, "--format", "docker", "-t", STANDIN, folder)
        (folder / "root.tar").unlink()
    reach = [*map(Path, REACH), *(Path.home() / path for path in REACH_AT_HOME)]
    mounts = [word for path in reach if path.exists() for word in ("-v", f"{path}:{path}:ro")]
    settings = ["--build-arg", f"BASE_IMAGE={STANDIN}"]
    if CERTIFICATES.exists():
        settings += ["--build-arg", f"SSL_CERT_FILE={CERTIFICATES}"]
    kind = ["--layers", "--format", "docker", "--file", "docker/Dockerfile", "-t", IMAGE]
    log = buildah("bud", *CHROOT, *settings, *mounts, *kind, REPO)
    print("the end of buildah's log:", *log.splitlines()[-25:], sep="\n")
    return IMAGE


@pytest.fixture(scope="module")
def container(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    folders = []
    for name in ("runs", "data"):
        folder = tmp_path_factory.mktemp(name)
        os.chown(folder, UID, UID)
        folders.append(folder)
    for parent in folders[0].parents[:2]:  # pytest's folders are its user's own
        parent.chmod(parent.stat().st_mode | 0o011)
    made = Container(buildah("from", image), *folders)
    yield made
    buildah("rm", made.name)
