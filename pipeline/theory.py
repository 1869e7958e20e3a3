"""Figure 1 of Goodfellow et al. 2014 from a real training, and its theorems in numbers.

    python -m pipeline.theory --out theory.png          # and theory.json

``pipeline.game`` says what is played and how it is measured. Needs matplotlib (extra ``figures``);
no data, half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pipeline import signals
from pipeline.errors import GenerationError, one_clear_message


def main() -> None:
    """Parse the command line, train and draw; exit code 2 on a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.theory",
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
    with one_clear_message(), signals.interruptible("interrupted: nothing was written"):
        make(options.out, options.seed, options.steps)


def make(out: Path, seed: int, steps: int) -> None:
    """Train and write the figure and, beside it, its numbers as JSON."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise GenerationError(
            "theory: needs matplotlib; install with: pip install 'dcgan-pipeline[figures]'"
        )
    from pipeline.durable import place_for, write_results

    picture, figures = place_for(out), place_for(out.with_suffix(".json"))
    # torch takes seconds to import; a place that cannot be written to answers without it.
    import torch

    from pipeline.game import play, summary, table
    from pipeline.theory_figure import draw

    torch.set_num_threads(1)  # so small that more threads only wait for each other
    moments = play(seed, steps)
    print(table(moments), flush=True)
    numbers = json.dumps(summary(moments, seed, steps), indent=1)
    write_results({picture: draw(moments), figures: f"{numbers}\n".encode()})
    print(f"written: {picture} and {figures.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
