"""Compare losses and scores of the demo in bf16 and fp32, seed by seed.

    python benchmarks/precision.py --work runs/precision --plot docs/precision.png   # 15 minutes
    python benchmarks/precision.py --work runs/grads --key train.grad_dtype     # two ranks each

The same seed means the same weights, images and noise; only ``train.precision``, or the type in
which gradients travel, differs. The last snapshot is scored against training images. Finished runs
are not repeated. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from ablation import CONFIG, experiments, said, score, shards
from loader import machine

from pipeline.data.shards import read_index

PRECISIONS = ("fp32", "bf16")
CURVES = {"loss/D": "loss of D", "loss/G": "loss of G", "scores/real": "D(x)"}
LAST = 0.25  # share of a run at its end; its rows are averaged for the table
COLOURS = {"fp32": "#24508f", "bf16": "#e08a1e"}
Job = tuple[str, int]
Rows = list[dict[str, Any]]


def markdown(rows: dict[Job, Rows], folders: dict[Job, Path], reference: str) -> str:
    seeds = sorted({seed for _, seed in rows})
    found: dict[str, dict[Job, float]] = {}
    for job, values in rows.items():
        final = values[-max(1, int(len(values) * LAST)) :]
        for key, title in CURVES.items():
            found.setdefault(title, {})[job] = mean(row[key] for row in final)
        fd, kid = score(folders[job], "ema", reference)
        found.setdefault("FD", {})[job] = fd
        found.setdefault("KID", {})[job] = kid
    lines = ["| | fp32 | bf16 | bf16 - fp32, same seed |", "|---|---|---|---|"]
    for title, by_job in found.items():
        columns = [[by_job[p, seed] for seed in seeds] for p in PRECISIONS]
        columns.append([b - a for a, b in zip(*columns, strict=True)])
        digits = 1 if title == "FD" else 3
        lines.append(f"| {title} | {' | '.join(said(c, digits) for c in columns)} |")
    return "\n".join(lines)


def plot(rows: dict[Job, Rows], path: Path) -> None:
    """Draw a panel for each loss, with a line for each precision and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for (precision, seed), values in rows.items():
            label = precision if seed == 0 else None
            steps = [row["step"] for row in values]
            shown = [row[key] for row in values]
            axes.plot(steps, shown, color=COLOURS[precision], lw=0.7, alpha=0.8, label=label)
        axes.set(title=title, xlabel="step")
    axes.legend()
    figure.savefig(path, dpi=80, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="folder of data and runs; kept")
    add("--key", default="train.precision", help="train.precision, or train.grad_dtype")
    add("--steps", type=int, default=1200)
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=2, help="runs at a time, of one thread each (2)")
    add("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    reference = read_index(str(shards(work, "train"))).fingerprint
    variants = {p: [f"{options.key}={p}", "train.log_every=10"] for p in PRECISIONS}
    budget = {"seeds": options.seeds, "steps": options.steps, "jobs": options.jobs}
    ranks = 2 if options.key == "train.grad_dtype" else 1
    folders = experiments(work, variants, set(), **budget, ranks=ranks)
    rows = {
        job: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for job, folder in folders.items()
    }
    print(machine())
    print(
        f"{options.steps} steps of `{CONFIG}`, {options.seeds} seeds, mean ± std; losses and D(x)"
    )
    print("over the last quarter, scores of the last snapshot, 2,000 images against 10,000.\n")
    print(markdown(rows, folders, reference))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
