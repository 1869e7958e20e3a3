"""The layout of the project, where no linter checks it: lengths, names, pages that repeat code."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import packages_distributions

import wings
import yaml
from launching import REPO

PACKAGE = REPO / "pipeline"
MAX_LINES = 350


def test_no_module_is_too_long() -> None:
    """Every module of pipeline/ has at most 350 lines; a longer one is to be split."""
    lengths = {
        str(path.relative_to(REPO)): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert len(lengths) > 50, "the modules were not found"
    too_long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long


def test_no_name_in_pipeline_shadows_another_module() -> None:
    """`accelerate launch pipeline/train.py` puts pipeline/ first on the module search path.

    A module or wing named like one of the standard library or of an installed package would be
    imported in its place, by any library.
    """
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    names |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert {"train", "runtime"} <= names
    installed = {
        name
        for name, distributions in packages_distributions().items()
        if set(distributions) != {"dcgan-pipeline"}
    }
    assert {"torch", "yaml"} <= installed
    shadowed = names & (sys.stdlib_module_names | installed)
    assert not shadowed


def test_the_table_of_wings_is_up_to_date() -> None:
    """CONTRIBUTING.md shows the imports of today; if this fails, run `make wings`."""
    assert wings.updated(wings.PAGE.read_text()) == wings.PAGE.read_text()


def test_the_citation_names_the_version_of_the_package() -> None:
    """CITATION.cff and pyproject.toml give one version."""
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
