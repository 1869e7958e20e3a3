"""Pack a million small images, undisturbed and with kills; time, memory, and the same bytes.

    python benchmarks/packing.py                       # a million 32x32 JPEG in one zip archive

The kills are SIGKILLs of the whole command at random moments; the same command goes on. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def write_source(path: Path, count: int) -> None:
    """Write a zip archive of JPEG files in ten folders; of 1,000 different pictures."""
    rng, stored = np.random.default_rng(0), []
    for _ in range(1000):
        low = rng.integers(0, 256, (8, 8, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(low).resize((32, 32), Image.Resampling.BICUBIC).save(out, "JPEG")
        stored.append(out.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(count):
            archive.writestr(f"{k % 10}/{k:08d}.jpg", stored[k % 1000])


def pack(source: Path, out: Path, kill_after: float | None = None) -> tuple[bool, float, float]:
    """Run ``prepare``; returns (whether it ended, seconds, peak memory of all processes in GiB)."""
    words = [sys.executable, "-m", "pipeline.prepare", source, "--out", out, "--size", "32"]
    began = time.monotonic()
    process = subprocess.Popen(
        [*words, "--workers", str(os.cpu_count())],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if kill_after is not None:
        threading.Timer(kill_after, lambda: os.killpg(process.pid, signal.SIGKILL)).start()
    peak = 0.0
    while process.poll() is None:
        total = 0
        for one in [process.pid, *children(process.pid)]:
            try:
                total += psutil.Process(one).memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total / 2**30)
        time.sleep(1)
    return process.returncode == 0, time.monotonic() - began, peak


def children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def digest(folder: Path) -> str:
    """Hash every file of a set."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".tar", ".npy"):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: TMPDIR)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = folder / "images.zip"
        write_source(source, options.images)
        _, seconds, peak = pack(source, folder / "whole")
        moments, spent, rest = random.Random(0), 0.0, 0.0
        for _ in range(options.kills):
            ended, part, rest_peak = pack(
                source, folder / "killed", moments.uniform(0.1, 0.4) * seconds
            )
            spent, rest = spent + part, max(rest, rest_peak)
            if ended:
                break
        _, last, rest_peak = pack(source, folder / "killed")
        same = digest(folder / "whole") == digest(folder / "killed")
        size = sum(path.stat().st_size for path in (folder / "whole").iterdir()) / 2**30
        print(f"{options.images:,} images of 32x32, JPEG in a zip; {os.cpu_count()} workers.\n")
        print("| run | seconds | images/s | peak memory of all processes, GiB |")
        print("|---|---|---|---|")
        print(f"| undisturbed | {seconds:.0f} | {options.images / seconds:,.0f} | {peak:.2f} |")
        print(
            f"| killed {options.kills} times, then to the end | {spent + last:.0f} | "
            f"{options.images / (spent + last):,.0f} | {max(rest, rest_peak):.2f} |"
        )
        print(
            f"\n{size:.1f} GiB of shards; the bytes of both runs are "
            f"{'equal' if same else 'NOT equal'}."
        )


if __name__ == "__main__":
    main()
