"""The picture of ``pipeline.theory``."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from pipeline.game import SHOWN_Z, Moment, centres, p_data, quantiles


def draw(moments: list[Moment]) -> bytes:
    """A PNG like the paper's figure 1: densities and D above, the map from z to x below."""
    highest = max(float(np.max(curve)) for one in moments for curve in (one.p_g, one.D))
    x, z = centres(), np.clip(quantiles(SHOWN_Z).numpy(), -1.9, 1.9)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12, 3.9), layout="constrained")
        above, below = figure.subplots(2, len(moments), sharey="row", height_ratios=(5, 1.6))
        for top, low, moment in zip(above, below, moments, strict=True):
            top.plot(x, p_data(), "k:", lw=1.8, label="$p_{data}$")
            top.plot(x, moment.p_g, "-", color="#2a9d3a", lw=1.6, label="$p_g$")
            top.plot(x, moment.D, "--", color="#1f5fd0", lw=1.6, label="$D$")
            best = np.where(moment.there, moment.best_D, np.nan)
            top.plot(x, best, "-", color="#1f5fd0", lw=5, alpha=0.15, label="$D^*$")
            top.axhline(0.5, color="0.8", lw=0.8, zorder=0)
            top.set(title=moment.title, xlim=(-1.9, 1.9), ylim=(0, 1.1 * highest), xticks=[])
            top.text(
                0.02,
                0.97,
                f"V = {moment.value:.3f}\nJSD = {moment.jsd:.4f}\nE|D-½| = {moment.off_half:.3f}",
                transform=top.transAxes,
                va="top",
                fontsize=8,
            )
            low.set(xlim=(-1.9, 1.9), ylim=(0, 1), xticks=[], yticks=[])
            low.axis("off")
            for start, end in zip(z, moment.from_z, strict=True):
                low.add_patch(
                    ConnectionPatch(
                        (start, 0.08),
                        (float(np.clip(end, -1.9, 1.9)), 0.95),
                        "data",
                        "data",
                        axesA=low,
                        axesB=low,
                        arrowstyle="-|>",
                        mutation_scale=6,
                        lw=0.7,
                        color="0.25",
                    )
                )
            low.plot([-1.9, 1.9], [0.06, 0.06], "k-", lw=1.2)
            low.plot([-1.9, 1.9], [0.97, 0.97], "k-", lw=1.2)
        below[0].text(-1.88, 0.12, "z", fontsize=10)
        below[0].text(-1.88, 0.72, "x", fontsize=10)
        above[0].legend(loc="upper right", frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, dpi=110, metadata={"Software": None})
    return out.getvalue()
