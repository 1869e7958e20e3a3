"""Open the index of a synthetic set of up to a billion images: seconds, peak memory, first rows.

    python benchmarks/index.py                    # 1e6, 3e7, 1e8 and 1e9 images; 2 GB of disk
    python benchmarks/index.py --before ''        # without the reader of an earlier version

A set has shards of 10,000 images and 1,000 classes, and no tars; beyond 1e8 images its table has
only the parts that are read. Each row is a process of its own, which opens the set as each rank of
a training does, compares the labels with the classes of a model, and takes the rows of a batch of
4,096 images from all over the set. The peak memory is that over what the process had when its
imports were done. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.data.index import ROW
from pipeline.data.index_fields import SUM
from pipeline.data.index_writer import PART, write_head
from pipeline.data.shards import INDEX_NAME, KIND, shard_name, table_of
from pipeline.runtime.documents import read_document, write_document

ROOT = Path(__file__).resolve().parents[1]
SHARD, CLASSES, BATCH, WHOLE = 10_000, 1000, 4096, 10**8
SAMPLE = 13_824
"""Bytes of a 64x64 image in a tar."""
OPEN = """
import json, sys, time
from time import process_time as cpu
import numpy as np
from pipeline.data.shards import read_index

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2**20

before, classes = memory("VmRSS"), int(sys.argv[2])
began, used = time.monotonic(), cpu()
index = read_index(sys.argv[1])
if hasattr(index, "label_counts"):
    assert index.label_counts.keys() == set(range(classes))
else:  # as earlier versions compared the labels with the model
    labels = index.table["label"]
    assert ((labels >= 0) & (labels < classes)).all()
    assert not set(range(classes)) - set(np.unique(labels).tolist())
index.fingerprint
opened, busy = time.monotonic(), cpu() - used
ids = np.random.default_rng(0).integers(0, index.num_samples, int(sys.argv[3]))
used = cpu()
first = index.table[ids]
read = time.monotonic()
rows = cpu() - used
again = index.table[ids]
end = time.monotonic()
peak = memory("VmHWM") - before
times = [opened - began, busy, read - opened, rows, end - read]
print(json.dumps([*times, peak, first.tobytes().hex()[:99]]))
"""


def write_set(folder: Path, images: int) -> None:
    """Write the index of a synthetic set, whose table repeats itself after 625 parts.

    Of a table of more than ``WHOLE`` rows only the parts that a batch reads are written.
    """
    period = math.lcm(SHARD, PART)
    rows, ids = np.zeros(period, ROW), np.arange(period)
    rows["offset"] = ids % SHARD * SAMPLE + 512
    rows["length"] = 64 * 64 * 3 + 128
    rows["label"] = ids % CLASSES
    content, part = rows.tobytes(), PART * ROW.itemsize
    digest, parts = hashlib.sha256(), -(-images // PART)
    with (folder / table_of(INDEX_NAME)).open("wb") as file:
        write_head(file, images)
        begin, size = file.tell(), images * ROW.itemsize
        if images > WHOLE:
            wanted = np.random.default_rng(0).integers(0, images, BATCH)
            for k in np.unique(wanted // PART).tolist():
                file.seek(begin + k * part)
                at = k * part % len(content)
                file.write(content[at : at + min(part, size - k * part)])
            file.truncate(begin + size)
        else:
            for start in range(0, size, len(content)):
                file.write(content[: size - start])
    if images <= WHOLE:
        with (folder / table_of(INDEX_NAME)).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    sums = [hashlib.sha256(content[k : k + part]) for k in range(0, len(content), part)]
    sums = (sums * -(-parts // len(sums)))[:parts]
    if rest := images % PART:
        at = (parts - 1) * part % len(content)
        sums[-1] = hashlib.sha256(content[at : at + rest * ROW.itemsize])
    shards = [
        {"url": shard_name(k), "nsamples": SHARD, "filesize": SHARD * SAMPLE, "sha256": f"{k:064x}"}
        for k in range(images // SHARD)
    ]
    document = {
        "__kind__": KIND,
        "wids_version": 1,
        "field": "npy",
        "shape": [64, 64, 3],
        "samples_sha256": digest.hexdigest(),
        "made_by": {},
        "shardlist": shards,
        "samples_parts": {"rows": PART, "sha256": "".join(s.hexdigest()[: 2 * SUM] for s in sums)},
        "label_counts": {str(k): images // CLASSES for k in range(CLASSES)},
    }
    write_document(folder / INDEX_NAME, document, indent=1)


def strip(folder: Path) -> None:
    """Make an index that earlier versions write."""
    document = read_document(folder / INDEX_NAME)
    document.pop("samples_parts")
    document.pop("label_counts")
    write_document(folder / INDEX_NAME, document, indent=1)


def opened(folder: Path, code: Path) -> list[float]:
    """Open the set in a process of its own, with the code of a checkout."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), str(CLASSES), str(BATCH)],
        cwd=code,
        env=os.environ | {"PYTHONPATH": str(code)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=float, nargs="+", default=[1e6, 3e7, 1e8, 1e9])
    parser.add_argument("--before", default="39ea23a", help="commit of the earlier reader")
    parser.add_argument("--before-up-to", type=float, default=1e8, help="images")
    parser.add_argument("--folder", type=Path, help="where to work (default: TMPDIR)")
    options = parser.parse_args()
    columns = ("open, s (CPU)", "rows of a first batch, s (CPU)", "again, s", "peak memory, GiB")
    print(f"| images | reader | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|", flush=True)
    for images in map(int, options.images):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder, code = Path(name) / "set", Path(name) / "before"
            folder.mkdir()
            write_set(folder, images)
            found = {"this version": opened(folder, ROOT)}
            strip(folder)
            if images <= options.before_up_to:
                found["this version, index of an earlier one"] = opened(folder, ROOT)
            if options.before and images <= options.before_up_to:
                code.mkdir()
                archive = ["git", "-C", str(ROOT), "archive", options.before, "pipeline"]
                tar = subprocess.run(archive, capture_output=True, check=True).stdout
                subprocess.run(["tar", "-x", "-C", str(code)], input=tar, check=True)
                found[options.before] = opened(folder, code)
            for reader, (start, busy, first, cost, again, peak, rows) in found.items():
                assert rows == found["this version"][6]
                print(
                    f"| {images:,} | {reader} | {start:.2f} ({busy:.2f}) | "
                    f"{first:.3f} ({cost:.3f}) | {again:.3f} | "
                    f"{peak:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
