"""Every option has a case: a shipped configuration sets it, or a page explains it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipeline.config.schema import Config, flatten

CHECKOUT = Path(__file__).parents[2]
LISTS = ("CHANGELOG.md", "configuration.md")  # of all keys: they give no case for one
FOLDERS = (".", "docs", "slurm", "docker", "benchmarks")


def set_by_configurations() -> set[str]:
    keys = set()
    for path in (CHECKOUT / "configs").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        keys |= content.get("parameters", {}).keys()  # of a sweep
        keys |= {f"{name}.{key}" for name, section in content.items() for key in _keys(section)}
    return keys


def _keys(section: object) -> list[str]:
    return list(section) if isinstance(section, dict) else []


def named_by_pages() -> set[str]:
    pages = [page for folder in FOLDERS for page in (CHECKOUT / folder).glob("*.md")]
    users = [page.read_text() for page in pages if page.name not in LISTS]
    return {key for text in users for key in re.findall(r"\b[a-z]+\.[a-z0-9_]+\b", text)}


def test_every_option_is_set_or_explained() -> None:
    documented = set_by_configurations() | named_by_pages()
    undocumented = flatten(Config()).keys() - documented
    assert not undocumented, "add a case to docs/options.md, or remove the option"
