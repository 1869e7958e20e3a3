"""How often does train.watch raise a false alarm, and how soon a right one?

    python benchmarks/watch.py                                     # demo.yaml's networks, an hour
    python benchmarks/watch.py --width 16 --batch 32 --steps 200   # three minutes of processor time

Small trainings on Fashion-MNIST in memory: recipes that train well, and some that are meant to
collapse, with several seeds. Their rows are judged by pipeline/training/collapse.py as in a real
run, for several values of train.watch_steps. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from loader import machine
from torch import Tensor
from torch.nn.functional import pad

from pipeline.config.loading import load
from pipeline.data.source import Choice
from pipeline.data.sources import find
from pipeline.models.noise import draw_z, rng
from pipeline.runs.alarms import Alarm
from pipeline.runtime import launch
from pipeline.runtime.errors import NonFiniteLoss
from pipeline.training.collapse import Collapse
from pipeline.training.gan import GAN

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
R3GAN = ["model.loss=relativistic", "model.d_norm=none", "optim.beta1=0",
         "stability.r1_gamma=0.05", "stability.r2_gamma=0.05"]  # fmt: skip
HEALTHY = {
    "demo.yaml": [],
    "DiffAugment": ["stability.augment=[color,translation,cutout]"],
    "label smoothing 0.1": ["stability.label_smoothing=0.1"],
    "hinge, spectral norm": ["model.loss=hinge", "model.d_norm=spectral"],
    "relativistic, R1, R2, no norm": R3GAN,
}
COLLAPSING = {
    "D's rate x 20": ["optim.d_lr=4e-3"],
    "G's rate / 1000": ["optim.g_lr=2e-7"],
    "D's rate x 20, G's / 100": ["optim.d_lr=4e-3", "optim.g_lr=2e-6"],
    "G's rate x 500": ["optim.g_lr=0.1"],
}
IMAGES = 10_000
EVERY = 10
"""Steps between two rows."""
Row = dict[str, float]


@cache
def pictures() -> Tensor:
    """Return the first images of Fashion-MNIST, (n, 1, 32, 32) uint8."""
    source = find("fashion-mnist", Choice())
    read = source.opener()
    pixels = np.stack([np.asarray(read(row)) for row in range(IMAGES)])
    return pad(torch.from_numpy(pixels)[:, None], (2, 2, 2, 2))


def train(job: tuple[list[str], int, argparse.Namespace]) -> dict[int, Row]:
    """Train one run; return its rows by step. A run that breaks off has fewer rows."""
    words, seed, options = job
    torch.set_num_threads(1)
    sizes = [f"model.ngf={options.width}", f"model.ndf={options.width}"]
    budget = [f"data.batch_size={options.batch}", f"train.log_every={EVERY}"]
    config = load(DEMO, [*sizes, *budget, *words, f"run.seed={seed}", "train.precision=fp32"])
    gan, images = GAN(config, launch.make_accelerator("fp32"), 1), pictures()
    rows: dict[int, Row] = {}
    for step in range(1, options.steps + 1):
        chosen = torch.randint(IMAGES, (options.batch,), generator=rng(seed, "images", step))
        x = images[chosen].float().div(127.5).sub(1).to(memory_format=torch.channels_last)
        z = draw_z(config.model, options.batch, rng(seed, "z", step))
        try:
            gan.update_D([x], [z], step)
            gan.update_G([z], step, real=[x])
        except NonFiniteLoss:
            break
        if gan.watch.due(step):
            rows[step] = gan.watch.row()
    return rows


def first_alarm(rows: dict[int, Row], patience: int) -> Alarm | None:
    """Return the first alarm that the rows give with ``train.watch_steps=patience``."""
    words = [f"train.log_every={EVERY}", f"train.watch_steps={patience}", "train.watch=warn"]
    collapse = Collapse(load(DEMO, words))
    return next((a for step, row in rows.items() for a in collapse.judge(step, row)), None)


def cells(runs: Sequence[dict[int, Row]], patience: int) -> str:
    found = [alarm for rows in runs if (alarm := first_alarm(rows, patience))]
    text = f"{len(found)} of {len(runs)}"
    if found:
        steps = sorted(alarm.step for alarm in found)
        signs = sorted({alarm.sign.removeprefix("watch/") for alarm in found})
        text += f" ({', '.join(signs)}), step {steps[0]} to {steps[-1]}"
    return text


def last(runs: Sequence[dict[int, Row]], key: str, count: int = 10) -> str:
    """Return the median of a metric over each run's last rows, lowest to highest run."""
    ends = [median([row[key] for row in rows.values()][-count:]) for rows in runs if rows]
    return f"{min(ends):.2g} to {max(ends):.2g}" if ends else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=32, help="ngf and ndf")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--save", type=Path, help="file for the rows: the same command goes on")
    parser.add_argument("--patience", type=int, nargs="*", help="values of train.watch_steps")
    options = parser.parse_args()
    patience = options.patience or [options.steps // 8, options.steps // 4, options.steps // 2]
    recipes = [(name, words, "") for name, words in HEALTHY.items()]
    recipes += [(name, words, "meant to collapse") for name, words in COLLAPSING.items()]
    jobs = [(words, seed, options) for seed in range(options.seeds) for _, words, _ in recipes]
    done: list[dict[int, Row]] = []
    if options.save and options.save.is_file():
        lines = options.save.read_text().splitlines()
        done = [{int(step): row for step, row in json.loads(line).items()} for line in lines]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for rows in pool.map(train, jobs[len(done) :]):
            done.append(rows)
            if options.save:
                with options.save.open("a") as file:
                    file.write(json.dumps(rows) + "\n")
    print(machine())
    print(
        f"{options.steps} steps, seeds 0 to {options.seeds - 1}, ngf = ndf = {options.width}, "
        f"batch {options.batch}, a row every {EVERY} steps, {IMAGES} images.\n"
    )
    heads = [f"alarms at {count} steps" for count in patience]
    print(f"| recipe | | {' | '.join(heads)} | loss_D at the end | diversity at the end |")
    print(f"|{'---|' * (4 + len(patience))}")
    for index, (name, _, kind) in enumerate(recipes):
        runs = done[index :: len(recipes)]
        shown = [cells(runs, count) for count in patience]
        ends = [last(runs, "watch/loss_D"), last(runs, "watch/diversity")]
        print(f"| {' | '.join([name, kind, *shown, *ends])} |")


if __name__ == "__main__":
    main()
