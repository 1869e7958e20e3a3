"""Draw figure 1 of Goodfellow et al. 2014 from a real training, and check its theorems in numbers.

    python -m pipeline.papers.theory --out theory.png          # and theory.json

The module ``gan_1d`` describes the training and what is measured. It needs no data and takes half a
minute on a CPU. Needs matplotlib (extra figures).
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime import signals
from pipeline.runtime.arguments import HelpFormatter, file_ending_in, integer, seed
from pipeline.runtime.errors import GenerationError, exit_on_user_error

if TYPE_CHECKING:
    from pipeline.papers.gan_1d import Moment


def main() -> None:
    """Train, and write the figure and its numbers. Exit code 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.papers.theory", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    out = "file to write the figure to; its numbers go to FILE.json beside it"
    add("--out", type=file_ending_in(".png"), required=True, metavar="FILE.png", help=out)
    add("--seed", type=seed, default=0, metavar="N", help="seed of weights and samples")
    steps = "updates of G between (c) and (d)"
    add("--steps", type=integer(1, 10**9), default=1500, metavar="N", help=steps)
    options = parser.parse_args()
    with exit_on_user_error(), signals.exit_on_interrupt("interrupted: nothing was written"):
        make_figure(options.out, options.seed, options.steps)


def make_figure(out: Path, seed: int, steps: int) -> None:
    """Train, then write the figure to ``out`` and its numbers to the ``.json`` file beside it.

    Raises:
        GenerationError: a file cannot be written, or matplotlib is missing.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise GenerationError(
            "theory: needs matplotlib; install with: pip install 'dcgan-pipeline[figures]'"
        )
    from pipeline.runtime.files import check_output_path, write_results

    figure, numbers = check_output_path(out), check_output_path(out.with_suffix(".json"))
    # torch takes seconds to import. A file that cannot be written is reported before that.
    import torch

    from pipeline.papers.gan_1d import play, summary, table

    torch.set_num_threads(1)  # the networks are so small that more threads make them slower
    moments = play(seed, steps)
    print(table(moments), flush=True)
    document = json.dumps(summary(moments, seed, steps), indent=1)
    write_results({figure: draw(moments), numbers: f"{document}\n".encode()})
    print(f"written: {figure} and {numbers.name}", file=sys.stderr)


def draw(moments: list[Moment]) -> bytes:
    """Draw each moment as in figure 1: densities and D above, the map from z to x below.

    Returns:
        a PNG, whose bytes depend on the moments only.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    from pipeline.papers.gan_1d import SHOWN_Z, centres, p_data, quantiles

    highest = max(float(np.max(curve)) for moment in moments for curve in (moment.p_g, moment.D))
    x, z = centres(), np.clip(quantiles(SHOWN_Z).numpy(), -1.9, 1.9)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12, 3.9), layout="constrained")
        above, below = figure.subplots(2, len(moments), sharey="row", height_ratios=(5, 1.6))
        for top, low, moment in zip(above, below, moments, strict=True):
            top.plot(x, p_data(), "k:", lw=1.8, label="$p_{data}$")
            top.plot(x, moment.p_g, "-", color="#2a9d3a", lw=1.6, label="$p_g$")
            top.plot(x, moment.D, "--", color="#1f5fd0", lw=1.6, label="$D$")
            best = np.where(moment.support, moment.best_D, np.nan)
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


if __name__ == "__main__":
    main()
