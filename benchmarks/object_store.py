"""Load a set from an S3 server, with a node cache that holds it all and one that holds a third.

    python benchmarks/object_store.py       # Fashion-MNIST, with the server of moto on this machine

Two epochs in blocks of a shard, as docs/options.md advises for sets larger than the cache; the ids
of every batch are compared with the order. The server shares the cores with the loader, so that the
rates are lower than with a store elsewhere. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

import boto3
import numpy as np
from loader import machine
from pictures import fashion_mnist, prepare

from pipeline.config.schema import Config, DataConfig
from pipeline.data.loader import Loader, make_order
from pipeline.data.shards import Index, read_index

BATCH, WORKERS, EPOCHS = 128, 2, 2
SET = "s3://images/set"


@contextmanager
def store() -> Iterator[Counter[str]]:
    """Start moto's server and point the SDK to it; yields the GETs of each object so far."""
    keys = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "of this benchmark"}
    os.environ |= keys | {"AWS_DEFAULT_REGION": "us-east-1"}
    code = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert server.stderr is not None
    lines, gets = server.stderr, Counter[str]()
    for line in lines:
        if found := re.search(r"Running on (http://\S+)", line):
            os.environ["AWS_ENDPOINT_URL"] = found[1]
            break

    def count() -> None:
        for line in lines:
            if found := re.search(r"GET (\S+) HTTP", line):
                gets[found[1]] += 1

    threading.Thread(target=count, daemon=True).start()
    try:
        yield gets
    finally:
        server.kill()
        server.wait()


def upload(index: Index) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in sorted(Path(index.location).glob("*.*")):
        client.upload_file(str(path), "images", f"set/{path.name}")


def load(shards: str, cache: Path, gib: float, per_shard: int) -> tuple[float, float]:
    """Load two epochs; returns seconds to the first batch and images/s of the rest."""
    place = {"cache_dir": str(cache), "cache_gib": gib, "block": per_shard, "window": 3 * per_shard}
    data = DataConfig(shards=shards, batch_size=BATCH, workers=WORKERS, **place)  # type: ignore[arg-type]
    began = time.perf_counter()
    config, index = Config(data=data), read_index(shards)
    order = make_order(config, index)
    steps = EPOCHS * index.num_samples // BATCH
    with closing(Loader(config, index, order).batches(0)) as batches:
        for step in range(steps):
            batch = next(batches)
            assert np.array_equal(batch.ids, order.batch(step, BATCH)[1])
            if step == 0:
                first = time.perf_counter()
    return first - began, (steps - 1) * BATCH / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12_800, help="of Fashion-MNIST, at 64x64x3")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, store() as gets:
        folder = Path(scratch)
        index = prepare(fashion_mnist(options.images, folder / "idx"), folder / "set", 64, "npy")
        upload(index)
        whole = sum(shard.filesize for shard in index.shards)
        kinds = {
            "local files": (index.location, 0.0),
            "S3, all in the cache": (SET, 0.0),
            "S3, a third in the cache": (SET, whole / 3 / 2**30),
        }
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in kinds}
        for number in range(options.rounds):
            for name, (shards, gib) in kinds.items():
                before = sum(gets.values())
                cache = folder / f"cache {name} {number}"
                first, rate = load(shards, cache, gib, max(index.sizes))
                found[name].append((first, rate, sum(gets.values()) - before))
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
        print(machine())
        print(
            f"{index.num_samples} images of 64x64x3 in {len(index.shards)} shards, "
            f"{whole / 2**20:.0f} MiB; {EPOCHS} epochs, {WORKERS} workers.\n\n"
            "| shards | s to the first batch | images/s after it | GETs |\n|---|---|---|---|"
        )
        for name, rounds in found.items():
            first, rate, asked = (median(values) for values in zip(*rounds, strict=True))
            low, high = (edge(row[1] for row in rounds) for edge in (min, max))
            print(
                f"| {name} | {first:.2f} | {rate:,.0f} ({low:,.0f} to {high:,.0f}) | {asked:.0f} |"
            )


if __name__ == "__main__":
    main()
