"""Measure training steps on one GPU against the floor that the card sets, and the published recipe.

    make bench-gpu                                     # five minutes; writes runs/bench-gpu/
    python benchmarks/gpu.py --out FOLDER --seconds 300
    python benchmarks/gpu.py --out FOLDER --quick      # small, to see on a CPU that it works

The floor of a step is a sum over its operators. Each takes at least the time of its floating-point
operations at the speed of a large matrix product, and at least the time of the bytes that it must
read and write at the speed of a copy. Both speeds are measured first. The second floor assumes that
BatchNorm and activation are one kernel. Tensors are bf16; the moving average is not in the floors.

Rates are medians of three rounds after 20 steps, in which graphs are captured. Images are random:
`synthetic`. Writes bench.json and bench.md, after each row anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from feed import ROUNDS, from_memory, measure
from loader import machine, workers
from pictures import prepare, synthetic
from step import ceiling, copy_speed, update, wait
from training import WIDTH, reference_steps

from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.data.shards import Index
from pipeline.runtime import hardware, launch
from pipeline.training.gan import GAN

NETWORKS = ((64, 4), (128, 5))  # ngf = ndf, kernel; the second is the paper's
BATCHES = (128, 1024)
STEPS = 25_600  # images of a round: 200 steps at batch 128, 25 at 1024
VARIANTS = {
    "ours, eager": TrainConfig(),
    "ours, CUDA graphs": TrainConfig(compile=True, compile_mode="reduce-overhead"),
    "ours, compiled": TrainConfig(compile=True),
}
BF16, FP32 = 2, 4  # bytes


# -- the floor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """Of one card: of a bf16 matrix product, and of a copy, bytes read and written."""

    tflops: float
    gb_s: float


def floor(model: ModelConfig, batch: int, speeds: Speeds, *, fused: bool) -> tuple[float, float]:
    """Return (seconds, TFLOP) that one step of D and G takes at least."""
    seconds = flops = 0.0
    for operations, moved in operators(model, batch, fused=fused):
        seconds += max(operations / speeds.tflops / 1e12, moved / speeds.gb_s / 1e9)
        flops += operations
    return seconds, flops / 1e12


def operators(model: ModelConfig, batch: int, *, fused: bool) -> Iterator[tuple[float, float]]:
    """Yield (floating-point operations, bytes) of each operator of a step.

    G runs forward and backward once, D forward three times: on real images, on generated ones, and
    for G. In the last backward pass D's weights get no gradients.
    """
    width, taps = model.ndf, model.kernel_size**2
    maps = [(model.channels, model.image_size)]
    while maps[-1][1] > 4:
        maps.append((width * 2 ** (len(maps) - 1), maps[-1][1] // 2))
    sizes = [batch * channels * side**2 for channels, side in maps]
    last = maps[-1][0] * 16  # numbers in the last map of an image
    weights_G = model.z_dim * last + sum(2 * channels for channels, _ in maps[1:])
    weights_D = last + sum(2 * channels for channels, _ in maps[2:])
    for k in range(len(maps) - 1):
        weights = maps[k][0] * maps[k + 1][0] * taps
        weights_G, weights_D = weights_G + weights, weights_D + weights
        one = 2 * sizes[k + 1] * maps[k][0] * taps, BF16 * (sizes[k] + sizes[k + 1] + weights)
        # G: forward, gradients of input and weights. D: three times forward, twice the gradient of
        # weights, and that of the input three times, of the images only for G.
        yield from repeat(one, 3 + 3 + 2 + (3 if k else 1))
    # Reads and writes of a map, forward and backward. Apart: BatchNorm reads for its statistics,
    # reads and writes; backward it reads two maps for its sums, then reads two and writes one. An
    # activation reads and writes; backward it reads two and writes one.
    for k, size in enumerate(sizes[1:]):
        normed, plain = (3 + 5, 1) if fused else (5 + 8, 5)
        yield 0, BF16 * size * normed  # G
        yield from repeat((0, BF16 * size * (normed if k else plain)), 3)  # D
    yield 0, BF16 * sizes[0] * (4 if fused else 8)  # tanh, and the image in fp32
    yield 0, sizes[0] * (3 if fused else 27)  # uint8 to [-1, 1]
    project = 2 * batch * model.z_dim * last
    yield from repeat((project, BF16 * (batch * (model.z_dim + last) + model.z_dim * last)), 2)
    yield from repeat((2 * batch * last, BF16 * batch * last), 8)  # D's last layer
    yield 0, (FP32 + BF16) * (2 * weights_D + weights_G)  # casts of the weights
    yield 0, 7 * FP32 * (weights_D + weights_G)  # Adam reads four numbers a weight, writes three


# -- one measurement -----------------------------------------------------------------------------


def config_of(width: int, kernel: int, batch: int, index: Index, train: TrainConfig) -> Config:
    data = DataConfig(shards=index.location, batch_size=batch, workers=workers(), prefetch=4)
    model = ModelConfig(ngf=width, ndf=width, kernel_size=kernel)
    return Config(model=model, data=data, train=replace(train, micro_batch=batch))


def measure_reference(batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Measure the published recipe on images that are on the device already."""
    done = reference_steps(repeat(torch.rand(batch, 3, 64, 64, device=device) * 2 - 1), None)
    spent = []
    for count in (20 if device.type == "cuda" else 1, *[steps] * ROUNDS):
        wait()
        began = perf_counter()
        for _ in range(count):
            next(done)
        wait()
        spent.append((perf_counter() - began) / count)
    return {"in_memory": median(spent[1:]), "spread": (min(spent[1:]), max(spent[1:]))}


def profiled(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """Count the kernels of a step, and the time in which one runs; with the ten longest."""
    torch.compiler.reset()
    gan, inputs = GAN(config, accelerator, 1), from_memory(config, accelerator.device)
    for _ in range(20):
        update(gan, *next(inputs))
    wait()
    with torch.profiler.profile() as profile:
        for _ in range(5):
            update(gan, *next(inputs))
        wait()
    kinds = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kinds.sort(key=lambda kind: -kind.self_device_time_total)
    longest = [(k.key[:90], k.count / 5, k.self_device_time_total / 5e3) for k in kinds[:10]]
    return {
        "kernels": sum(kind.count for kind in kinds) / 5,
        "busy_ms": sum(kind.self_device_time_total for kind in kinds) / 5e3,
        "longest": longest,
    }


# -- the table -----------------------------------------------------------------------------------


def measured_rows(
    options: argparse.Namespace, index: Index, accelerator: Accelerator, speeds: Speeds
) -> Iterator[dict[str, Any]]:
    """Yield a row for each loop, network and batch, until the time is over."""
    ends = perf_counter() + options.seconds
    on_cuda = accelerator.device.type == "cuda"
    for width, kernel in ((8, 4),) if options.quick else NETWORKS:
        for batch in (16,) if options.quick else BATCHES:
            steps = STEPS // batch if on_cuda else 1
            loops: dict[str, Callable[[], dict[str, Any]]] = {}
            if width == WIDTH:
                loops["reference loop"] = lambda batch=batch, steps=steps: measure_reference(
                    batch, steps, accelerator.device
                )
            for name, train in VARIANTS.items():
                if train.compile and not on_cuda:
                    continue
                config = config_of(width, kernel, batch, index, train)
                loops[name] = lambda config=config, steps=steps: asdict(
                    measure(config, index, accelerator, steps)
                )
            for name, work in loops.items():
                facts = {"loop": name, "width": width, "kernel": kernel, "batch": batch}
                yield facts | outcome(work, facts, speeds, ends)
                accelerator.free_memory()
                gc.collect()
            if on_cuda and perf_counter() < ends:
                config = config_of(width, kernel, batch, index, TrainConfig())
                yield {"profile": "ours, eager", "width": width, "batch": batch} | profiled(
                    config, accelerator
                )


def outcome(
    work: Callable[[], dict[str, Any]], facts: dict[str, Any], speeds: Speeds, ends: float
) -> dict[str, Any]:
    """Return what a measurement found, with rates and shares of the floors; or why nothing."""
    if perf_counter() > ends:
        return {"missing": "no time left"}
    try:
        found = work()
    except Exception as error:  # one loop that fails must not cost the others their figures
        return {"missing": f"{type(error).__name__}: {str(error)[:200]}"}
    model = ModelConfig(ngf=facts["width"], ndf=facts["width"], kernel_size=facts["kernel"])
    (plain, tflop), (fused, _) = (
        floor(model, facts["batch"], speeds, fused=fused) for fused in (False, True)
    )
    step = found["in_memory"]
    return found | {
        "images_s": facts["batch"] / step,
        "tflops": tflop / step,
        "of_floor": plain / step,
        "of_fused_floor": fused / step,
    }


def markdown(head: str, speeds: Speeds, rows: list[dict[str, Any]]) -> str:
    """Return the table, and what the rows say of the claims of benchmarks/README.md."""
    titles = ["loop", "ngf, kernel", "batch", "ms a step", "images/s", "from shards", "TFLOP/s"]
    titles += ["of the floor", "of the fused floor", "peak memory"]
    lines = [
        head,
        f"A matrix product: {speeds.tflops:.3g} TFLOP/s; a copy: {speeds.gb_s:,.0f} GB/s; "
        f"{workers()} workers.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    notes = []
    for row in rows:
        if "profile" in row:
            notes.append(
                f"{row['profile']}, ngf {row['width']}, batch {row['batch']}: "
                f"{row['kernels']:.0f} kernels a step, {row['busy_ms']:.2f} ms of work."
            )
            continue
        start = f"| {row['loop']} | {row['width']}, {row['kernel']} | {row['batch']} |"
        if "missing" in row:
            lines.append(f"{start} {row['missing']} | | | | | | |")
            continue
        low, high = (1000 * one for one in row["spread"])
        shards = f"{row['share']:.1%}" if "share" in row else ""
        memory = f"{row['peak_gib']:.2f} GiB" if row.get("peak_gib") else ""
        lines.append(
            f"{start} {1000 * row['in_memory']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row['images_s']:,.0f} | {shards} | {row['tflops']:.1f} | {row['of_floor']:.0%} "
            f"| {row['of_fused_floor']:.0%} | {memory} |"
        )
    rates = {(row["loop"], row["batch"]): row.get("images_s") for row in rows if "loop" in row}
    for batch in BATCHES:
        theirs = rates.get(("reference loop", batch))
        for name in VARIANTS if theirs else ():
            if ours := rates.get((name, batch)):
                notes.append(f"{name}, batch {batch}: {ours / theirs:.2f} times the reference.")
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of bench.json, bench.md")
    parser.add_argument("--seconds", type=float, default=300, help="no loop begins after them")
    parser.add_argument("--quick", action="store_true", help="a tiny network and batch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator = launch.make_accelerator(hardware.resolve_precision("auto"))
    device = accelerator.device
    hardware.configure_kernels(device, deterministic=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    speeds = Speeds(ceiling(dtype, device), copy_speed(device))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    head = f"{name}, {machine()}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = synthetic(256 if options.quick else 12_800, Path(folder) / "raw")
        index = prepare(source, Path(folder) / "npy", 64, "npy")
        for row in measured_rows(options, index, accelerator, speeds):
            rows.append(row)
            facts = {"machine": head, "speeds": asdict(speeds), "rows": rows}
            (options.out / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
            (options.out / "bench.md").write_text(markdown(head, speeds, rows))
            print(json.dumps(row), flush=True)
    print(markdown(head, speeds, rows))


if __name__ == "__main__":
    main()
