"""Measure the time from the command to the first resumed step, at 1 % and 99 % of an epoch.

    python benchmarks/resume.py --shards data/fashion-mnist-32

It trains two runs of a tiny model to 1 % and to 99 % of an epoch. Then the real training command
resumes each in turn in a fresh process, and the first line of the id log stops the clock.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.data.shards import read_index

REPO = Path(__file__).resolve().parents[1]
BATCH = 60
CONFIG = """
model: {{image_size: {size}, channels: {channels}, z_dim: 8, ngf: 4, ndf: 4}}
data: {{shards: "{shards}", batch_size: {batch}, workers: 2, record_ids: true}}
train: {{checkpoint_every: 0, checkpoint_minutes: 0, sample_every: 0, log_every: 100000}}
tracking: {{wandb: disabled}}
"""


def command(config: Path, run_dir: Path, steps: int) -> list[str]:
    train = [sys.executable, str(REPO / "pipeline/train.py"), "--config", str(config)]
    return [*train, f"run.dir={run_dir}", f"train.total_steps={steps}"]


def seconds_to_first_step(config: Path, source: Path, step: int, scratch: Path) -> float:
    """Resume a copy of ``source`` and wait for the step after its checkpoint."""
    run_dir = scratch / "resumed"
    shutil.copytree(source, run_dir)
    log = run_dir / "ids" / "rank_0.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(command(config, run_dir, step + 1), stderr=subprocess.DEVNULL)
    while f'"step": {step + 1},' not in log.read_text():
        if process.poll() not in (None, 0):
            raise SystemExit("the resumed run failed")
        time.sleep(0.005)
    elapsed = time.perf_counter() - began
    process.wait()
    shutil.rmtree(run_dir)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    index = read_index(str(options.shards))
    epoch = index.num_samples // BATCH
    places = {"1 %": max(1, epoch // 100), "99 %": epoch * 99 // 100}
    times: dict[str, list[float]] = {name: [] for name in places}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        config = scratch / "tiny.yaml"
        size, _, channels = index.shape
        shards = options.shards.resolve()
        config.write_text(CONFIG.format(size=size, channels=channels, shards=shards, batch=BATCH))
        for name, step in places.items():
            run = command(config, scratch / f"at_{step}", step)
            subprocess.run(run, check=True, stderr=subprocess.DEVNULL)
            print(f"trained to step {step} ({name} of an epoch)", file=sys.stderr)
        for _ in range(options.rounds):
            for name, step in places.items():
                source = scratch / f"at_{step}"
                times[name].append(seconds_to_first_step(config, source, step, scratch))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True
    ).stdout.strip()
    print(f"{platform.machine()}, {index.num_samples} images, commit {commit}\n")
    print("| place in the epoch | median s | min | max |\n|---|---|---|---|")
    for name, values in times.items():
        print(
            f"| {name} (step {places[name]}) | {statistics.median(values):.2f} "
            f"| {min(values):.2f} | {max(values):.2f} |"
        )
    ratio = statistics.median(times["99 %"]) / statistics.median(times["1 %"])
    print(f"\nratio 99 % / 1 %: {ratio:.2f}")


if __name__ == "__main__":
    main()
