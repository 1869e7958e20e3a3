"""Write the page of a report: tables, panels, sample grids, and the script that connects them.

The page loads nothing: pictures are data URIs, scripts and styles are within. All text of the runs
passes ``html.escape``, or is JSON without ``<``.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.reports import charts
from pipeline.reports.curves import packed
from pipeline.reports.run_facts import RunFacts, differing, written_at
from pipeline.reports.thumbnails import PAGE_BYTES, thumbnails
from pipeline.runs.results import Row, best

PANELS = 6
FIRST = ("loss/G", "loss/D", "scores/real", "scores/fake", "perf/images_per_sec", "grad_norm/G")
"""Keys that the panels show first, after the scores."""
DASH_ARRAYS = dict(zip(charts.DASHES, ("none", "5 3", "2 3", "5 2 1 2"), strict=True))
HERE = Path(__file__).parent


def render(runs: Sequence[RunFacts], left_out: Sequence[str]) -> str:
    """Return the HTML of a report.

    Args:
        runs: at least one.
        left_out: a message for each folder that is not in the report.
    """
    curves = packed(runs)
    grids = [thumbnails(run.path, PAGE_BYTES // len(runs)) for run in runs]
    steps = sorted({step for found in grids for step in found})
    keys = ordered(dict.fromkeys(key for run in curves for key in run["curves"]))
    count = min(PANELS, len(keys))
    script, elements, ids = charts.panels([run.name for run in runs], count)
    for run, found in zip(runs, curves, strict=True):
        found["images_per_step"] = run.config.images_per_step
    data = {"runs": curves, "panels": ids, "grids": grids, "steps": steps}
    made = time.strftime("%Y-%m-%d %H:%M")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_file('page.css')}</style>",
        charts.library() if keys else "",
        f"</head><body><h1>{html.escape(title)}</h1>",
        f'<p class="note">Made {made}. A click on a run hides it, a double click the others.</p>',
        *(f'<p class="note">Left out: {html.escape(reason)}</p>' for reason in left_out),
        _legend(runs),
        *_runs_tables(runs),
        *_score_tables(runs),
        _curves(keys, elements) if keys else '<p class="note">No metrics yet.</p>',
        _grids(runs, steps),
        "<h2>Events</h2>",
        _table(
            ("run", "time", "event"),
            ((n, [run.name, at, text]) for n, run in enumerate(runs) for at, text in run.events),
        ),
        f'<script type="application/json" id="page-data">{_json(data)}</script>',
        script if keys else "",
        f"<script>{_file('page.js')}</script></body></html>",
    ]
    return "\n".join(filter(None, parts))


def _file(name: str) -> str:
    return (HERE / name).read_text()


def _json(data: Any) -> str:
    """Return JSON that cannot end a script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def ordered(keys: Iterable[str]) -> list[str]:
    """Return the keys of curves: two Frechet or kernel distances, then FIRST, then the others."""
    known = sorted(keys)
    distances = [key for key in known if key.startswith(("eval/fid", "eval/fd", "eval/k"))]
    scores = [key for key in distances if "_std_" not in key][:2]
    return list(dict.fromkeys([*scores, *(key for key in FIRST if key in known), *known]))


def _legend(runs: Sequence[RunFacts]) -> str:
    buttons = (
        f'<button type="button" data-run="{n}" aria-pressed="true">{_key(n)}'
        f"{html.escape(run.name)}</button>"
        for n, run in enumerate(runs)
    )
    return f'<div class="legend">{"".join(buttons)}</div>'


def _key(index: int) -> str:
    """Return a short line in a run's colour and dash."""
    colour, dash = charts.style_of(index)
    return (
        f'<svg class="key" viewBox="0 0 22 8"><path d="M0 4H22" stroke="{colour}" '
        f'stroke-width="3" stroke-dasharray="{DASH_ARRAYS[dash]}"/></svg>'
    )


def _table(head: Sequence[str], rows: Iterable[tuple[int, Sequence[Any]]]) -> str:
    """Return a table; each row comes with the number of its run, and begins with its name."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f'<tr data-run="{n}"><th>{html.escape(str(first))}</th>'
        + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in others)
        + "</tr>"
        for n, (first, *others) in rows
    )
    content = f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.5g}" if isinstance(value, float) else str("" if value is None else value)


def _runs_tables(runs: Sequence[RunFacts]) -> Iterable[str]:
    """Yield a table with a row for each run; of a single run its settings are a table below."""
    keys, single = differing(runs), len(runs) == 1
    head = ["run", "state", "step", "images/s", "hardware", *(() if single else keys)]
    rows = []
    for n, run in enumerate(runs):
        state = run.status or f"unfinished; last row {written_at(run) or 'none'}"
        state = "; ".join([state, *run.alarms])
        values = [] if single else [keys[key][n] for key in keys]
        steps, speed = f"{run.step} of {run.config.train.total_steps}", run.throughput()
        shown = None if speed is None else f"{speed:.0f}"
        rows.append((n, [run.name, state, steps, shown, run.hardware, *values]))
    yield f"<h2>{'Run' if single else 'Runs, and how they differ'}</h2>"
    yield _table(head, rows)
    if single:
        yield "<h2>Settings other than the default</h2>"
        yield _table(["key", "value"], ((0, [key, value]) for key, [value] in keys.items()))


def _score_tables(runs: Sequence[RunFacts]) -> Iterable[str]:
    """Yield a heading and a table for each protocol: best and last row of each run, best first."""
    protocols = dict.fromkeys(row["protocol"] for run in runs for row in run.scores)
    for protocol in protocols:
        found: list[tuple[int, Row, Row]] = []
        for n, run in enumerate(runs):
            rows = [row for row in run.scores if row["protocol"] == protocol]
            if (first := best(rows)) is not None:
                found.append((n, first, rows[-1]))
        if not found:
            continue
        headline = found[0][1]["headline"]
        sign = -1 if found[0][1].get("higher_is_better") else 1
        found.sort(key=lambda entry: sign * float(entry[1]["scores"].get(headline) or 0))
        keys = dict.fromkeys(key for _, first, _ in found for key in first["scores"])
        others = [key for key in keys if key != headline]
        yield f"<h2>{html.escape(f'Scores of protocol {protocol}')}</h2>"
        yield _table(
            ["run", f"best {headline}", "at step", "last", "at step", "weights", *others],
            (
                (
                    n,
                    [
                        runs[n].name,
                        *(first["scores"].get(headline), first["step"]),
                        *(last["scores"].get(headline), last["step"]),
                        *(first["weights"], *map(first["scores"].get, others)),
                    ],
                )
                for n, first, last in found
            ),
        )
    if not protocols:
        yield '<p class="note">No scores yet: python -m pipeline.evaluate --run RUN --pending</p>'


def _curves(keys: Sequence[str], elements: Sequence[str]) -> str:
    panels = []
    for n, element in enumerate(elements):
        options = "".join(
            f'<option{" selected" if k == n else ""} value="{html.escape(key)}">'
            f"{html.escape(key)}</option>"
            for k, key in enumerate(keys)
        )
        panels.append(f'<div class="panel"><select>{options}</select>{element}</div>')
    return (
        '<h2>Curves</h2><p>over <select id="x-axis"><option value="step">steps</option>'
        '<option value="images">images seen</option><option value="hours">hours since the first '
        "row</option></select> <span class=note>Long curves are thinned out: every n-th row. "
        "[protocol] follows the name of a score.</span></p>"
        f'<div class="panels">{"".join(panels)}</div>'
    )


def _grids(runs: Sequence[RunFacts], steps: Sequence[int]) -> str:
    if not steps:
        return '<p class="note">No sample grids yet.</p>'
    figures = "".join(
        f'<figure data-run="{n}"><img alt=""><figcaption>{_key(n)}{html.escape(run.name)}, '
        "<span></span></figcaption></figure>"
        for n, run in enumerate(runs)
    )
    last = len(steps) - 1
    return (
        '<h2>Samples</h2><p><label>step <output id="grid-number"></output> <input type="range" '
        f'id="grid-step" min="0" max="{last}" value="{last}"></label></p>'
        f'<div class="grids">{figures}</div>'
    )
