"""Compute from which network on more GPUs pay, with which batch and which buckets of gradients.

    python benchmarks/network.py [--of-floor 0.5] [--bucket 25]     # seconds; nothing is measured

The time of a step without the others: the floor of ``benchmarks/gpu.py`` at 798 TFLOP/s and
3.0 TB/s (an H100, measured by others), divided by --of-floor. It is shared out over forward and
backward passes by their operations. A layer's gradient is ready when the backward pass has left the
layer: for D in the second half, since it has passed real and generated images. DDP fills buckets in
that order and sends each when it is full; buckets follow each other, beside the backward pass. What
is still to be sent at its end is waited for.

An all-reduce takes the alpha-beta model of NCCL itself (src/graph/tuning.cc, 2.12): a ring of n
ranks makes 2 (n - 1) steps and sends 2 (n - 1) / n of the bytes; a tree makes 2 log2 N steps
between N nodes and sends twice the bytes at 0.82 of the speed; the faster one counts. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from gpu import Speeds, floor
from torch import nn

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.models.dcgan import Discriminator, Generator
from pipeline.training import gradients
from pipeline.training.flops import multiplications

H100 = Speeds(798.0, 3000.0)
GPUS = 8  # of a node
NVLINK = 450e9  # bytes/s
LINKS = {"NVLink, one node": NVLINK, "8 x 400 Gb/s": 400e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.125e9}
"""Bytes/s that a node sends; a GPU sends no more than NVLink can."""
RING, TREE = (8.4e-6, 3.4e-6, 9.6e-6), (4.4e-6, 1.2e-6, 8.5e-6)
"""Seconds: of a call, of a step within a node and between nodes. NCCL's ring/simple, tree/LL128."""
BYTES = {"fp32": 4, "bf16": 2, "exact_sum": 8}
GOAL = 0.9
CAPS = (1, 4, 8, 25, 1000)  # MiB
FIRST = 1.0  # MiB: DDP's first bucket, if the cap is its default of 25
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "dcgan_64.yaml"
NETWORKS = {
    "ngf 64, kernel 4": ["model.ngf=64", "model.ndf=64", "model.kernel_size=4"],
    "ngf 128, kernel 5 (the paper's)": [],
}


class Update(NamedTuple):
    """The backward pass of an update: its seconds; (seconds, numbers) as gradients get ready."""

    seconds: float
    ready: list[tuple[float, int]]


def updates(config: Config, step: float) -> list[Update]:
    """Return the backward passes of D's and G's update in a step of so many seconds."""
    layers_G, layers_D = multiplications(config.model)
    G, D = sum(layers_G), sum(layers_D)
    behind_G, behind_D = G - layers_G[0], D - layers_D[0]  # nothing needs a gradient of z or x
    per = step / (G + 2 * (2 * D + behind_D) + D + D + G + behind_G)
    with torch.device("meta"):
        networks = Discriminator(config.model), Generator(config.model)
    of_D = Update(2 * (D + behind_D) * per, [*_ready(networks[0], layers_D, (D + behind_D), per)])
    of_G = Update((D + G + behind_G) * per, [*_ready(networks[1], layers_G, D, per)])
    return [of_D, of_G]


def _ready(
    network: nn.Module, layers: list[int], before: float, per: float
) -> Iterator[tuple[float, int]]:
    """Yield when each parameter's gradient is ready, last layer first, and its numbers."""
    done, left = before, list(layers)
    for parameter in reversed(list(network.parameters())):
        if parameter.dim() > 1:
            done += (2 if len(left) > 1 else 1) * left.pop()
        yield done * per, parameter.numel()


def buckets(ready: list[tuple[float, int]], size: int, cap: float) -> list[tuple[float, int]]:
    """Return (seconds, bytes) of each bucket as DDP fills them: closed once it reaches the cap.

    DDP counts fp32, whatever it sends. ``train.exact_sum`` has buckets of its own, of 2^20 numbers.
    """
    if size == BYTES["exact_sum"]:
        cap = 4 * gradients.BUCKET / 2**20
    found, count, limit = list[tuple[float, int]](), 0, FIRST if cap == 25 else cap
    for moment, numbers in ready:
        count += numbers
        if 4 * count >= limit * 2**20:
            found.append((moment, count * size))
            count, limit = 0, cap
    return [*found, (moment, count * size)] if count else found


def all_reduce(count: float, nodes: int, link: float) -> float:
    """Return the seconds of an all-reduce of so many bytes over nodes of ``GPUS`` GPUs."""
    n, speed = nodes * GPUS, min(link, NVLINK)
    outside, inside = 2 * (nodes - 1), 2 * (n - 1) - 2 * (nodes - 1)
    ring = RING[0] + inside * RING[1] + outside * RING[2] + 2 * (n - 1) / n * count / speed
    levels = 2 * (GPUS - 1) * TREE[1] + 2 * math.ceil(math.log2(nodes)) * TREE[2]
    return min(ring, TREE[0] + levels + 2 * count / (0.82 * speed))


def exposed(update: Update, size: int, cap: float, cost: Callable[[float], float]) -> float:
    """Return the seconds that an update waits for the other ranks after its backward pass."""
    clock = 0.0
    for moment, count in buckets(update.ready, size, cap):
        clock = max(clock, moment) + cost(count)
    return max(0.0, clock - update.seconds)


def efficiency(
    config: Config, batch: int, size: int, cap: float, nodes: int, link: float, of_floor: float
) -> float:
    """Return the images/s of a GPU among others as a share of what it would do alone."""
    step = floor(config.model, batch, H100, fused=False)[0] / of_floor
    cost = lambda count: all_reduce(count, nodes, link)  # noqa: E731
    waited = sum(exposed(one, size, cap, cost) for one in updates(config, step))
    return step / (step + waited)


def table_of_buckets(config: Config, of_floor: float) -> Iterator[str]:
    names = ["one, at the end" if cap == 1000 else f"{cap} MiB" for cap in CAPS]
    yield f"| GPUs, link | images per GPU | backward, ms | {' | '.join(names)} |"
    yield "|---" * (3 + len(CAPS)) + "|"
    for (name, link), nodes in zip(LINKS.items(), (1, 8, 8, 8), strict=True):
        for batch in (128, 1024):
            step = floor(config.model, batch, H100, fused=False)[0] / of_floor
            passes, cells = updates(config, step), []
            cost = lambda count, n=nodes, b=link: all_reduce(count, n, b)  # noqa: E731
            for cap in CAPS:
                calls = sum(len(buckets(one.ready, 4, cap)) for one in passes)
                waited = 1e3 * sum(exposed(one, 4, cap, cost) for one in passes)
                cells.append(f"{waited:.2f} ms, {calls}")
            backward = 1e3 * sum(one.seconds for one in passes)
            place = f"| {nodes * GPUS}, {name} | {batch} | {backward:.1f}"
            yield f"{place} | {' | '.join(cells)} |"


def table_of_links(config: Config, cap: float, of_floor: float) -> Iterator[str]:
    yield (
        "| link | GPUs | fp32: 128 images | 1,024 | bf16: 128 | 1,024 | exact_sum: 128 | 1,024 "
        "| images per GPU for 90 %: fp32 | bf16 | batch of all: fp32 | bf16 |"
    )
    yield "|---" * 12 + "|"
    for name, link in LINKS.items():
        for nodes in (1,) if link == NVLINK else (2, 8, 64):
            rest = cap, nodes, link, of_floor
            shares = [
                f"{efficiency(config, batch, size, *rest):.0%}"
                for size in BYTES.values()
                for batch in (128, 1024)
            ]
            batches = [2**k for k in range(3, 17)]
            least = [
                next((b for b in batches if efficiency(config, b, size, *rest) >= GOAL), None)
                for size in (4, 2)
            ]
            said = [f"{b:,}" if b else f"above {2**16:,}" for b in least]
            total = [f"{b * nodes * GPUS:,}" if b else "" for b in least]
            yield f"| {name} | {nodes * GPUS} | {' | '.join([*shares, *said, *total])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--of-floor", type=float, default=0.5, help="share of the floor's speed a step reaches")
    add("--bucket", type=float, default=25, metavar="MIB", help="for the table of links")
    options = parser.parse_args()
    print("Every number is computed; no GPU was used.")
    for name, overrides in NETWORKS.items():
        config = load(CONFIG, [*overrides, "data.batch_size=128"])
        config = replace(config, train=replace(config.train, micro_batch=None))
        count = sum(numbers for one in updates(config, 1.0) for _, numbers in one.ready)
        times = (
            f"{1e3 * floor(config.model, b, H100, fused=False)[0] / options.of_floor:.1f} ms"
            for b in (128, 1024)
        )
        print(f"\n**{name}**: {4e-6 * count:.1f} MB of fp32 gradients a step; assumed: a step of")
        print(f"{' (128 images) and '.join(times)} (1,024) on one GPU.\n")
        print("Wait after the backward passes in fp32, and all-reduces a step, by bucket:\n")
        print("\n".join(table_of_buckets(config, options.of_floor)))
        print(f"\nSpeed of a GPU as a share of one alone, buckets of {options.bucket:g} MiB:\n")
        print("\n".join(table_of_links(config, options.bucket, options.of_floor)))


if __name__ == "__main__":
    main()
