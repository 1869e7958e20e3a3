"""Thin the curves of runs out until a page can hold them, in the form that its script reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.reports.run_facts import RunFacts, Series

VALUES = 130_000
"""Values of all curves together: 1 MB of the page."""
MOST, FEWEST = 1000, 20
"""Points of a curve."""


def packed(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return for each run ``{"axes": [[steps, hours], ...], "curves": {key: [axis, values]}}``.

    Curves of the same steps share an axis. Of a long curve every n-th point is kept, and the last.
    """
    series = [run.series() for run in runs]
    curves = sum(map(len, series))
    points = min(MOST, max(FEWEST, VALUES // max(1, curves)))
    return [_packed(found, points) for found in series]


def _packed(series: dict[str, Series], points: int) -> dict[str, Any]:
    axes: dict[tuple[int, ...], tuple[int, list[Any]]] = {}
    curves = {}
    for key, curve in series.items():
        chosen = spaced(len(curve.steps), points)
        steps = tuple(curve.steps[k] for k in chosen)
        hours = [_short(curve.hours[k]) for k in chosen]
        axis, _ = axes.setdefault(steps, (len(axes), [steps, hours]))
        curves[key] = [axis, [_short(curve.values[k]) for k in chosen]]
    return {"axes": [content for _, content in axes.values()], "curves": curves}


def spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``count``, the last one among them."""
    stride = -(-count // most)
    return sorted(range(count - 1, -1, -stride)) if count else []


def _short(value: float) -> float:
    """Return a number with four significant digits, which take a third of the bytes."""
    return float(f"{value:.4g}")
