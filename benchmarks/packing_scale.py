"""Pack a billion images as a Slurm array: run what fits here, compute the rest from it.

    python benchmarks/packing_scale.py                  # 5 minutes of one core, 1 GB of disk

Run: the CPU time that ``prepare`` takes per image (JPEG of 256x256 in a zip, to 64x64), with one
worker; the merge of the records of 100,000 packed shards
into an index, with records of 100 images each and tars without content; the same of 500 records of
10,000 images. Computed from these: the array. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import merging
from pipeline.data.packing import Job, begin, hold, tar_bytes
from pipeline.data.shards import shard_name
from pipeline.data.source import Source
from pipeline.data.squares import Square
from pipeline.runtime.documents import DIGEST

ROOT = Path(__file__).resolve().parents[1]
IMAGES, SHARD, TASKS, CORES = 10**9, 10_000, 100, 32


def cpu_of(*words: object) -> float:
    """Return the CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pipeline.prepare", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cost_of_packing(folder: Path, few: int, many: int) -> tuple[float, float]:
    """Return CPU seconds per image, and the bytes of a stored image."""
    rng, stored = np.random.default_rng(0), []
    for _ in range(100):
        out = io.BytesIO()
        low = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
        low.resize((256, 256), Image.Resampling.BICUBIC).save(out, "JPEG")
        stored.append(out.getvalue())
    seconds = []
    for count in (few, many):
        with zipfile.ZipFile(folder / f"{count}.zip", "w") as archive:
            for k in range(count):
                archive.writestr(f"{k:08d}.jpg", stored[k % 100])
        out_of = folder / f"out-{count}"
        seconds.append(cpu_of(folder / f"{count}.zip", "--out", out_of, "--workers", 1))
    return (seconds[1] - seconds[0]) / (many - few), float(np.mean([len(one) for one in stored]))


def write_records(job: Job, rows: int) -> None:
    """Write the records of packed shards of ``rows`` images each, and tars without content."""
    sample = tar_bytes(64, 3, "npy")
    table = [[k * sample + 512, 64 * 64 * 3 + 128, k % 1000] for k in range(rows)]
    document = {
        "part": "NAME.json",
        "settings": job.work._settings_digest,
        "files": {"NAME": [rows * sample, "0" * 64]},
        "table": table,
        "field": "jpg",
        "skipped": [],
        "done": {},
        "source_files": {},
    }
    in_order, text = json.dumps(document, sort_keys=True), json.dumps(document)
    for number in range(job.num_shards):
        name = shard_name(number)
        digest = hashlib.sha256(in_order.replace("NAME", name).encode()).hexdigest()
        sealed = f'{text.replace("NAME", name)[:-1]}, "{DIGEST}": "{digest}"}}'
        (job.work.path / f"{name}.json").write_text(sealed)
        with (job.out / name).open("wb") as tar:
            tar.truncate(rows * sample)


def cost_of_merging(folder: Path, shards: int, rows: int) -> tuple[float, float, float]:
    """Merge in a process of its own; returns (seconds, CPU seconds, peak memory in GiB)."""
    child = os.fork()
    if child == 0:
        source = Source("zip", "synthetic", range(shards * rows), np.empty(0), "0" * 64, open)
        square = Square(64, 3, (255, 255, 255), "crop", 0, 0)
        job = Job(source, folder, square, "jpg", "white", 0, shards)
        with hold(job):
            begin(job)
            write_records(job, rows)
            merging.write_preview = lambda *_: None  # there are no images
            before, began = time.process_time(), time.monotonic()
            merging.merge(job, strict=False)
            seconds, cpu = time.monotonic() - began, time.process_time() - before
            status = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
            (folder / "cost").write_text(json.dumps([seconds, cpu, peak / 2**20]))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the merge failed")
    found: tuple[float, float, float] = tuple(json.loads((folder / "cost").read_text()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=[1000, 6000], help="to pack")
    parser.add_argument("--merges", type=str, nargs="+", default=["100000x100", "500x10000"])
    parser.add_argument("--folder", type=Path, help="where to work (default: TMPDIR)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        cost, stored = cost_of_packing(Path(name), *options.images)
    print(
        f"run: {cost * 1e3:.2f} ms of CPU per image of {stored:,.0f} bytes, {1 / cost:,.0f} "
        "images a second and core\n"
    )
    print("| merge (run) | images | seconds | CPU seconds | peak memory, GiB |")
    print("|---|---|---|---|---|", flush=True)
    per_row = 0.0
    for text in options.merges:
        shards, rows = map(int, text.split("x"))
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            seconds, cpu, peak = cost_of_merging(Path(name), shards, rows)
        per_row = cpu / shards / rows
        print(
            f"| {shards:,} shards of {rows:,} | {shards * rows:,} | {seconds:.0f} | {cpu:.0f} | "
            f"{peak:.2f} |",
            flush=True,
        )
    shards = IMAGES // SHARD
    hours = IMAGES * cost / TASKS / CORES / 3600
    size = tar_bytes(64, 3, "npy") * IMAGES
    print(f"""
| a billion images, {TASKS} tasks of {CORES} cores (computed) | |
|---|---|
| hours of the array | {hours:.1f} |
| hours of a core | {IMAGES * cost / 3600:,.0f} |
| bytes read | {stored * IMAGES / 1e12:.1f} TB |
| bytes written | {size / 1e12:.1f} TB in {shards:,} shards, and read once more by their task |
| GETs, tars of 10,000 images behind URLs | {shards:,} |
| the merge of all records | {per_row * IMAGES / 60:.0f} minutes of a core |
| a lost task, at its end | {hours:.1f} hours of its own; of the others nothing |
| a killed task | the shards in progress: at most {CORES} x {SHARD * cost:.0f} s of a core |""")


if __name__ == "__main__":
    main()
