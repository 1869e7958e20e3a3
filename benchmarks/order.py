"""Measure the data order by size of the set: first batch, seek, later batches, memory.

    python benchmarks/order.py                       # 1 million to 1 billion samples
    python benchmarks/order.py --samples 1000000

The order needs only the sizes of the shards, so there are no images. What is measured is a rank's
4,096 rows of a batch that 8 ranks share. ``before`` is what a rank did up to lwb2: it computed all
rows of the batch and kept its own. Each figure is of a fresh process; ``before`` and ``now`` take
turns. CPU time of its one thread is measured, so that other programs count little. Prints Markdown
for benchmarks/README.md.
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

from pipeline.data.order import SORTED, Order

OWN, RANKS, RANK = 4096, 8, 3
BATCH = OWN * RANKS
PER_SHARD = 10_000
SAMPLES = (1_000_000, 30_000_000, 100_000_000, 1_000_000_000)
MOST_SORTED = 30_000_000
"""Samples of the largest uniform order by a table that is tried: it takes 40 bytes a sample."""
LANES = (1, 64, 512)
SHARDS = {"block": PER_SHARD, "window": 3 * PER_SHARD}
KINDS: dict[str, dict[str, int]] = {
    "uniform": {},
    **{f"block = shard, window = 3 shards, lanes = {n}": SHARDS | {"lanes": n} for n in LANES},
    "block = 128, window = 8192": {"block": 128, "window": 8192},
}
COLUMNS = ("first", "batch", "seek", "epoch", "memory")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) * 1e3


def measure(samples: int, kind: str, *, before: bool) -> dict[str, float]:
    """Measure milliseconds and MiB in this process."""
    sizes = np.full(-(-samples // PER_SHARD), PER_SHARD)
    orders: list[Order] = []

    def make() -> None:
        orders.append(Order(sizes, 0, **KINDS[kind], algorithm=SORTED if before else None))

    def own_rows(k: int) -> None:
        first = RANK * OWN
        if before:
            orders[-1].batch(k, BATCH)[1][first : first + OWN].copy()
        else:
            orders[-1].rows(k, BATCH, first, first + OWN)

    Order(np.full(7, PER_SHARD), 1, block=9, window=90).batch(
        0, 9
    )  # numpy's first use of its parts
    start, per_epoch = peak_mib(), samples // BATCH
    first = timed(make) + timed(lambda: own_rows(0))
    batch = median(timed(lambda k=k: own_rows(k)) for k in range(1, min(20, per_epoch // 2)))
    seek = median(
        timed(lambda k=k: own_rows(k))
        for k in (per_epoch // 2, per_epoch // 3, per_epoch * 9 // 10)
    )
    epoch = timed(lambda: own_rows(per_epoch + 1))
    return dict(zip(COLUMNS, (first, batch, seek, epoch, peak_mib() - start), strict=True))


def elsewhere(samples: int, kind: str, version: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(samples), kind, version]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        samples, kind, version = options.one
        print(json.dumps(measure(int(samples), kind, before=version == "before")))
        return
    print(
        f"{OWN:,} own rows of a batch of {BATCH:,}, shards of {PER_SHARD:,} samples, medians of "
        f"{options.rounds} fresh processes; milliseconds of CPU time, before -> now.\n\n"
        "| order | samples | first batch of a run | per batch | seek | first batch of the next "
        "epoch | memory, MiB |\n|---|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        for samples in options.samples:
            versions = ["before", "now"]
            if not KINDS[kind] and samples > MOST_SORTED:
                versions.remove("before")
            found: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
            for _ in range(options.rounds):
                for version, rows in found.items():
                    rows.append(elsewhere(samples, kind, version))
            cells = []
            for column in COLUMNS:
                middle = {v: median(row[column] for row in rows) for v, rows in found.items()}
                old = f"{middle['before']:.1f}" if "before" in middle else "–"
                cells.append(f"{old} -> {middle['now']:.1f}")
            print(f"| {kind} | {samples:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
