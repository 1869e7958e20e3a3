"""Measure training from memory and from shards by batch size: the table for a GPU.

    python benchmarks/feed.py                              # on a GPU
    python benchmarks/feed.py --batches 16 32 --steps 5     # on a CPU

It runs the two updates in this process on the network of `benchmarks/training.py`: once with images
and z that are on the device already, once with the inputs of `pipeline/train.py`. Both alternate;
rates are medians. The ceiling is a large matrix product in the same precision. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from accelerate import Accelerator
from loader import machine, workers
from pictures import fashion_mnist, prepare
from step import ceiling, operations, update, wait
from torch import Tensor

from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.data.loader import Loader, make_order, normalise
from pipeline.data.shards import Index
from pipeline.models.noise import draw_z, rng, training_z
from pipeline.runtime import hardware, launch
from pipeline.training.gan import GAN
from pipeline.training.inputs import ToDevice

ROUNDS = 3
Inputs = tuple[Tensor, Tensor]


def from_memory(config: Config, device: torch.device) -> Iterator[Inputs]:
    """Yield the same images and z forever."""
    batch = config.data.batch_size
    x = torch.rand(batch, 3, 64, 64, device=device) * 2 - 1
    z = draw_z(config.model, batch, rng(0, "z", 0)).to(device)
    return repeat((x.to(memory_format=torch.channels_last), z))


def from_shards(
    config: Config, index: Index, device: torch.device
) -> Generator[Inputs, None, None]:
    """Yield images and z as `pipeline/train.py` reads them."""
    to_device = ToDevice(device)
    with closing(Loader(config, index, make_order(config, index)).batches()) as batches:
        for number, batch in enumerate(batches):
            size = config.data.batch_size
            z = training_z(config.model, 0, number * size, size, size)
            images, z = to_device(batch.images, z)
            yield normalise(images, device), z


def per_step(gan: GAN, feed: Iterator[Inputs], steps: int) -> float:
    """Return the seconds of one step."""
    wait()
    began = perf_counter()
    for _ in range(steps):
        update(gan, *next(feed))
    wait()
    return (perf_counter() - began) / steps


@dataclass(frozen=True)
class Measured:
    """What a step of one configuration takes."""

    in_memory: float
    """Seconds from memory, the median of the rounds."""
    spread: tuple[float, float]
    """The fastest and the slowest round from memory."""
    on_disk: float
    """Seconds from shards."""
    share: float
    """Of the speed from memory that is left from shards."""
    tflop: float
    peak_gib: float | None
    """Of the memory of a GPU."""


def tflop_of(config: Config, accelerator: Accelerator) -> float:
    """Count the operations of a step, of an eager pair: a counter may keep another uncompiled."""
    gan = GAN(replace(config, train=replace(config.train, compile=False)), accelerator, 1)
    memory = from_memory(config, accelerator.device)
    counted = operations(lambda: update(gan, *next(memory)))
    accelerator.free_memory()
    return counted


def measure(config: Config, index: Index, accelerator: Accelerator, steps: int) -> Measured:
    """Measure one configuration, compiled anew if it is compiled, after graphs were captured."""
    torch.compiler.reset()
    device = accelerator.device
    on_cuda = device.type == "cuda"
    memory, tflop = from_memory(config, device), tflop_of(config, accelerator)
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    gan = GAN(config, accelerator, 1)
    with closing(from_shards(config, index, device)) as shards:
        for feed in (memory, shards):
            per_step(gan, feed, 20 if on_cuda else 2)  # compile, capture graphs, fill the queues
        spent = [[per_step(gan, feed, steps) for feed in (memory, shards)] for _ in range(ROUNDS)]
    in_memory, on_disk = zip(*spent, strict=True)
    return Measured(
        in_memory=median(in_memory),
        spread=(min(in_memory), max(in_memory)),
        on_disk=median(on_disk),
        share=median(a / b for a, b in spent),
        tflop=tflop,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
    )


def row(batch: int, found: Measured, best: float) -> str:
    """Show rates, share of the ceiling and memory of one configuration."""
    rate = found.tflop / found.in_memory
    peak = "not measured" if found.peak_gib is None else f"{found.peak_gib:.2f} GiB"
    return (
        f"{batch / found.in_memory:,.0f} | {batch / found.on_disk:,.0f} | {found.share:.1%} "
        f"| {rate:.3f} | {rate / best:.0%} | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=50, help="steps of each of three rounds")
    parser.add_argument("--width", type=int, default=64, help="ngf and ndf")
    parser.add_argument("--workers", type=int, default=workers())
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    options = parser.parse_args()
    precision = hardware.resolve_precision(options.precision)
    accelerator = launch.make_accelerator(precision)
    hardware.configure_kernels(accelerator.device, deterministic=False)
    device = accelerator.device
    best = ceiling(torch.bfloat16 if precision == "bf16" else torch.float32, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    variants = {"eager": TrainConfig(), "compiled": TrainConfig(compile=True)}
    if device.type == "cuda":
        variants["CUDA graphs"] = TrainConfig(compile=True, compile_mode="reduce-overhead")
    print(machine())
    print(
        f"{name}, {precision}, ngf = ndf = {options.width}; a matrix product: {best:.2f} TFLOP/s.\n"
    )
    titles = ["updates", "batch", "from memory, images/s", "from shards", "of that from memory"]
    titles += ["TFLOP/s", "of the product", "peak memory"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    with tempfile.TemporaryDirectory() as folder:
        source = fashion_mnist(12_800, Path(folder) / "raw")
        index = prepare(source, Path(folder) / "npy", 64, "npy")
        for batch in options.batches:
            for title, train in variants.items():
                config = Config(
                    model=ModelConfig(ngf=options.width, ndf=options.width),
                    data=DataConfig(
                        shards=index.location, batch_size=batch, workers=options.workers, prefetch=4
                    ),
                    train=replace(train, micro_batch=batch),
                )
                try:
                    shown = row(batch, measure(config, index, accelerator, options.steps), best)
                except torch.OutOfMemoryError:
                    shown = "does not fit | | | | | |"
                print(f"| {title} | {batch} | {shown}", flush=True)
                accelerator.free_memory()


if __name__ == "__main__":
    main()
