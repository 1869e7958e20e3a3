"""The table of verdicts, on the screen and in docs/reliability.md."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from base import BAD, GOOD, REPO

PAGE = REPO / "docs" / "reliability.md"
BEGIN, END = "<!-- table of tests/faults -->", "<!-- end of the table -->"
HARMS = {
    "mutations": "file damaged, then the command",
    "hostile": "hostile files",
    "fuzz": "configuration fuzz",
    "server": "shard server",
    "starvation": "disk, inodes, limits, permissions",
    "kills": "SIGKILL, then the command again",
    "rivals": "two commands on one folder",
    "soak": "soak",
}


def table(parts: list[str], counts: Counter[tuple[str, str]]) -> str:
    """Return the table of harms and verdicts in Markdown."""
    kinds = (*GOOD, *BAD)
    rows = [["harm", "tried", *kinds], ["---", *["---:"] * (len(kinds) + 1)]]
    for part in parts:
        numbers = [counts[part, kind] for kind in kinds]
        rows.append([HARMS[part], f"{sum(numbers):,}", *(f"{n:,}" for n in numbers)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(text: str, seed: int) -> None:
    """Put the rows into the table of the page, with command, date, commit and machine.

    Rows of parts that were not run stay as they are.
    """
    words = " ".join(word for word in sys.argv[1:] if word != "--write")
    git = ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    machine = f"{models[0] if models else 'unknown processor'}, {os.cpu_count()} cores"
    run = f"`{words}`, seed {seed}, {datetime.date.today()}, {commit}, {machine}"
    head, ruler, *new = text.splitlines()
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    rows = {row.split(" | ")[0]: row for row in table.splitlines()[2:] if row.startswith("| ")}
    rows |= {row.split(" | ")[0]: f"{row} {run} |" for row in new}
    ordered = [rows[name] for part in HARMS.values() if (name := f"| {part}") in rows]
    lines = [f"{head} run |", f"{ruler} --- |", *ordered]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
