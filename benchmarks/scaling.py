"""Measure the cost of more processes: weak scaling, and bytes on the wire.

    python benchmarks/scaling.py               # two CPU minutes

1. The training command on 1 and on 2 processes with one thread each and the same batch per process,
   and two separate trainings at once, which share only the memory.
2. The bytes that a step sends, by the kernel's counters of the loopback interface, and the minimum
   of data parallelism: one all-reduce of G's and of D's gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from loader import machine, spread
from pictures import fashion_mnist, prepare

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.models.dcgan import Discriminator, Generator

REPO = Path(__file__).resolve().parents[1]
MODEL = ["model.ngf=64", "model.ndf=64", "model.kernel_size=4"]


def start(shards: Path, run: Path, processes: int, batch: int, steps: int) -> subprocess.Popen[str]:
    """Start the training command, one thread a process; the first row of metrics is halfway."""
    settings = [f"data.shards={shards}", f"data.batch_size={batch}", f"run.dir={run}", *MODEL]
    settings += ["tracking.wandb=disabled", "train.checkpoint_every=0", "train.sample_every=0"]
    settings += [f"train.log_every={steps // 2}", f"train.total_steps={steps}", "data.workers=1"]
    train = ["pipeline/train.py", "--config", "configs/dcgan_64.yaml", *settings]
    launch = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--multi_gpu"]
    if launch:
        launch += ["--num_machines", "1", "--num_processes", str(processes), "--quiet"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launch, *train]
    return subprocess.Popen(
        words, cwd=REPO, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def rate(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["perf/images_per_sec"])


def end(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def weak_scaling(shards: Path, batch: int, steps: int, rounds: int) -> list[str]:
    rates: dict[str, list[float]] = {"1 process": [], "2 processes": [], "2 separate runs": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            runs = {name: Path(folder) / name[0] for name in ("1 process", "2 processes")}
            for count, name in enumerate(runs, 1):
                end(start(shards, runs[name], count, count * batch, steps))
                rates[name].append(rate(runs[name]))
            pair = [Path(folder) / letter for letter in "ab"]
            for process in [start(shards, run, 1, batch, steps) for run in pair]:
                end(process)
            rates["2 separate runs"].append(sum(map(rate, pair)))
    shown = [
        "| processes, one thread each | images/s | of twice one process | of two separate runs |"
    ]
    shown += ["|---|---|---|---|"]
    for name, values in rates.items():
        twice = [v / one / 2 for v, one in zip(values, rates["1 process"], strict=True)]
        apart = [v / two for v, two in zip(values, rates["2 separate runs"], strict=True)]
        parts = (spread(twice, ".0%"), spread(apart, ".0%")) if name != "1 process" else ("", "")
        shown.append(f"| {name} | {spread(values, '.1f')} | {parts[0]} | {parts[1]} |")
    return shown


def sent() -> int:
    """Read the bytes sent through the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise SystemExit("no loopback interface in /proc/net/dev")


def bytes_per_step(shards: Path, steps: int) -> float:
    """Measure the bytes a step of two ranks sends: a long run minus a short one."""
    totals = []
    for count in (steps, 3 * steps):
        with tempfile.TemporaryDirectory() as folder:
            before = sent()
            end(start(shards, Path(folder) / "run", 2, 32, count))
            totals.append(sent() - before)
    return (totals[1] - totals[0]) / (2 * steps)


def gradient_bytes(config: Config) -> int:
    networks = (Generator(config.model), Discriminator(config.model))
    return sum(4 * p.numel() for network in networks for p in network.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="images per process")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = load(str(REPO / "configs" / "dcgan_64.yaml"), MODEL)
    with tempfile.TemporaryDirectory() as folder:
        source = fashion_mnist(2048, Path(folder) / "raw")
        shards = Path(prepare(source, Path(folder) / "npy", 64, "npy").location)
        rows = weak_scaling(shards, options.batch, options.steps, options.rounds)
        travelled = bytes_per_step(shards, 5)
    # In a ring of two each rank sends every gradient once: half of them to reduce, half reduced.
    least = 2 * gradient_bytes(small)
    print("\n".join([machine(), f"Batch {options.batch} a process, ngf = ndf = 64.", "", *rows]))
    print("\n| bytes sent per step by two ranks | |\n|---|---|")
    print(f"| counted on the interface | {travelled:,.0f} |")
    print(f"| G's and D's gradients once | {least:,} |")
    print(f"| difference | {travelled / least - 1:.2%} |\n")


if __name__ == "__main__":
    main()
