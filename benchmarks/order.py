"""Measure the data order by size of the set: start, resume, batch, change of epoch, memory.

    python benchmarks/order.py          # 10 thousand, 1 million and 30 million samples

The order needs only the sizes of the shards, so there are no images. Each line is a fresh process.
Prints Markdown for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from pipeline.data.order import Order

BATCH = 128
PER_SHARD = 10_000
SAMPLES = (10_000, 1_000_000, 30_000_000)
KINDS: dict[str, dict[str, int]] = {
    "uniform (block=1)": {},
    "big data (block=250, window=16000, lanes=8)": {"block": 250, "window": 16_000, "lanes": 8},
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(samples: int, kind: str, fraction: float) -> dict[str, float]:
    """Measure time and memory in a process that starts at a fraction of an epoch."""
    Order([PER_SHARD], 1).batch(0, BATCH)  # numpy imports its generators on first use
    sizes = np.full(-(-samples // PER_SHARD), PER_SHARD)
    at = int(fraction * samples) // BATCH
    before = peak_mib()
    found: dict[str, float] = {}

    def first() -> Order:
        order = Order(sizes, 0, **KINDS[kind])
        order.batch(at, BATCH)
        return order

    began = time.perf_counter()
    order = first()
    found["start"] = time.perf_counter() - began
    found["memory"] = peak_mib() - before
    steps = range(at + 1, at + 1 + min(500, samples // BATCH // 4))
    found["batch"] = median(timed(lambda k=k: order.batch(k, BATCH)) for k in steps)
    found["epoch"] = timed(lambda: order.batch(samples // BATCH, BATCH))
    return found


def elsewhere(samples: int, kind: str, fraction: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(samples), kind, str(fraction)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        samples, kind, fraction = options.one
        print(json.dumps(measure(int(samples), kind, float(fraction))))
        return
    print(
        f"Batch {BATCH}, shards of {PER_SHARD} samples, medians of {options.rounds} fresh "
        "processes.\n\n"
        "| order | samples | start | resume at 99 % | batch | first batch of the next epoch "
        "| memory |\n|---|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        for samples in SAMPLES:
            begun = [elsewhere(samples, kind, 0.0) for _ in range(options.rounds)]
            resumed = [elsewhere(samples, kind, 0.99) for _ in range(options.rounds)]
            start, again = (median(r["start"] for r in rows) for rows in (begun, resumed))
            batch, epoch, memory = (
                median(r[k] for r in begun) for k in ("batch", "epoch", "memory")
            )
            print(
                f"| {kind} | {samples:,} | {start * 1e3:.1f} ms | {again * 1e3:.1f} ms "
                f"| {batch * 1e6:.0f} us | {epoch * 1e3:.1f} ms | {memory:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
