"""Two checkouts on one machine: a script runs with the modules beside it, or not at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPO, environment

SCRIPTS = ("train", "prepare", "evaluate", "generate", "doctor")
PAPERS = ("papers/theory", "papers/probe", "papers/guided_backprop")


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A and B, copies of this one."""
    folder = tmp_path_factory.mktemp("checkouts").resolve()
    for name in "AB":
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "pipeline", folder / name / "pipeline", ignore=ignored)
    return folder / "A", folder / "B"


def help_of(words: list[str], cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """``--help`` of a command, with the package of the checkout ``path`` installed."""
    return subprocess.run(
        [sys.executable, *words, "--help"],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", [*SCRIPTS, *PAPERS])
def test_a_script_refuses_the_modules_of_another_checkout(
    name: str, checkouts: tuple[Path, Path], tmp_path: Path
) -> None:
    """With A installed, B's script ends with one message before it imports A's modules."""
    a, b = checkouts
    (broken := a / "pipeline" / "runtime" / "errors.py").rename(tmp_path / "errors.py")
    try:
        done = help_of([str(b / "pipeline" / f"{name}.py")], tmp_path, a)
    finally:
        (tmp_path / "errors.py").rename(broken)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {b}/pipeline/{name}.py: Python imports the package pipeline from {a}, not from "
        f"{b}. Install this one with `pip install -e {b}`, or set PYTHONPATH={b}, or run "
        f"{a}/pipeline/{name}.py.\n"
    )


def test_each_remedy_helps(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    """B's modules first on the path, A's own script, and ``python -m`` in B."""
    a, b = checkouts
    script = Path("pipeline") / "train.py"
    assert help_of([str(b / script)], tmp_path, b).returncode == 0
    assert help_of([str(a / script)], tmp_path, a).returncode == 0
    (tmp_path / "link").symlink_to(a)
    assert help_of([str(tmp_path / "link" / script)], tmp_path, a).returncode == 0
    assert help_of(["-m", "pipeline.train"], b, a).returncode == 0
