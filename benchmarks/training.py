"""Compare the training speed of our command with loops that users start from.

    python benchmarks/training.py                    # on the CPU about six minutes
    python benchmarks/training.py --batch 64 --rounds 5
    python benchmarks/training.py --synthetic        # where Fashion-MNIST is not at hand

All train the same DCGAN (64x64x3, ngf = ndf = 64) on the same Fashion-MNIST images from disk with
the same batch size and number of workers. Each measurement is a separate process, rounds alternate,
and each ratio is of one round. Prints Markdown for benchmarks/README.md.

* ours: `pipeline/train.py --config configs/dcgan_64.yaml` with npy shards, the complete command
  with decoding, metrics, data order and guard.
* reference loop: the published recipe, with ImageFolder, ToTensor, Normalize; float32; BCELoss on
  a sigmoid; D's weight gradients computed in G's step too; three `.item()` a step; on a GPU
  `cudnn.benchmark` and its TF32 convolutions, as there.
* webdataset: the same loop behind `shuffle(1000).decode("pil")` and a WebLoader.
* Accelerate: the same loop and images as the reference, `prepare` and `backward`, no option set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from loader import machine, spread, workers
from peers import Place, image_folder, stock_webdataset
from pictures import as_files, fashion_mnist, prepare, synthetic
from torch import Tensor, nn

Z, WIDTH = 100, 64
ON_CUDA = torch.cuda.is_available()
WARM_UP = 20 if ON_CUDA else 3  # kernels are chosen, buffers allocated, graphs made, queues filled
REPO = Path(__file__).resolve().parents[1]


# -- the reference networks and loop -------------------------------------------------------------


def reference_networks() -> tuple[nn.Module, nn.Module]:
    """Build the usual nn.Sequential pair for 64 pixels; D ends in a sigmoid."""
    widths = [WIDTH * k for k in (8, 4, 2, 1)]
    up: list[nn.Module] = []
    for before, width in zip([Z, *widths], widths, strict=False):
        stride, padding = (1, 0) if before == Z else (2, 1)
        up += [
            nn.ConvTranspose2d(before, width, 4, stride, padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
    up += [nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1, bias=False), nn.Tanh()]
    down: list[nn.Module] = [nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for before in reversed(widths[1:]):
        down += [
            nn.Conv2d(before, 2 * before, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * before),
            nn.LeakyReLU(0.2, True),
        ]
    down += [nn.Conv2d(8 * WIDTH, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    G, D = nn.Sequential(*up), nn.Sequential(*down)
    for module in (*G.modules(), *D.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return G, D


def reference_steps(images: Iterable[Tensor], accelerator: Accelerator | None) -> Iterator[None]:
    """Train by the recipe and yield after each step; an Accelerator prepares and scales."""
    device = accelerator.device if accelerator else pick_device()
    torch.backends.cudnn.benchmark = True
    G, D = (network.to(device) for network in reference_networks())
    opt_G, opt_D = (
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in (G, D)
    )
    backward: Callable[[Tensor], Any] = lambda loss: loss.backward()  # noqa: E731
    if accelerator:
        G, D, opt_G, opt_D = accelerator.prepare(G, D, opt_G, opt_D)
        backward = accelerator.backward
    criterion, shown = nn.BCELoss(), 0.0
    for batch in images:
        real = batch.to(device)
        ones, zeros = torch.ones(len(real), device=device), torch.zeros(len(real), device=device)
        D.zero_grad()
        on_real = D(real).view(-1)
        backward(criterion(on_real, ones))
        shown += on_real.mean().item()
        fake = G(torch.randn(len(real), Z, 1, 1, device=device))
        on_fake = D(fake.detach()).view(-1)
        backward(criterion(on_fake, zeros))
        shown += on_fake.mean().item()
        opt_D.step()
        G.zero_grad()
        again = D(fake).view(-1)
        backward(criterion(again, ones))
        shown += again.mean().item()
        opt_G.step()
        yield


def pick_device() -> torch.device:
    return torch.device("cuda" if ON_CUDA else "cpu")


def endless(make: Callable[[], Iterable[Any]]) -> Iterator[Tensor]:
    while True:
        for batch in make():
            yield batch[0]


def measure_reference(name: str, folder: Path, batch: int, steps: int, workers: int) -> float:
    """Measure the images per second of a baseline, in this process."""
    place = Place(workers=workers, rows=batch)
    if name == "webdataset":
        shards = stock_webdataset.open_feed(folder / "jpg", "jpg", place)
        images = endless(lambda: shards.epoch(0))
    else:
        files = image_folder.open_feed(folder / "files", "png", place)
        images = endless(lambda: files.epoch(0))
    done = reference_steps(images, Accelerator() if name == "Accelerate" else None)
    for _ in range(WARM_UP):
        next(done)
    if ON_CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        next(done)
    if ON_CUDA:
        torch.cuda.synchronize()
    return steps * batch / (time.perf_counter() - began)


# -- ours ----------------------------------------------------------------------------------------


def measure_ours(folder: Path, batch: int, steps: int, workers: int, *overrides: str) -> float:
    """Measure the images per second of the training command in its last row but for the first.

    Rows are ``steps`` long: whatever is compiled and captured is so in the first.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        settings = [f"data.shards={folder / 'npy'}", f"data.batch_size={batch}", f"run.dir={run}"]
        settings += [f"data.workers={workers}", f"model.ngf={WIDTH}", f"model.ndf={WIDTH}"]
        settings += ["model.kernel_size=4", "tracking.wandb=disabled", "train.checkpoint_every=0"]
        settings += [f"train.log_every={steps}", f"train.total_steps={2 * steps}"]
        settings += ["train.sample_every=0", *overrides]
        command = [sys.executable, "pipeline/train.py", "--config", "configs/dcgan_64.yaml"]
        subprocess.run([*command, *settings], cwd=REPO, check=True, capture_output=True)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["perf/images_per_sec"])


OURS: dict[str, list[str]] = {
    "ours": [],
    "ours, fp32": ["train.precision=fp32"],
}
if ON_CUDA:
    OURS["ours, compiled"] = ["train.compile=true"]
    OURS["ours, CUDA graphs"] = ["train.compile=true", "train.compile_mode=reduce-overhead"]
BASELINES = {"reference loop": "png", "webdataset": "jpg", "Accelerate": "png"}


def compare(options: argparse.Namespace, folder: Path) -> str:
    source = (synthetic if options.synthetic else fashion_mnist)(options.images, folder / "raw")
    sets = {kind: prepare(source, folder / kind, 64, kind) for kind in ("npy", "jpg", "png")}
    as_files(sets["png"], folder / "files")
    sizes = (options.batch, options.steps, options.workers)
    rates: dict[str, list[float]] = {name: [] for name in (*OURS, *BASELINES)}
    for number in range(options.rounds):
        for name in rates:
            if name in OURS:
                rates[name].append(measure_ours(folder, *sizes, *OURS[name]))
                continue
            words = [sys.executable, __file__, "--baseline", name, str(folder)]
            words += ["--batch", str(options.batch), "--steps", str(options.steps)]
            words += ["--workers", str(options.workers)]
            # The recipe does not use the launcher's default of one thread.
            env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
            rates[name].append(float(done.stdout.splitlines()[-1]))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    shown = [
        machine(),
        f"Device {pick_device().type}. 64x64x3, ngf = ndf = {WIDTH}, batch {options.batch}, "
        f"{options.workers} workers, {options.steps} steps after the warm-up, {options.rounds} "
        "alternating rounds; median (lowest to highest).",
        "",
        "| loop | images/s | ours is faster by |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], values, strict=True)]
        faster = "" if name == "ours" else f"{spread(ratios, '.2f')} x"
        shown.append(f"| {name} | {spread(values, ',.1f')} | {faster} |")
    worst = min(median(rates["ours"]) / median(rates[name]) for name in BASELINES)
    shown += ["", f"Against the fastest baseline: {worst:.2f} times."]
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6_400, help="number of images")
    parser.add_argument("--synthetic", action="store_true", help="random images")
    parser.add_argument("--batch", type=int, default=128)
    steps = 200 if ON_CUDA else 8
    parser.add_argument(
        "--steps", type=int, default=steps, help="measured steps, after the warm-up"
    )
    parser.add_argument("--workers", type=int, default=workers())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.baseline:
        name, folder = options.baseline
        sizes = (options.batch, options.steps, options.workers)
        print(measure_reference(name, Path(folder), *sizes))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(compare(options, Path(folder)))


if __name__ == "__main__":
    main()
