"""Draw the curves of a report as one PNG file, for a paper, a slide or a message."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from typing import Any

from pipeline.reports.charts import style_of
from pipeline.reports.page import PANELS, ordered
from pipeline.reports.run_facts import RunFacts
from pipeline.runtime.errors import UserError

COLUMNS = 3
DASHES = {"dotdash": "dashdot"}
"""Bokeh's names of dashes that matplotlib calls otherwise."""


def render(runs: Sequence[RunFacts]) -> bytes:
    """Return a PNG with the panels that the page shows first, over steps.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--png: needs matplotlib; install it with: pip install 'dcgan-pipeline[figures]'"
        )
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    series = [run.series() for run in runs]
    keys = ordered({key for curves in series for key in curves})[:PANELS]
    height = -(-len(keys) // COLUMNS) or 1
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * height + 0.2 * len(runs)), layout="constrained")
    panels = list(figure.subplots(height, COLUMNS, squeeze=False).flat)
    lines: list[dict[str, Any]] = []
    for n in range(len(runs)):
        colour, dash = style_of(n)
        lines.append({"color": colour, "linestyle": DASHES.get(dash, dash), "linewidth": 1.2})
    for key, axes in zip(keys, panels, strict=False):
        for curves, line in zip(series, lines, strict=True):
            if curve := curves.get(key):
                marker = "o" if len(curve.steps) < 20 else ""
                axes.plot(curve.steps, curve.values, marker=marker, markersize=3, **line)
        axes.set_title(key, fontsize=10 if len(key) < 45 else 7, parse_math=False)
        axes.grid(alpha=0.3)
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    names = [f" {run.name}" for run in runs]  # matplotlib leaves out names that begin with "_"
    handles = [Line2D([], [], **line) for line in lines]
    legend = figure.legend(handles, names, loc="outside lower left", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that its font lacks becomes a box
        figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
