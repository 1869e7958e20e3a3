"""Nothing is executed that the command line did not ask for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluating import TINY, make_run
from launching import REPO, TIMEOUT, environment

EVIL = "open('executed', 'a').write(__name__)\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A downloaded run: its configuration names a module that lies beside it, with others."""
    run = make_run(tmp_path, steps=(10,), extractor="evil:Class")
    for name in ("evil", "json", "yaml", "torch_fidelity", "torch"):
        (run / f"{name}.py").write_text(EVIL)
    return run


def evaluate(run: Path, *words: object, **env: str) -> tuple[int, str]:
    """Run the command from inside the run folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluate", *map(str, words)],
        env=environment() | {"PYTHONPATH": str(REPO)} | env,
        cwd=run,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--run", "."),
        ("--run", ".", "--pending"),
        ("--checkpoint", "snapshots/step_00000010"),
        ("--config", "config.yaml", "--images", "."),
        ("reference", "--run", "."),
        ("reference", "--config", "config.yaml"),
    ],
    ids=" ".join,
)
def test_a_downloaded_run_does_not_execute_its_own_modules(run, words):
    status, output = evaluate(run, *words)
    assert status == 2, output
    assert "eval.extractor (evil:Class): " in output
    assert "config.yaml names it" in output
    assert "add eval.extractor=evil:Class to the command line" in output
    assert "Traceback" not in output
    assert not (run / "executed").exists()


def test_a_run_that_lacks_its_other_files_does_not_either(run):
    """What a file is comes from how it is opened, not from what lies beside it."""
    for path in run.iterdir():
        if path.name not in ("config.yaml", "snapshots") and path.suffix != ".py":
            path.unlink()
    status, output = evaluate(run, "--run", ".")
    assert status == 2, output
    assert "config.yaml names it" in output
    assert not (run / "executed").exists()


def test_a_snapshot_outside_its_run_does_not_either(run, tmp_path):
    alone = tmp_path / "downloads" / "step_00000010"
    shutil.copytree(run / "snapshots" / "step_00000010", alone)
    (alone.parent / "evil.py").write_text(EVIL)
    status, output = evaluate(alone.parent, "--checkpoint", alone.name)
    assert status == 2, output
    assert "config.yaml names it" in output
    assert not list(tmp_path.rglob("executed"))


def test_the_command_line_and_a_file_of_the_user_may_ask_for_a_module(run, tmp_path):
    """The remedy of the message works; the module comes from PYTHONPATH, not from the folder."""
    tests = f"{REPO}:{REPO / 'tests'}"
    status, output = evaluate(run, "--run", ".", f"eval.extractor={TINY}", PYTHONPATH=tests)
    assert status == 0, output
    mine = tmp_path / "mine.yaml"
    text = (run / "config.yaml").read_text().replace("evil:Class", TINY)
    mine.write_text(text)
    status, output = evaluate(run, "reference", "--config", mine, PYTHONPATH=tests)
    assert status == 0, output
    assert not (run / "executed").exists()
