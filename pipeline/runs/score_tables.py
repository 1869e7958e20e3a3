"""Put scores side by side: of one set, or of the best G of each run; for people, as JSON or CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runs.alarms import read_alarms
from pipeline.runs.results import Row, best, read_rows
from pipeline.runtime.console import say
from pipeline.runtime.errors import EvaluationError
from pipeline.runtime.files import write_atomic


@dataclass(frozen=True)
class Line:
    """The scores of one set of images.

    Args:
        name: of the run, the snapshot or the set.
        protocol: id of the protocol.
        scores: {metric key: score}.
        step: of the weights; None = unknown, or no weights.
        weights: ``ema`` or ``raw``; "" = no weights.
        generator: ``generator_id`` of the weights, "" = unknown.
        best: whether it is the best of its run under this protocol.
    """

    name: str
    protocol: str
    scores: dict[str, Any]
    step: int | None = None
    weights: str = ""
    generator: str = ""
    best: bool = False


def lines_of(name: str, rows: Sequence[Row]) -> list[Line]:
    """Return the ledger's rows of one protocol as lines; ``name`` is the run's."""
    first = best(rows)
    return [
        Line(
            name=name,
            protocol=row["protocol"],
            scores=row["scores"],
            step=row["step"],
            weights=row["weights"],
            generator=str(row.get("generator", "")),
            best=row is first,
        )
        for row in rows
    ]


def show(
    lines: Sequence[Line],
    text: str,
    facts: dict[str, Any],
    *,
    as_json: bool,
    csv_file: Path | None,
) -> None:
    """Print scores on the stdout of the process, and write them to a file.

    Args:
        lines: the scores.
        text: the same to read.
        facts: the settings and what is known of the images, for JSON.
        as_json: print JSON instead of ``text``.
        csv_file: write CSV to it; None = do not.

    Raises:
        EvaluationError: the file cannot be written.
    """
    if csv_file is not None:
        try:
            write_atomic(csv_file, csv_of(lines).encode())
        except OSError as error:
            raise EvaluationError(
                f"--csv ({csv_file}): cannot be written: {error.strerror or error}."
            ) from None
    if as_json:
        found = facts | {"scores": [dataclasses.asdict(line) for line in lines]}
        text = json.dumps(found, indent=1, allow_nan=False)
    print(text, file=sys.__stdout__ if as_json else sys.stdout, flush=True)


def csv_of(lines: Sequence[Line]) -> str:
    """Return lines as CSV: a column for each field, then one for each score."""
    keys = list(dict.fromkeys(key for line in lines for key in line.scores))
    fields = [field.name for field in dataclasses.fields(Line) if field.name != "scores"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fields, *keys])
    for line in lines:
        row = [getattr(line, name) for name in fields]
        writer.writerow([*row, *(line.scores.get(key) for key in keys)])
    return out.getvalue()


# -- several runs ---------------------------------------------------------------------------------


def best_of_runs(folders: Sequence[Path]) -> tuple[list[Line], str, dict[str, Any]]:
    """Read the best score of each run by each protocol from the ledgers; no network is loaded.

    Args:
        folders: of runs; those without a ledger are named and left out.

    Returns:
        the lines, best first within a protocol; a Markdown table for each protocol; the settings
        of the protocols by id.

    Raises:
        EvaluationError: no run has a score.
    """
    rows: dict[str, list[tuple[str, Row, int]]] = {}
    without = []
    for folder in folders:
        found = read_rows(folder) if folder.is_dir() else []
        without += [str(folder)] * (not found)
        for protocol in dict.fromkeys(row["protocol"] for row in found):
            of_run = [row for row in found if row["protocol"] == protocol]
            if (first := best(of_run)) is not None:
                rows.setdefault(protocol, []).append((str(folder), first, len(of_run)))
    if without:
        say(f"without scores, left out: {', '.join(without)}")
    if not rows:
        raise EvaluationError(
            f"--table: none of {len(folders)} folders has a score. Score runs with: python -m "
            "pipeline.evaluate --run RUN --pending"
        )
    lines, tables = [], []
    for protocol, entries in rows.items():
        entries.sort(key=lambda entry: _rank(entry[1]))
        tables.append(_markdown(protocol, entries))
        lines += [line for name, row, _ in entries for line in lines_of(name, [row])]
    settings = {id: entries[0][1].get("settings", {}) for id, entries in rows.items()}
    return lines, "\n\n".join(tables), {"protocols": settings}


def _rank(row: Row) -> float:
    score = float(row["scores"][row["headline"]])
    return -score if row.get("higher_is_better") else score


def _markdown(protocol: str, entries: Sequence[tuple[str, Row, int]]) -> str:
    """Return a heading and a table with a row for each run."""
    keys = list(dict.fromkeys(key for _, row, _ in entries for key in row["scores"]))
    heads = ["run", "best step", "of", *(f"`{key.removeprefix('eval/')}`" for key in keys)]
    found = {name: _alarms(name) for name, _, _ in entries}
    heads += ["alarms"] * any(found.values())
    table = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, row, count in entries:
        values = [row["scores"].get(key) for key in keys]
        cells = ["" if value is None else f"{value:.5g}" for value in values]
        cells += [found[name]] * any(found.values())
        table.append([name.replace("|", "\\|"), str(row["step"]), str(count), *cells])
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    about = describe_settings(entries[0][1].get("settings", {}))
    return f"Protocol {protocol}: {about}\n\n{rows}"


def _alarms(folder: str) -> str:
    """Return the alarms of a run in a few words; "" = none, or they cannot be read."""
    with suppress(OSError):
        return "; ".join(alarm.title for alarm in read_alarms(Path(folder)))
    return ""


def describe_settings(settings: dict[str, Any]) -> str:
    """Return the settings of a ledger's row in words."""
    real = settings.get("reference", {})
    parts = [f"{settings.get('num_images', '?')} images"]
    if real:
        count = real.get("reference_images")
        parts.append(f"against {count or 'statistics of'} real ones")
        parts.append(f"{real.get('extractor')} layer {real.get('layer')} {real.get('precision')}")
    else:
        parts.append(f"against {settings.get('held_out', '?')} held-out ones")
    parts.append({"ema": "G_ema", "raw": "G"}.get(str(settings.get("weights")), "?"))
    seeds = settings.get("seeds") or [settings.get("seed")]
    parts.append(f"seed {', '.join(map(str, seeds))}")
    if (labels := settings.get("labels", "none")) != "none":
        parts.append(f"labels: {labels}")
    data = str(real.get("data", settings.get("data", "")))
    return f"{', '.join(parts)}; real images {data[:12]}"
