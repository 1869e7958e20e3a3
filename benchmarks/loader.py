"""Compare the speed of our loader with those of other packages: images/s, CPU time, memory, resume.

    pip install -e '.[peers]'                          # in an environment of its own
    python benchmarks/loader.py                        # Fashion-MNIST, ten minutes
    python benchmarks/loader.py --data FOLDER_OF_SHARDS --size 64

Every loader delivers the same images, shuffled, as float32 (128, 3, S, S) in [-1, 1] from the same
number of workers. Each measurement is a fresh process; the rounds of all loaders alternate, so that
a busy machine slows all alike. `benchmarks/peers/` says how each is used. One that is not installed
is a row "not installed". Prints Markdown for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers
import psutil
import simplejpeg
import torch
from pictures import FORMATS, as_files, check_same_pixels, fashion_mnist, payloads, prepare

from pipeline.config.schema import Config, DataConfig
from pipeline.data.loader import Loader, make_order, normalise
from pipeline.data.pictures import decode_png
from pipeline.data.shards import Index, read_index

BATCH = 128
WARM_UP = 10  # batches; more than any loader has queued when its first one is taken
SECONDS = 2.0  # at most, per loader and round
STARTS = (0.01, 0.5, 0.99)
PER_SHARD = 640  # images of the peers' shards: 8 MiB of 64x64x3 npy
PEERS = [name for name in peers.MODULES if name not in ("ours", "webdataset, resampled")]
NOT_INSTALLED = 3
RAW = "ours, uint8 for a GPU"
CPU = torch.device("cpu")


# -- one measurement, in a process of its own ----------------------------------------------------


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


def cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(t.user + t.system for t in times))


def measure(batches: Iterator[Any]) -> tuple[float, float, float]:
    """Return images per second, CPU us per image and MiB of all processes, after the warm-up."""
    for _ in range(WARM_UP):
        next(batches)
    # Looked up once: finding the children reads all of /proc.
    busy = [psutil.Process(), *psutil.Process().children(recursive=True)]
    mib = sum(process.memory_full_info().pss for process in busy) / 2**20
    images, spent, began, cpu = 0, 0.0, time.perf_counter(), cpu_seconds(busy)
    while spent < SECONDS and (batch := next(batches, None)) is not None:
        pixels = batch if isinstance(batch, torch.Tensor) else batch[0]
        assert len(pixels) == BATCH
        assert 3 in (pixels.shape[1], pixels.shape[-1])
        images += BATCH
        spent = time.perf_counter() - began
        # Not at the end, when the workers may be gone.
        if images == BATCH or images % (8 * BATCH) == 0:
            counted, used = images, cpu_seconds(busy) - cpu
    return images / spent, used / counted * 1e6, mib


def measure_one(name: str, kind: str, folder: Path, workers: int, task: str, file: Path) -> Any:
    """Measure the rate, write the state at a batch, or time the first batch from that state on.

    Raises:
        ImportError: the package is not installed.
    """
    if name == RAW:
        return measure(our_batches(read_index(str(folder)), workers, floats=False))
    peer = peers.find(name)
    place = peers.Place(workers=workers, rows=BATCH)
    if task == "pack":
        peer.pack(sorted(file.rglob(f"*.{kind}")), folder, PER_SHARD)
        return peers.versions(peer)
    began = time.perf_counter()
    feed = peer.open_feed(folder, kind, place)
    if task == "first":
        if (state := pickle.loads(file.read_bytes())) is not None:
            feed.load([state])
        next(iter(feed.epoch(0)))
        return time.perf_counter() - began
    batches = iter(feed.epoch(0))
    if task == "rate":
        return measure(batches)
    for _ in range(int(task)):
        next(batches)
    file.write_bytes(pickle.dumps(feed.state()))
    return feed.state() is not None


def elsewhere(*words: Any) -> Any:
    """Call ``measure_one`` in a fresh process; None: not installed."""
    command = [sys.executable, __file__, "--one", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# -- the limit -----------------------------------------------------------------------------------


def decode_for(seconds: float, kind: str, stored: list[bytes], out: np.ndarray, sums: Any) -> None:
    """Only decode bytes in memory, one after the other."""
    flat = out.reshape(-1)
    decode: dict[str, Callable[[bytes], Any]] = {
        "npy": lambda b: np.copyto(flat, np.frombuffer(b, np.uint8, offset=len(b) - len(flat))),
        "jpg": lambda b: simplejpeg.decode_jpeg(b, "RGB", buffer=out),
        "png": decode_png,
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


# -- the table -----------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    kind: str
    folder: Path
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def add(self, rate: float, cost: float, mib: float = 0.0) -> None:
        self.rates.append(rate)
        self.costs.append(cost)
        self.sizes.append(mib)


def machine() -> str:
    """Describe CPU, cores, versions and commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    packages = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", "imagecodecs")
    versions = []
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores; "
        f"Python {sys.version.split()[0]}, {', '.join(versions)}; commit {commit}."
    )


def workers() -> int:
    """Return the number of data workers for this machine: its cores, two to eight."""
    return min(8, max(2, len(os.sched_getaffinity(0))))


def spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def pack_all(
    names: list[str], sets: dict[str, Index], folder: Path
) -> tuple[list[Contender], dict[str, str]]:
    """Pack the images for every peer that is installed; returns contenders and versions."""
    ours = [(name, kind) for name in ("ours", RAW) for kind in FORMATS]
    found = [Contender(name, kind, Path(sets[kind].location)) for name, kind in ours]
    files = {kind: as_files(sets[kind], folder / f"files_{kind}") for kind in FORMATS}
    shown: dict[str, str] = {}
    for name in names:
        for kind in FORMATS:
            place = folder / f"{name} {kind}"
            try:
                known = kind in peers.find(name).FORMATS
            except ImportError:
                known, shown[name] = False, "not installed"
            if known:
                shown[name] = elsewhere(name, kind, place, 1, "pack", files[kind])
                found.append(Contender(name, kind, place))
    return found, shown


def resume_times(contenders: list[Contender], options: argparse.Namespace, at: Path) -> list[str]:
    """Return rows: seconds to the first batch after a resume, by place in the epoch."""
    rows = []
    for c in (c for c in contenders if c.kind == "jpg" and c.name != RAW):
        cells = []
        for fraction in STARTS:
            batch = max(1, int(fraction * options.batches))
            words = (c.name, c.kind, c.folder, options.workers)
            if not elsewhere(*words, batch, at):
                cells = ["no state"] * len(STARTS)
                break
            spent = [elsewhere(*words, "first", at) for _ in range(options.rounds)]
            cells.append(spread(spent, ".3f"))
        rows.append(f"| {c.name} | {' | '.join(cells)} |")
    return rows


def compare(options: argparse.Namespace, folder: Path) -> str:
    workers = options.workers
    source = [options.data] if options.data else fashion_mnist(options.images, folder / "idx")
    sets = {kind: prepare(source, folder / kind, options.size, kind) for kind in FORMATS}
    for kind in ("jpg", "png"):
        check_same_pixels(sets[kind])
    options.batches = sets["jpg"].num_samples // BATCH
    contenders, shown_versions = pack_all(options.peers, sets, folder)
    limits = {kind: Contender(f"bare loops x {workers}", kind, folder) for kind in FORMATS}
    for number in range(options.rounds):
        for c in contenders:
            c.add(*elsewhere(c.name, c.kind, c.folder, workers, "rate", folder))
        for kind, limit in limits.items():
            limit.add(*decode_limit(sets[kind], workers))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)

    ours = {c.kind: c for c in contenders if c.name == "ours"}
    shown = [
        machine(),
        f"{sets['jpg'].num_samples} images of {options.size}x{options.size}x3, batch {BATCH}, "
        f"{workers} workers, {options.rounds} alternating rounds; median (lowest to highest).",
        *(f"{name}: {text}." for name, text in shown_versions.items()),
        "",
        "| loader | stored as | images/s | ours is faster by | CPU us per image, all processes "
        "| ours is cheaper by | decoding is | MiB, all processes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in [*contenders, *limits.values()]:
        faster = cheaper = ""
        if c.name in PEERS:
            mine = ours[c.kind]
            faster = spread([a / b for a, b in zip(mine.rates, c.rates, strict=True)], ".1f") + " x"
            cheaper = (
                spread([b / a for a, b in zip(mine.costs, c.costs, strict=True)], ".1f") + " x"
            )
        share = median(limits[c.kind].costs) / median(c.costs)
        shown.append(
            f"| {c.name} | {c.kind} | {spread(c.rates, ',.0f')} | {faster} "
            f"| {spread(c.costs, '.1f')} | {cheaper} | {share:.0%} | {median(c.sizes):,.0f} |"
        )
    absent = [name for name, text in shown_versions.items() if text == "not installed"]
    shown += [f"| {name} | | not installed | | | | | |" for name in absent]
    places = " | ".join(f"{at:.0%}" for at in STARTS)
    shown += ["", f"| seconds to the first batch, resumed at | {places} |", "|---|---|---|---|"]
    shown += resume_times(contenders, options, folder / "state")
    shown += [f"| {name} | not installed | | |" for name in absent]
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
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="default: all")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the cores are the workers'
    if options.one:
        name, kind, folder, workers, task, file = options.one
        try:
            found = measure_one(name, kind, Path(folder), int(workers), task, Path(file))
        except ImportError:
            raise SystemExit(NOT_INSTALLED) from None
        print(json.dumps(found), flush=True)
        for worker in psutil.Process().children(recursive=True):
            worker.kill()
        os._exit(0)  # some loaders' threads and workers outlive their loader
    with tempfile.TemporaryDirectory() as scratch:
        print(compare(options, Path(scratch)))


if __name__ == "__main__":
    main()
