"""Compare the speed of our loader, torchvision's ImageFolder and stock webdataset.

    python benchmarks/loader.py                        # Fashion-MNIST, four CPU minutes
    python benchmarks/loader.py --data FOLDER_OF_SHARDS --size 64

Every loader delivers the same images, shuffled, as float32 (128, 3, S, S) in [-1, 1] from the same
number of workers. The rounds of all loaders alternate, so that a busy machine slows all alike. The
baselines follow their own documentation. Prints Markdown for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import imagecodecs
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pipeline.config.schema import Config, DataConfig
from pipeline.data.cache import Cache
from pipeline.data.loader import Loader, make_order, normalise
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, read_index
from pipeline.data.source import Choice
from pipeline.data.sources import find

BATCH = 128
FORMATS = ("npy", "jpg", "png")
WARM_UP = 10  # batches; more than any loader has queued when its first one is taken
SECONDS = 2.0  # at most, per loader and round
STARTS = (0.0, 0.01, 0.5, 0.99)
RAW = "ours, uint8 for a GPU"
CPU = torch.device("cpu")


# -- the same images in every format -------------------------------------------------------------


def prepare(source: list[str], out: Path, size: int, kind: str, channels: int = 3) -> Index:
    command = [sys.executable, "-m", "pipeline.prepare", *source, "--out", str(out)]
    shape = ["--size", str(size), "--channels", str(channels)]
    subprocess.run(
        [*command, *shape, "--format", kind, "--shard-mib", "8"], check=True, capture_output=True
    )
    return read_index(str(out))


def fashion_mnist(images: int, folder: Path) -> list[str]:
    """Write the first images as IDX files; return the arguments of ``pipeline.prepare``."""
    source = find("fashion-mnist", Choice())
    read = source.opener()
    pixels = np.stack([np.asarray(read(row)) for row in range(min(images, len(source.names)))])
    labels = source.labels[:images].astype(np.uint8)
    folder.mkdir()
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(head + array.tobytes())
    return ["fashion-mnist", "--idx", str(folder)]


def payloads(index: Index) -> Iterator[tuple[int, bytes]]:
    """Yield (label, stored bytes) of every sample in the order of the index."""
    starts = np.cumsum([0, *index.sizes])
    for number, shard in enumerate(index.shards):
        content = (Path(index.location) / shard.url).read_bytes()
        for row in index.table[starts[number] : starts[number + 1]]:
            offset, length, label = (int(row[name]) for name in ("offset", "length", "label"))
            yield label, content[offset : offset + length]


def as_files(index: Index, root: Path) -> Path:
    """Write the stored bytes as a file per image in a folder per class, for ImageFolder."""
    for k, (label, payload) in enumerate(payloads(index)):
        folder = root / f"{max(label, 0):03d}"
        if k < 1000:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:06d}.{index.field}").write_bytes(payload)
    return root


def check_same_pixels(index: Index) -> None:
    """Check that our decoder gives the same pixels as Pillow, the baselines' decoder."""
    out = np.empty((32, *index.shape), np.uint8)
    Reader(index, Cache(index, "")).read(np.arange(32), out)
    for ours, (_, payload) in zip(out, payloads(index), strict=False):
        assert np.array_equal(ours, np.asarray(Image.open(io.BytesIO(payload))))


# -- the loaders ---------------------------------------------------------------------------------

TO_FLOAT = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def our_batches(
    index: Index, workers: int, start: int = 0, *, floats: bool = True
) -> Iterator[torch.Tensor]:
    """Yield batches of our loader: float32, or uint8 without ``floats``, as for a GPU."""
    config = Config(
        data=DataConfig(shards=index.location, batch_size=BATCH, workers=workers, prefetch=4)
    )
    loader = Loader(config, index, make_order(config, index))
    with closing(loader.batches(start)) as batches:
        for batch in batches:
            yield normalise(batch.images, CPU) if floats else batch.images


def image_folder(root: Path, workers: int, batch: int = BATCH) -> Iterable[Any]:
    return DataLoader(
        ImageFolder(str(root), TO_FLOAT),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
    )


def stock_webdataset(index: Index, workers: int, batch: int = BATCH) -> Iterable[Any]:
    urls = [str(Path(index.location) / shard.url) for shard in index.shards]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .decode("pil")
        .to_tuple(index.field, "cls")
        .map_tuple(TO_FLOAT, int)
        .batched(batch, partial=False)
    )
    return wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=workers)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(t.user + t.system for t in times))


def measure(batches: Iterator[Any]) -> tuple[float, float]:
    """Return (images per second, CPU us per image) after the warm-up."""
    for _ in range(WARM_UP):
        next(batches)
    # Looked up once: finding the children reads all of /proc.
    busy = [psutil.Process(), *psutil.Process().children(recursive=True)]
    images, spent, began, cpu = 0, 0.0, time.perf_counter(), cpu_seconds(busy)
    while spent < SECONDS and (batch := next(batches, None)) is not None:
        pixels = batch if isinstance(batch, torch.Tensor) else batch[0]
        assert len(pixels) == BATCH
        assert 3 in (pixels.shape[1], pixels.shape[-1])
        images += BATCH
        spent = time.perf_counter() - began
        if images % (8 * BATCH) == 0:  # not at the end, when the workers may be gone
            counted, used = images, cpu_seconds(busy) - cpu
    return images / spent, used / counted * 1e6


# -- the limit -----------------------------------------------------------------------------------


def decode_for(seconds: float, kind: str, stored: list[bytes], out: np.ndarray, sums: Any) -> None:
    """Only decode bytes in memory, one after the other."""
    flat = out.reshape(-1)
    decode: dict[str, Callable[[bytes], Any]] = {
        "npy": lambda b: np.copyto(flat, np.frombuffer(b, np.uint8, offset=len(b) - len(flat))),
        "jpg": lambda b: simplejpeg.decode_jpeg(b, "RGB", buffer=out),
        "png": imagecodecs.png_decode,
    }
    one, done, began, cpu = decode[kind], 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - began) < seconds:
        for payload in stored:
            one(payload)
        done += len(stored)
    sums.put((done / spent, (time.process_time() - cpu) / done * 1e6))


def decode_limit(index: Index, processes: int, seconds: float = 1.0) -> tuple[float, float]:
    """Return (images per second, CPU us per image) of ``processes`` bare decoding loops at once."""
    stored = [payload for _, (_, payload) in zip(range(500), payloads(index), strict=False)]
    context = multiprocessing.get_context("fork")
    sums = context.SimpleQueue()
    out = np.empty(index.shape, np.uint8)
    loops = [
        context.Process(target=decode_for, args=(seconds, index.field, stored, out, sums))
        for _ in range(processes)
    ]
    for loop in loops:
        loop.start()
    found = [sums.get() for _ in loops]
    for loop in loops:
        loop.join()
    return sum(rate for rate, _ in found), sum(cost for _, cost in found) / processes


# -- time to the first batch ---------------------------------------------------------------------


def first_batch(location: str, fraction: float, workers: int) -> float:
    """Measure the seconds from opening the index to the first batch, in this process."""
    began = time.perf_counter()
    index = read_index(location)
    batches = our_batches(index, workers, int(fraction * index.num_samples) // BATCH)
    next(batches)
    return time.perf_counter() - began


def first_batch_elsewhere(location: str, fraction: float, workers: int) -> float:
    command = [sys.executable, __file__, "--first-batch", location, str(fraction), str(workers)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# -- the table -----------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    kind: str
    make: Callable[[], Iterable[Any]]
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def add(self, measured: tuple[float, float]) -> None:
        self.rates.append(measured[0])
        self.costs.append(measured[1])


def machine() -> str:
    """Describe CPU, cores, versions and commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    packages = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", "imagecodecs")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores; "
        f"Python {sys.version.split()[0]}, {versions}; commit {commit}."
    )


def spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def compare(options: argparse.Namespace, folder: Path) -> str:
    workers = options.workers
    source = [options.data] if options.data else fashion_mnist(options.images, folder / "idx")
    sets = {kind: prepare(source, folder / kind, options.size, kind) for kind in FORMATS}
    files = {kind: as_files(sets[kind], folder / f"files_{kind}") for kind in ("jpg", "png")}
    for kind in files:
        check_same_pixels(sets[kind])

    contenders = [
        Contender("ours", kind, lambda kind=kind: our_batches(sets[kind], workers))
        for kind in FORMATS
    ]
    contenders += [
        Contender(RAW, kind, lambda kind=kind: our_batches(sets[kind], workers, floats=False))
        for kind in FORMATS
    ]
    contenders += [
        Contender("ImageFolder", kind, lambda kind=kind: image_folder(files[kind], workers))
        for kind in files
    ]
    contenders += [
        Contender("webdataset", kind, lambda kind=kind: stock_webdataset(sets[kind], workers))
        for kind in FORMATS
    ]
    limits = {kind: Contender(f"bare loops x {workers}", kind, list) for kind in FORMATS}
    starts: dict[float, list[float]] = {fraction: [] for fraction in STARTS}
    for number in range(options.rounds):
        for contender in contenders:
            batches = iter(contender.make())
            contender.add(measure(batches))
            del batches  # ends its workers before the next one starts
        for kind, limit in limits.items():
            limit.add(decode_limit(sets[kind], workers))
        for fraction in STARTS:
            starts[fraction].append(first_batch_elsewhere(sets["jpg"].location, fraction, workers))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)

    ours = {c.kind: c for c in contenders if c.name == "ours"}
    shown = [
        machine(),
        f"{sets['jpg'].num_samples} images of {options.size}x{options.size}x3, batch {BATCH}, "
        f"{workers} workers, {options.rounds} alternating rounds; median (lowest to highest).",
        "",
        "| loader | stored as | images/s | ours is faster by | CPU us per image, all processes "
        "| ours is cheaper by | decoding is |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in [*contenders, *limits.values()]:
        faster = cheaper = ""
        if c.name in ("ImageFolder", "webdataset"):
            mine = ours[c.kind]
            faster = spread([a / b for a, b in zip(mine.rates, c.rates, strict=True)], ".1f") + " x"
            cheaper = (
                spread([b / a for a, b in zip(mine.costs, c.costs, strict=True)], ".1f") + " x"
            )
        share = median(limits[c.kind].costs) / median(c.costs)
        shown.append(
            f"| {c.name} | {c.kind} | {spread(c.rates, ',.0f')} | {faster} "
            f"| {spread(c.costs, '.1f')} | {cheaper} | {share:.0%} |"
        )
    shown += ["", "| our first batch at | seconds, in a fresh process |", "|---|---|"]
    shown += [f"| {at:.0%} of an epoch | {spread(starts[at], '.3f')} |" for at in STARTS]
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=12_800, help="number of images of Fashion-MNIST"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", help="a folder of shards instead of Fashion-MNIST")
    parser.add_argument("--first-batch", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the cores are the workers'
    if options.first_batch:
        location, fraction, workers = options.first_batch
        print(json.dumps(first_batch(location, float(fraction), int(workers))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(compare(options, Path(folder)))


if __name__ == "__main__":
    main()
