"""What docker/libraries.sh asks of uv; a stand-in for uv notes it, so this needs no engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import REPO

UV = (
    '#!/bin/sh\necho "uv $*" >>asked\nfor last; do :; done\n[ ! -f "$last" ] || cp "$last" locked\n'
)


def asked(folder: Path, torch: str, **env: str) -> tuple[list[str], set[str]]:
    """Return the calls of uv, and the names in the lock file that it was given."""
    (folder / "bin").mkdir()
    (folder / "bin" / "uv").write_text(UV)
    (folder / "bin" / "uv").chmod(0o755)
    shutil.copy(REPO / "requirements.txt", folder)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    words = ["sh", str(REPO / "docker" / "libraries.sh"), torch, "/opt/venv"]
    subprocess.run(words, cwd=folder, env=clean | {"PATH": path} | env, check=True)
    locked = (folder / "locked").read_text()
    assert "--hash=sha256:" in locked
    return (folder / "asked").read_text().splitlines(), set(
        re.findall(r"^([a-z0-9-]+)==", locked, re.M)
    )


def test_the_image_takes_the_whole_lock_file_with_its_hashes(tmp_path: Path) -> None:
    calls, names = asked(tmp_path, "cuda")
    assert len(calls) == 2
    assert "pip sync" in calls[1]
    assert "--require-hashes" in calls[1]
    assert {"torch", "triton", "nvidia-nccl-cu13", "accelerate"} <= names


@pytest.mark.parametrize("index", ["", "UV_INDEX", "UV_FIND_LINKS"])
def test_the_cpu_image_takes_cpu_builds_of_the_locked_versions(tmp_path: Path, index: str) -> None:
    calls, names = asked(tmp_path, "cpu", **({index: "https://mirror"} if index else {}))
    assert "--require-hashes" in calls[1]
    assert "accelerate" in names
    assert not {name for name in names if re.match("torch$|torchvision|triton|nvidia|cuda", name)}
    lock = (REPO / "requirements.txt").read_text()
    versions = [
        f"{name}=={version}+cpu"
        for name, version in re.findall(r"^(torch|torchvision)==(\S+)", lock, re.M)
    ]
    assert calls[2].split()[-2:] == versions
    assert "--no-deps" in calls[2]
    assert ("--torch-backend=cpu" in calls[2]) == (not index)


def test_cpu_builds_that_are_out_of_reach_have_a_remedy(tmp_path: Path) -> None:
    """Where PyTorch's index cannot be reached, the last line names two ways out; exit code 1."""
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\ncase "$*" in *torch==*) echo dns error >&2; exit 2; esac\n')
    uv.chmod(0o755)
    words = ["sh", REPO / "docker/libraries.sh", "cpu", tmp_path, REPO / "requirements.txt"]
    done = subprocess.run(
        words, env=os.environ | {"UV": str(uv)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    for name in ("UV_INDEX", "UV_FIND_LINKS", "TORCH=cuda"):
        assert name in done.stderr.splitlines()[-1]
