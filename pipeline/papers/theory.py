"""Figure 1 of Goodfellow et al. 2014 from a real training, and its theorems in numbers.

    python -m pipeline.papers.theory --out theory.png          # and theory.json

``papers.gan_1d`` says what is played and how it is measured. Needs matplotlib (extra
``figures``); no data, half a minute on a CPU.
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
from pipeline.runtime.errors import GenerationError, exit_on_user_error

if TYPE_CHECKING:
    from pipeline.papers.gan_1d import Moment


def main() -> None:
    """Parse the command line, train and draw; exit code 2 on a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.papers.theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the figure")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (0)")
    parser.add_argument("--steps", type=int, default=1500, help="steps of G to the end (1500)")
    options = parser.parse_args()
    if options.out.suffix != ".png":
        parser.error(f"--out ({options.out}): must end in .png")
    if not (options.steps >= 1 and 0 <= options.seed < 2**63):
        parser.error("--steps must be at least 1, --seed between 0 and 2**63 - 1")
    with exit_on_user_error(), signals.exit_on_interrupt("interrupted: nothing was written"):
        make(options.out, options.seed, options.steps)


def make(out: Path, seed: int, steps: int) -> None:
    """Train and write the figure and, beside it, its numbers as JSON."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise GenerationError(
            "theory: needs matplotlib; install with: pip install 'dcgan-pipeline[figures]'"
        )
    from pipeline.runtime.files import check_output_path, write_results

    picture, figures = check_output_path(out), check_output_path(out.with_suffix(".json"))
    # torch takes seconds to import; a place that cannot be written to answers without it.
    import torch

    from pipeline.papers.gan_1d import play, summary, table

    torch.set_num_threads(1)  # so small that more threads only wait for each other
    moments = play(seed, steps)
    print(table(moments), flush=True)
    numbers = json.dumps(summary(moments, seed, steps), indent=1)
    write_results({picture: draw(moments), figures: f"{numbers}\n".encode()})
    print(f"written: {picture} and {figures.name}", file=sys.stderr)


def draw(moments: list[Moment]) -> bytes:
    """A PNG like the paper's figure 1: densities and D above, the map from z to x below."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    from pipeline.papers.gan_1d import SHOWN_Z, centres, p_data, quantiles

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


if __name__ == "__main__":
    main()
