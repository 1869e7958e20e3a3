"""What the pages name exists: files, headings, modules, options of commands, configuration keys."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from launching import REPO, environment

from pipeline import cli
from pipeline.config.schema import Config, flatten

KEYS = flatten(Config())
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
PAGES = [page for folder in (".", "docs", "slurm", "docker", "benchmarks")
         for page in sorted((REPO / folder).glob("*.md"))]  # fmt: skip
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it names what was removed
SCRIPTS = [*REPO.glob("slurm/*.*"), *REPO.glob("docker/**/*.*"), *REPO.glob("configs/*.yaml")]
# A file of the checkout named in running text, e.g. `tests/data/test_order.py`.
FILE = re.compile(
    r"(?<![\w/.<*-])((?:pipeline|tests|benchmarks|slurm|docker|configs|docs)/[\w/.-]+"
    r"\.(?:py|sh|yaml|md|json|png|gif))(?![\w*])"
)
COMMANDS = {
    "pipeline/evaluate.py": ("reference", "fetch-weights", "probe"),
    "pipeline/generate.py": ("images", "grid", "walk", "arithmetic", "onnx", "hub"),
}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPO)) for path in paths]


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (script, its words) of each command line of ours in a text."""
    ours = "|".join(cli.COMMANDS)
    pattern = (
        rf"(?:-m (pipeline(?:\.\w+)+)|^dcgan (?=(?:{ours})\b)(\w+)"
        r"|\b((?:pipeline|benchmarks)/\w+)\.py)(?= |$)(.*)"
    )
    for words in re.split(r"[`\n]", text.replace("\\\n", " ")):
        if found := re.search(pattern, words.lstrip("# ").split(" #")[0]):
            name = found[1] or (f"pipeline.{found[2]}" if found[2] else found[3])
            yield name.replace(".", "/") + ".py", shlex.split(found[4].replace("'", ""))


@cache
def usage(script: str, command: str) -> str:
    """The text of --help, of a command of the script if it has commands."""
    words = [command] if command else []
    done = subprocess.run(
        [sys.executable, REPO / script, *words, "--help"],
        env=environment() | {"PYTHONPATH": str(REPO), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script} {command} --help\n{done.stderr}"
    return done.stdout


def test_tests_that_pages_name_exist() -> None:
    """A claim beside the name of its test is one that is tested."""
    defined = {
        name
        for path in (REPO / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    for page in PRESENT:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert not named - defined, page


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


@pytest.mark.parametrize("path", PRESENT + SCRIPTS, ids=names(PRESENT + SCRIPTS))
def test_files_scripts_options_and_keys_exist(path: Path) -> None:
    text = path.read_text()
    for name in set(FILE.findall(text)):
        assert (REPO / name).exists(), name
    for section, key in re.findall(rf"(?<![\w./-])({SECTIONS})\.([a-z][a-z0-9_]*)=", text):
        assert f"{section}.{key}" in KEYS, f"{section}.{key}"
    for script, words in commands(text):
        assert (REPO / script).is_file(), script
        command = words[0] if words and words[0] in COMMANDS.get(script, ()) else ""
        for option in (word.partition("=")[0] for word in words if re.match(r"--\w", word)):
            pattern = rf"^ +(-\w, )?{option}\b"
            assert re.search(pattern, usage(script, command), re.M), f"{script} {option}"
