"""Measure what train.exact_sum costs: steps with and without it, in turn, in one process.

    python benchmarks/exact_sum.py [--steps 8]

One rank with one thread, as the option wants it on CPUs; random images. Each row is a network of
configs/ and a micro-batch; the batch is four micro-batches. The times are of the processor, and the
ratio is the median over pairs of steps, so that other work on the machine hits both alike. Prints
Markdown for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.models.noise import append_classes, draw_z, rng
from pipeline.runtime import launch
from pipeline.training.gan import GAN

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ROWS = (("demo", 4), ("demo", 16), ("demo", 64), ("dcgan_32", 4))
ACCUMULATION = 4


def make(config: Config, *, exact: bool) -> GAN:
    train = replace(config.train, exact_sum=exact, precision="fp32")
    return GAN(replace(config, train=train), launch.make_accelerator("fp32"), ACCUMULATION)


def step_of(gan: GAN, micro_batch: int, step: int) -> float:
    """Return the seconds of processor time of one step of D and G."""
    model = gan.config.model
    size, count = model.image_size, micro_batch * ACCUMULATION
    x = torch.rand(count, model.channels, size, size, generator=rng(0, "x", step)) * 2 - 1
    x = x.to(memory_format=torch.channels_last)
    labels = torch.zeros(count, dtype=torch.int64)
    z = append_classes(model, draw_z(model, count, rng(0, "z", step)), labels)
    began = time.process_time()
    gan.update_D(x.split(micro_batch), z.split(micro_batch), step)
    gan.update_G(z.split(micro_batch), step)
    gan.update_average(step)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="pairs of steps per row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | weights | micro-batch | step | with exact_sum | ratio |")
    print("|---|---|---|---|---|---|")
    for name, micro_batch in ROWS:
        config = load(CONFIGS / f"{name}.yaml")
        config = replace(config, train=replace(config.train, micro_batch=micro_batch, log_every=99))
        plain, exact = make(config, exact=False), make(config, exact=True)
        weights = sum(p.numel() for net in (plain.G, plain.D) for p in net.parameters())
        times = []
        for step in range(1, options.steps + 3):
            order = (plain, exact) if step % 2 else (exact, plain)
            taken = {gan: step_of(gan, micro_batch, step) for gan in order}
            times.append((taken[plain], taken[exact]))
        times = times[2:]  # the first ones choose kernels and allocate
        a, b = (median(one) for one in zip(*times, strict=True))
        ratio = median(y / x for x, y in times)
        print(
            f"| {name} | {weights / 1e6:.1f} M | {micro_batch} | {a * 1e3:.0f} ms "
            f"| {b * 1e3:.0f} ms | {ratio:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
