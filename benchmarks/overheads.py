"""Measure the time of a run outside the two updates, and how fast commands answer.

    python benchmarks/overheads.py             # two CPU minutes

Checkpoints, snapshots, grids and averages are timed one by one, and divided by the training time
between two of them. Waiting for data is the figure of a real run. Real runs with and without W&B
alternate.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import harmonic_mean

import torch
from accelerate import Accelerator
from loader import machine, spread
from pictures import fashion_mnist, prepare
from step import seconds

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.models.noise import draw_z, rng
from pipeline.models.sampling import draw_images, make_sampler
from pipeline.runs import checkpoint
from pipeline.runtime.hardware import native_bf16
from pipeline.runtime.launch import MIXED_PRECISION
from pipeline.training.gan import GAN

REPO = Path(__file__).resolve().parents[1]
PAPER = ["--config", "configs/dcgan_64.yaml"]
SMALLER = ["model.ngf=64", "model.ndf=64", "model.kernel_size=4"]


def trained(shards: Path, *settings: str) -> list[dict[str, float]]:
    """Train 16 steps with the real command; return the rows of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [
            *PAPER,
            *SMALLER,
            f"data.shards={shards}",
            f"run.dir={run}",
            "train.total_steps=16",
        ]
        words += ["train.sample_every=0", "train.checkpoint_every=0", *settings]
        command = [sys.executable, "pipeline/train.py", *words]
        subprocess.run(command, cwd=REPO, check=True, capture_output=True)
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def to_first_step(shards: Path) -> float:
    """Measure the seconds from the training command to the end of its first step."""
    one = ["train.total_steps=1", "train.log_every=1", "tracking.wandb=disabled"]
    began = time.time()
    return trained(shards, *one)[0]["time"] - began


def answers(rounds: int) -> list[str]:
    """Measure the seconds that a command takes to answer, and whether it imported torch."""
    shown = ["| command | seconds | torch imported |", "|---|---|---|"]
    commands = {
        "train.py --help": ["pipeline/train.py", "--help"],
        "train.py with a mistyped key": ["pipeline/train.py", *PAPER, "optim.glr=1"],
        "evaluate.py --help": ["pipeline/evaluate.py", "--help"],
    }
    for name, words in commands.items():
        spent = []
        for _ in range(rounds):
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=REPO, capture_output=True)
            spent.append(time.perf_counter() - began)
        told = subprocess.run(
            [sys.executable, "-X", "importtime", *words], cwd=REPO, capture_output=True, text=True
        )
        imported = any(line.split("|")[-1].strip() == "torch" for line in told.stderr.splitlines())
        shown.append(f"| {name} | {spread(spent, '.2f')} | {'yes' if imported else 'no'} |")
    return shown


def occasional(config: Config, step: float, gan: GAN, folder: Path) -> list[str]:
    """Time occasional work, and its share of the time between two occurrences."""
    model, every = config.model, config.train
    device = gan.accelerator.device
    state = {"run_id": "x", "stream": {}, "micro_batch": 1, "precision": "fp32"}

    def save() -> None:
        checkpoint.save(folder, 1, gan.networks(), gan.optimizers(), state)

    def snapshot() -> None:
        snapshot.export_snapshot(folder, 1, gan.G_ema.state_dict(), config, device)

    def grid() -> None:
        z = draw_z(model, 64, rng(0, "grid"))
        draw_images(make_sampler(model, gan.G_ema.state_dict(), device), z)

    shown = ["| what | seconds | every | share of that time |", "|---|---|---|---|"]
    for name, work, steps in (
        ("moving average", lambda: gan.update_average(1), 1),
        ("checkpoint, synced and hashed", save, every.checkpoint_every),
        ("snapshot with BatchNorm statistics", snapshot, every.checkpoint_every),
        ("sample grid", grid, every.sample_every),
    ):
        spent = seconds(work, 3)
        unit = "step" if steps == 1 else "steps"
        shown.append(f"| {name} | {spent:.3f} | {steps} {unit} | {spent / (steps * step):.2%} |")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    config = load(str(REPO / "configs" / "dcgan_64.yaml"), SMALLER)
    print(machine(), "\n\nngf = ndf = 64, kernel 4, batch 128, else configs/dcgan_64.yaml.\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = Path(
            prepare(fashion_mnist(4096, folder / "raw"), folder / "npy", 64, "npy").location
        )
        runs: dict[str, list[list[dict[str, float]]]] = {"disabled": [], "offline": []}
        for _ in range(rounds):
            for mode, rows in runs.items():
                # A row every step: twenty to a hundred times as many as usual.
                every = ["train.log_every=8"] if mode == "disabled" else ["train.log_every=1"]
                found = trained(shards, f"tracking.wandb={mode}", *every)
                rows.append([row for row in found if row["step"] > 8])
        first = [to_first_step(shards) for _ in range(rounds)]
        waits = [rows[-1]["perf/data_wait"] for rows in runs["disabled"]]
        print(f"Waiting for data takes {spread(waits, '.2%')} of the time.\n")
        plain, logged = (
            [harmonic_mean(row["perf/images_per_sec"] for row in rows) for rows in runs[mode]]
            for mode in ("disabled", "offline")
        )
        ratios = [a / b for a, b in zip(logged, plain, strict=True)]
        print(
            f"With W&B (offline) and a row of metrics each step: {spread(ratios, '.1%')} of the "
            "speed without either.\n"
        )
        precision = "bf16" if native_bf16() else "fp32"
        gan = GAN(config, Accelerator(mixed_precision=MIXED_PRECISION[precision]), 1)
        size = (config.data.batch_size, 3, 64, 64)
        x = torch.zeros(size, device=gan.accelerator.device)
        z = draw_z(config.model, config.data.batch_size, rng(0, "z", 1)).to(x.device)

        def step() -> None:
            gan.update_D([x.to(memory_format=torch.channels_last)], [z], 1)
            gan.update_G([z], 1)

        spent = seconds(step, 3)
        print(f"A step takes {spent:.2f} s.\n")
        print("\n".join(occasional(config, spent, gan, folder)), "\n")
    print("\n".join(answers(rounds)))
    print(f"| train.py to the end of its first step | {spread(first, '.2f')} | yes |")


if __name__ == "__main__":
    main()
