"""`make setup` with a stand-in for uv: what it asks for, and that an environment keeps its kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPO

UV = """#!/bin/sh
for last; do :; done
case $1 in venv) mkdir -p "$last" ;; *) echo "$*" >>"$ASKED" ;; esac
"""


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The file in which the stand-in notes each call of `uv pip`."""
    (tmp_path / "uv").write_text(UV)
    (tmp_path / "uv").chmod(0o755)
    return tmp_path / "asked"


def setup(asked: Path, *words: str) -> tuple[str, list[str]]:
    """(output, the calls of `uv pip`) of `make setup`."""
    asked.write_text("")
    names = [name for name in os.environ if name.startswith(("UV_", "MAKE", "MFLAGS", "TORCH"))]
    env = {name: value for name, value in os.environ.items() if name not in names}
    places = [f"UV={asked.parent / 'uv'}", f"VENV={asked.parent / 'venv'}"]
    done = subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}", *places, *words],
        cwd=REPO,
        env=env | {"ASKED": str(asked)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, asked.read_text().splitlines()


def test_an_environment_is_made_once_and_keeps_its_kind(asked: Path) -> None:
    """Without CUDA libraries if that was asked for, until something else is."""
    said, calls = setup(asked, "TORCH=cpu")
    assert "installing PyTorch (cpu)" in said
    assert [call.split()[:2] for call in calls] == [["pip", "sync"], *[["pip", "install"]] * 2]
    assert "+cpu" in calls[1]
    assert "--torch-backend=cpu" in calls[1]
    assert calls[2].endswith("-e .")
    assert setup(asked)[1] == []
    assert setup(asked, "TORCH=cpu")[1] == []
    said, calls = setup(asked, "TORCH=cuda")
    assert "installing PyTorch (cuda)" in said
    assert [call.split()[-1] for call in calls] == ["requirements-dev.txt", "."]
    assert setup(asked)[1] == []


def test_what_is_fetched_is_shown(asked: Path) -> None:
    """uv has a bar in a terminal and lines elsewhere, unless it is told to be quiet."""
    sync, own = setup(asked)[1]
    assert "--quiet" not in sync
    assert "--require-hashes" in sync
    assert "--quiet" in own
