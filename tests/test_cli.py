"""`dcgan COMMAND` is `python -m pipeline.COMMAND`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launching import REPO, environment

from pipeline.cli import COMMANDS


def said(*words: str) -> subprocess.CompletedProcess[str]:
    env = environment() | {"PYTHONPATH": str(REPO), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"]], ids=["alone", "--help"])
def test_the_help_names_every_command_and_takes_no_seconds(words: list[str]) -> None:
    """With the first line of its docstring, and without importing torch."""
    code = """if True:
        import contextlib, sys
        from pipeline import cli
        with contextlib.suppress(SystemExit):
            cli.main()
        assert "torch" not in sys.modules
    """
    done = said("-c", code, *words)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        first = (REPO / "pipeline" / f"{name}.py").read_text().partition("\n")[0]
        purpose = first.strip('r"')
        assert f"\n    {name} " in done.stdout
        assert purpose in " ".join(done.stdout.split())


def test_every_command_of_the_package_is_one_of_dcgan() -> None:
    """A module of pipeline/ with a main of its own, but for this one."""
    found = {
        path.stem for path in (REPO / "pipeline").glob("*.py") if "\ndef main(" in path.read_text()
    }
    assert found - {"cli"} == set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), ([], 2), (["--nonsense"], 2)],
    ids=["help", "none", "wrong"],
)
def test_a_command_answers_as_under_python_m(words: list[str], code: int) -> None:
    """The same text, the same exit code."""
    ours = said("-m", "pipeline.cli", "doctor", *words)
    theirs = said("-m", "pipeline.doctor", *words)
    assert (ours.returncode, ours.stdout, ours.stderr) == (code, theirs.stdout, theirs.stderr)


def test_another_word_is_refused_with_the_commands() -> None:
    done = said("-m", "pipeline.cli", "training")
    assert done.returncode == 2
    assert "invalid choice: 'training'" in done.stderr
    assert "evaluate" in done.stderr
    assert "Traceback" not in done.stderr
