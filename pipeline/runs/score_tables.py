"""Write scores for other programs, as JSON or CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runs.results import Row, best
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
