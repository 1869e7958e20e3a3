"""Measure which options improve a DCGAN on Fashion-MNIST: each alone over demo.yaml, equal budget.

    python benchmarks/ablation.py --work runs/ablation         # an hour on two cores
    python benchmarks/ablation.py --read benchmarks/ablation.json    # print its table again

Every run is `pipeline/train.py` and `pipeline/evaluate.py` on the demo's networks (32x32, with the
same steps and images for all). The *last* snapshot is scored, not the best. Option values are those
of the papers they come from; none was tuned. Options are chosen by their scores against training
images. The unchanged demo.yaml and the variants of --also are also scored against the 10,000 test
images, to report the choice. Finished runs are not repeated, so the same command resumes after an
interruption. Prints Markdown; --plot writes a picture, --json the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from loader import machine

from pipeline.data.shards import read_index
from pipeline.runs.step_folders import committed

REPO = Path(__file__).resolve().parents[1]
CONFIG = "configs/demo.yaml"
BASE = "demo.yaml"  # the paper's losses and rates on small networks, with an average of G
VARIANTS: dict[str, list[str]] = {
    BASE: [],
    "least squares": ["model.loss=least_squares"],
    "hinge": ["model.loss=hinge"],
    "label smoothing 0.1": ["stability.label_smoothing=0.1"],
    "TTUR 1e-4, 4e-4": ["optim.g_lr=1e-4", "optim.d_lr=4e-4"],
    "DiffAugment": ["stability.augment=[color,translation,cutout]"],
    "R1, gamma 1": ["stability.r1_gamma=1"],
    "spectral norm": ["model.d_norm=spectral"],
    "spectral norm, hinge": ["model.d_norm=spectral", "model.loss=hinge"],
}
EVALUATION = ["eval.num_images=2000", "eval.reference_images=10000", "tracking.wandb=disabled"]
SPLITS = ("train", "test")
SEEDS = 6


class Score(NamedTuple):
    """FD and KID of one run, by features of the demo's `eval.extractor`."""

    fd: float
    kid: float


Table = dict[str, dict[str, list[Score]]]
"""Scores of every seed by variant and split."""


def shards(work: Path, split: str) -> Path:
    """Return the folder of Fashion-MNIST shards at 32x32; pack them if they are missing."""
    folder = work / split
    if not (folder / "index.json").is_file():
        words = ["fashion-mnist", "--split", split, "--out", folder, "--size", 32, "--channels", 1]
        run("-m", "pipeline.prepare", *words)
    return folder


def run(*words: object, log: Path | None = None) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


LAUNCHER = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--quiet"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def experiment(
    work: Path,
    name: str,
    options: list[str],
    seed: int,
    steps: int,
    reported: set[str],
    ranks: int = 1,
) -> Path:
    """Train and score one run, unless it is finished; return its folder."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    folder = work / f"{slug}-{steps}-{seed}"
    same = [f"run.dir={folder}", f"run.seed={seed}", "tracking.wandb=disabled"]
    budget = [f"train.total_steps={steps}", "train.checkpoint_every=0", "train.sample_every=0"]
    if not (folder / "FINISHED").is_file():
        launch = [*LAUNCHER, "--num_processes", ranks] if ranks > 1 else []
        train = [*launch, "pipeline/train.py", "--config", CONFIG, *same, *budget]
        run(*train, f"data.shards={work / 'train'}", *options, log=folder.with_suffix(".log"))
    for split in SPLITS if name in reported else SPLITS[:1]:
        where = [f"data.shards={work / split}", f"eval.cache_dir={work / 'references'}"]
        run("-m", "pipeline.evaluate", "--run", folder, *where, *EVALUATION)
        if name == BASE:  # score G itself of the same training: the variant without an average
            raw = ["--checkpoint", committed(folder)[-1], "eval.weights=raw"]
            run("-m", "pipeline.evaluate", *raw, *where, *EVALUATION)
    return folder


def experiments(
    work: Path,
    variants: dict[str, list[str]],
    reported: set[str],
    *,
    seeds: int,
    steps: int,
    jobs: int,
    ranks: int = 1,
) -> dict[tuple[str, int], Path]:
    """Train and score all variants and seeds, some at a time; return their folders."""
    wanted = [(name, seed) for seed in range(seeds) for name in variants]
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(
            lambda job: experiment(
                *(work, job[0], variants[job[0]], job[1], steps, reported, ranks)
            ),
            wanted,
        )
        return dict(zip(wanted, done, strict=True))


def score(folder: Path, weights: str, reference: str) -> Score:
    """Read the scores of the last step against the shards with this fingerprint."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    (scores,) = [
        row["scores"]
        for row in rows
        if row["weights"] == weights and row["settings"]["reference"]["data"] == reference
    ]
    fd = next(value for key, value in scores.items() if key.startswith("eval/fd_"))
    kid = next(v for k, v in scores.items() if k.startswith("eval/kd_") and "_std" not in k)
    return Score(fd, kid)


def said(values: list[float], digits: int = 1) -> str:
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, metavar="DIR", help="folder of data and runs; kept")
    source.add_argument(
        "--read", type=Path, metavar="FILE.json", help="print its table; train nothing"
    )
    add("--steps", type=int, default=1200, help="steps of a run (1200)")
    add("--seeds", type=int, default=SEEDS, help="runs of each variant (6)")
    add("--jobs", type=int, default=2, help="runs at a time (2)")
    add("--only", nargs="*", metavar="NAME", help="train only these variants")
    add("--also", action="append", default=[], metavar="NAME:OPTION;...", help="one more variant")
    add("--plot", type=Path, metavar="FILE.png")
    add("--json", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.read:
        document = json.loads(options.read.read_text())
        table = {
            label: {split: [Score(*values) for values in rows] for split, rows in scores.items()}
            for label, scores in document.items()
        }
        print(markdown(table))
    else:
        table = measured(options)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.plot:
        plot(table, options.plot)


def measured(options: argparse.Namespace) -> Table:
    """Train and score the missing runs and print the table."""
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    references = {split: read_index(str(shards(work, split))).fingerprint for split in SPLITS}
    reported = {BASE}
    variants = {k: v for k, v in VARIANTS.items() if not options.only or k in options.only}
    for word in options.also:
        name, _, settings = word.partition(":")
        variants[name] = settings.split(";")
        reported.add(name)
    budget = {"seeds": options.seeds, "steps": options.steps, "jobs": options.jobs}
    folders = experiments(work, variants, reported, **budget)
    table: Table = {}
    for name in variants:
        for weights in ("raw", "ema") if name == BASE else ("ema",):
            label = f"{name}, no average" if weights == "raw" else name
            table[label] = {
                split: [
                    score(folders[name, seed], weights, references[split])
                    for seed in range(options.seeds)
                ]
                for split in SPLITS
                if split == "train" or name in reported
            }
    print(machine())
    print(f"{options.steps} steps of `{CONFIG}`, {options.seeds} seeds, mean ± std; 2,000 images")
    print("against 10,000, features of its `eval.extractor`\n")
    print(markdown(table))
    return table


def markdown(table: Table) -> str:
    """Format a row for each variant: FD, KID and their differences from BASE, paired by seed."""
    titles = ["FD, training images", "FD − base, same seed", "KID", "KID − base, same seed"]
    titles += ["FD, test images", "KID"]
    lines = [f"| variant | {' | '.join(titles)} |", f"|{'---|' * (len(titles) + 1)}"]
    base = table.get(BASE, {}).get("train", [])
    for label, scores in table.items():
        cells = []
        for k in range(2):
            pairs = zip(scores["train"], base, strict=False)
            differences = [ours[k] - theirs[k] for ours, theirs in pairs if label != BASE]
            cells += [said([score[k] for score in scores["train"]])]
            cells += [said(differences) if differences else ""]
        cells += [said([s[k] for s in scores["test"]]) if "test" in scores else "" for k in (0, 1)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(table: Table, path: Path) -> None:
    """Draw a point for each run, a bar for each mean, and a line at the mean of BASE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.38 * len(table) + 1), layout="constrained")
    axes = figure.subplots()
    names = sorted(table, key=lambda n: -mean(s.fd for s in table[n]["train"]))
    for row, name in enumerate(names):
        values = [s.fd for s in table[name]["train"]]
        axes.barh(row, mean(values), color="#bcd2ee" if name != BASE else "#f3c98b", height=0.7)
        axes.plot(values, [row] * len(values), "o", color="#24508f", ms=4)
    axes.axvline(mean(s.fd for s in table[BASE]["train"]), color="0.4", lw=1, ls="--")
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.set_xlabel("Fréchet distance to training images at the last step (lower is better)")
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
