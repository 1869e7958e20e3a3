"""Write the table of pipeline/'s wings and their imports into CONTRIBUTING.md: ``make wings``."""

from __future__ import annotations

import tomllib

import grimp
from launching import REPO

PAGE = REPO / "CONTRIBUTING.md"
BEGIN, END = "<!-- wings: written by make wings -->\n", "<!-- wings end -->\n"


def table() -> str:
    """Return a Markdown table with a row for each command and wing, top layer first."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = settings["contracts"][0]["layers"]
    wings = [name.strip() for layer in layers for name in layer.split("|")]
    graph = grimp.build_graph("pipeline", cache_dir=None)
    modules = {wing: graph.find_children(f"pipeline.{wing}") for wing in wings}
    for wing in wings:
        graph.squash_module(f"pipeline.{wing}")
    rows = ["| command or wing | modules | imports |", "| --- | --- | --- |"]
    for wing in wings:
        imported = graph.find_modules_directly_imported_by(f"pipeline.{wing}")
        names = [f"pipeline.{w}" for w in wings if f"pipeline.{w}" in imported]
        cells = (
            " ".join(name.split(".")[-1] for name in x) for x in (sorted(modules[wing]), names)
        )
        rows.append("| " + " | ".join((f"`{wing}`", *cells)) + " |")
    return "\n".join(rows) + "\n"


def updated(page: str) -> str:
    """Return the page with the table of today between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE.name} has lost a marker of its table"
    return before + BEGIN + table() + end + after


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
