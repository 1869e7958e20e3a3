"""Draw empty panels with Bokeh, which the script of the page fills with curves."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from pipeline.runtime.errors import UserError

COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
DASHES = ("solid", "dashed", "dotted", "dotdash")
GREY, FAINT = "#808080", "#80808040"
"""Text and lines of the panels: both are seen on white and on black."""
GRID = {"grid_line_color": FAINT}
AXIS = {
    "minor_tick_line_color": None,
    **dict.fromkeys(("axis_label_text_color", "major_label_text_color"), GREY),
    **dict.fromkeys(("axis_line_color", "major_tick_line_color"), GREY),
}


def require_bokeh() -> None:
    """Raise UserError if Bokeh is not installed."""
    try:
        importlib.import_module("bokeh")
    except ImportError:
        raise UserError(
            "report: needs bokeh, which draws the curves; install it with: "
            "pip install 'dcgan-pipeline[report]'"
        ) from None


def style_of(index: int) -> tuple[str, str]:
    """Return colour and dash of a run's curves."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def library() -> str:
    """Return BokehJS as a script element: 1.3 MB, and nothing to load."""
    from bokeh.resources import Resources

    return str(Resources(mode="inline", components=["bokeh"], minified=True).render())


def panels(names: Sequence[str], count: int) -> tuple[str, list[str], list[dict[str, Any]]]:
    """Return empty panels with a line and dots for each run.

    Args:
        names: of the runs; the tooltip shows them.
        count: number of panels.

    Returns:
        the script that draws them, an HTML element for each, and for each the ids of its x axis
        and of (source, line, dots) of each run.
    """
    from bokeh.embed import components
    from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, NumeralTickFormatter
    from bokeh.plotting import figure

    figures, ids = [], []
    for _ in range(count):
        panel = figure(
            height=270,
            sizing_mode="stretch_width",
            tools="pan,box_zoom,wheel_zoom,reset,save",
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=FAINT,
            x_range=DataRange1d(only_visible=True),
            y_range=DataRange1d(only_visible=True),
        )
        panel.xaxis[0].update(formatter=NumeralTickFormatter(format="0.[0000]a"))  # 20k, 0.25
        panel.toolbar.update(logo=None, autohide=True)
        for part in (*panel.grid, *panel.axis):
            part.update(**(GRID if part in panel.grid else AXIS))
        drawn = []
        for index, name in enumerate(names):
            colour, dash = style_of(index)
            source = ColumnDataSource({"x": [], "y": [], "step": []})
            line = panel.line(
                "x", "y", source=source, color=colour, line_dash=dash, line_width=1.6, name=name
            )
            dots = panel.scatter("x", "y", source=source, color=colour, size=5, name=name)
            drawn.append([source.id, line.id, dots.id])
        tips = [("run", "$name"), ("step", "@step"), ("value", "@y{0.[0000]}")]
        panel.add_tools(HoverTool(tooltips=tips))
        figures.append(panel)
        ids.append({"axis": panel.xaxis[0].id, "runs": drawn})
    if not figures:
        return "", [], []
    script, elements = components(figures)
    return str(script), [str(element) for element in elements], ids
