"""Profile a training step and compare it with the ceiling of the processor.

    python benchmarks/step.py                  # one CPU minute: ngf = ndf = 64, 64x64x3, batch 128
    python benchmarks/step.py --width 128 --kernel 5 --precision fp32
    python benchmarks/step.py --penalties      # R1 + R2 in each way, on the networks of demo.yaml

It counts the floating-point operations of a step and times it. It also times a large matrix product
as the ceiling, and the step's operators and convolutions one by one. --penalties times steps
with R1 and R2 instead, computed in each way, in turn in one process: the ratios are of steps that
follow each other, so that other work on the machine hits all alike. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from loader import machine, spread
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.loading import load
from pipeline.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.models.layers import weight_gradient
from pipeline.runtime.hardware import native_bf16
from pipeline.runtime.launch import MIXED_PRECISION
from pipeline.training.gan import GAN

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
KINDS = (  # first match wins
    ("convolutions, backward", ("convolution_backward",)),
    ("convolutions, forward", ("conv",)),
    ("weights' gradients as products", ("aten::mm",)),
    ("BatchNorm", ("batch_norm",)),
    ("ReLU, LeakyReLU, tanh", ("relu", "threshold", "tanh", "clamp")),
    ("Adam", ("adam",)),
    ("moving average", ("lerp",)),
    ("casts and copies", ("copy_", "_to_copy", "fill_", "zero_", "empty", "contiguous", "clone")),
)


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Return the median time of a call, after one call to warm up."""
    work()
    spent = []
    for _ in range(repeat):
        wait()
        began = time.perf_counter()
        work()
        wait()
        spent.append(time.perf_counter() - began)
    return median(spent)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def update(gan: GAN, x: Tensor, z: Tensor) -> None:
    """Run both updates and the average on one batch."""
    gan.update_D([x], [z], 1)
    gan.update_G([z], 1, real=[x])
    gan.update_average(1)


class _NoModules(nullcontext[None]):
    """Take the place of the counter's module tracker, whose hooks break ``autograd.grad``."""

    parents = frozenset({"Global"})


def operations(work: Callable[[], object]) -> float:
    """Count the TFLOP of a call."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter:
        work()
    return float(counter.get_total_flops()) / 1e12


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the TFLOP/s of a square matrix product: the ceiling of a convolution."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b) / 1e12


def copy_speed(device: torch.device) -> float:
    """Measure the GB/s read and written by a copy larger than the caches."""
    a = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / seconds(lambda: b.copy_(a)) / 1e9


def by_kind(step: Callable[[], None], repeat: int) -> dict[str, float]:
    """Return the share of the step's time by kind of operator, from torch's profiler."""
    on_cuda = torch.cuda.is_available()
    with torch.profiler.profile() as profile:
        for _ in range(repeat):
            step()
        wait()
    spent: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        cost = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kind = next((k for k, words in KINDS if any(w in event.key for w in words)), "the rest")
        spent[kind] += cost
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def layers(config: Config, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Measure the TFLOP/s of D's strided convolutions: forward, input gradient, weights' gradient.

    The last also as the matrix product that pipeline/models/layers.py uses for wide layers.
    """
    model, rows = config.model, []
    sizes = [(model.channels, model.ndf, model.image_size)]
    while sizes[-1][2] > 8:
        _, width, size = sizes[-1]
        sizes.append((width, 2 * width, size // 2))
    for before, width, size in sizes:
        nhwc = torch.channels_last
        x, w = (
            torch.randn(shape, device=device).to(dtype).to(memory_format=nhwc).requires_grad_()
            for shape in (
                (config.data.batch_size, before, size, size),
                (width, before, model.kernel_size, model.kernel_size),
            )
        )

        def forward(x: Tensor = x, w: Tensor = w) -> Tensor:
            return conv2d(x, w, stride=2, padding=(model.kernel_size - 1) // 2)

        y = forward()
        g = torch.randn_like(y)
        flops = 2 * y.numel() * before * model.kernel_size**2 / 1e12
        parts = [seconds(forward)] + [
            seconds(lambda wrt=wrt, y=y, g=g: torch.autograd.grad(y, wrt, g, retain_graph=True))
            for wrt in (x, w)
        ]
        with torch.no_grad():
            parts.append(seconds(lambda x=x, g=g: weight_gradient(x, g, model.kernel_size)))
        speeds = " | ".join(f"{flops / part:.3f} ({1000 * part:.1f} ms)" for part in parts)
        rows.append(f"| {before} -> {width} at {size}x{size} | {speeds} |")
    return rows


def report(options: argparse.Namespace) -> str:
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if native_bf16() else "fp32"
    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[precision])
    device = accelerator.device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = Config(
        model=ModelConfig(ngf=options.width, ndf=options.width, kernel_size=options.kernel),
        data=DataConfig(batch_size=options.batch),
        train=TrainConfig(micro_batch=options.batch),
    )
    gan = GAN(config, accelerator, 1)
    x = torch.rand(options.batch, 3, 64, 64, device=device) * 2 - 1
    x = x.to(memory_format=torch.channels_last)
    z = torch.rand(options.batch, config.model.z_dim, device=device) * 2 - 1

    def step() -> None:
        update(gan, x, z)

    step()
    flops = operations(step)
    spent, best = seconds(step, options.repeat), ceiling(dtype, device)
    shown = [
        machine(),
        f"{device.type}, {torch.get_num_threads()} threads, {precision}; 64x64x3, ngf = ndf = "
        f"{options.width}, kernel {options.kernel}, batch {options.batch}; data in memory.",
        "",
        "| | |",
        "|---|---|",
        f"| step | {1000 * spent:.0f} ms, {options.batch / spent:,.0f} images/s |",
        f"| operations in a step | {flops:.3f} TFLOP |",
        f"| achieved | {flops / spent:.3f} TFLOP/s |",
        f"| a {precision} matrix product | {best:.3f} TFLOP/s |",
        f"| share of it | {flops / spent / best:.0%} |",
        f"| copy | {copy_speed(device):.0f} GB/s |",
        "",
        "| operators | share of the step |",
        "|---|---|",
    ]
    shares = sorted(by_kind(step, 2).items(), key=lambda pair: -pair[1])
    shown += [f"| {kind} | {share:.1%} |" for kind, share in shares]
    shown += ["", "| D's convolution | forward | input's gradient | weights' | as a product |"]
    shown += ["|---|---|---|---|---|", *layers(config, dtype, device), "", "TFLOP/s, each alone."]
    return "\n".join(shown)


R3GAN = ["model.loss=relativistic", "model.d_norm=none"]
BOTH = [*R3GAN, "stability.r1_gamma=0.05", "stability.r2_gamma=0.05"]
PENALISED = {
    "plain: demo.yaml": [],
    "relativistic, D without norm, no penalty": R3GAN,
    "exact (autograd)": [*BOTH, "stability.penalty=exact"],
    "tangent": [*BOTH, "stability.penalty=tangent"],
    "along": [*BOTH, "stability.penalty=along"],
    "random": [*BOTH, "stability.penalty=random"],
    "exact, half of the batch": [*BOTH, "stability.penalty_share=0.5"],
    "random, half of the batch": [
        *(*BOTH, "stability.penalty=random", "stability.penalty_share=0.5")
    ],
}


def penalties(options: argparse.Namespace) -> str:
    """Return a table of the times of a step with R1 and R2, relative to the plain step."""
    precision = "bf16" if options.precision == "bf16" else "fp32"
    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[precision])
    device, steps = accelerator.device, dict[str, GAN]()
    for name, words in PENALISED.items():
        config = load(DEMO, [*words, "train.log_every=1000000", f"data.batch_size={options.batch}"])
        steps[name] = GAN(config, accelerator, 1)
    model = config.model
    shape = options.batch, model.channels, model.image_size, model.image_size
    x = (torch.rand(shape, device=device) * 2 - 1).to(memory_format=torch.channels_last)
    z = torch.rand(options.batch, model.z_dim, device=device) * 2 - 1
    counted = {name: operations(partial(update, gan, x, z)) for name, gan in steps.items()}
    spent: dict[str, list[float]] = defaultdict(list)
    for turn in range(-2, options.repeat):  # two rounds to warm up
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            began = time.perf_counter()
            update(steps[name], x, z)
            wait()
            if turn >= 0:
                spent[name].append(time.perf_counter() - began)
    plain = spent[next(iter(steps))]
    shown = [
        machine(),
        f"{device.type}, {torch.get_num_threads()} threads, {precision}; networks of demo.yaml, "
        f"batch {options.batch}, {options.repeat} rounds in turn; median (lowest to highest).",
        "",
        "| R1 + R2 | step, ms | images/s | times the plain step | its operations |",
        "|---|---|---|---|---|",
    ]
    for name, times in spent.items():
        ratio = spread([one / base for one, base in zip(times, plain, strict=True)], ".2f")
        best = median(times)
        share = counted[name] / counted[next(iter(steps))]
        shown.append(
            f"| {name} | {1000 * best:.0f} | {options.batch / best:,.0f} | {ratio} | {share:.2f} |"
        )
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64, help="ngf and ndf")
    parser.add_argument("--kernel", type=int, default=4, choices=(4, 5))
    parser.add_argument("--batch", type=int, help="128; with --penalties 64")
    parser.add_argument("--penalties", action="store_true", help="time R1 and R2 instead")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--repeat", type=int, help="times or rounds: 5; with --penalties 40")
    options = parser.parse_args()
    options.batch = options.batch or (64 if options.penalties else 128)
    options.repeat = options.repeat or (40 if options.penalties else 5)
    print(penalties(options) if options.penalties else report(options))


if __name__ == "__main__":
    main()
