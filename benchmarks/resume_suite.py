"""Kill, resume and damage the data loaders of several packages, and count samples.

    python benchmarks/resume_suite.py > table.md     # ours and the peers that are installed
    python benchmarks/resume_suite.py ours litdata   # some

`benchmarks/peers/` says how to install the peers and how each is used. Two ranks with two workers
each load 2048 JPEG images for two epochs, in batches of 32; every image has a number. Every fourth
step each rank stores the state of its loader. A kill is SIGKILL to all processes at a random step.
The run that resumes starts from the last complete states, as training does from a checkpoint.
What the steps between the states and the kill have loaded is not counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers import MODULES, Peer, find, pixels, versions
from peers.trial import BATCH, EPOCHS, Launch, in_child, run
from PIL import Image

IMAGES, SIZE, PER_SHARD = 2048, 32, 128
VICTIM = 1000  # the damaged image: of shard 7 of 16
STEPS = EPOCHS * IMAGES // BATCH
ROWS = {
    "undisturbed": "two epochs, undisturbed",
    "kill": "killed, resumed",
    "twice": "killed, resumed, killed, resumed",
    "ranks": "resumed on one rank instead of two",
    "workers": "resumed with four workers a rank instead of two",
    "flipped": "a flipped byte in a shard",
    "cut": "a truncated shard",
}


# -- what is counted -----------------------------------------------------------------------------


def read_steps(launch: Launch, last: int = 10**9) -> dict[int, list[int]]:
    """Return the ids of each step, of all ranks in turn."""
    found: dict[int, list[int]] = {}
    for file in sorted(launch.logs.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["step"] <= last:
                found.setdefault(row["step"], []).extend(row["ids"])
    return found


def wrong(launch: Launch) -> set[int]:
    lines = [line for file in launch.logs.glob("*.jsonl") for line in file.read_text().splitlines()]
    return {number for line in lines for number in json.loads(line)["wrong"]}


def count(steps: dict[int, list[int]], reference: dict[int, list[int]]) -> str:
    """Compare with "each id twice", and with the order of the undisturbed run."""
    seen = Counter(number for ids in steps.values() for number in ids)
    lost = sum(max(0, EPOCHS - seen[number]) for number in range(IMAGES))
    again = sum(max(0, times - EPOCHS) for times in seen.values())
    if steps == reference:
        return "exact" if not lost + again else f"{lost:,} lost, {again:,} repeated"
    if {k: sorted(v) for k, v in steps.items()} == {k: sorted(v) for k, v in reference.items()}:
        order = "same batches, other places in them"
    else:
        order = "other order"
    return f"{lost:,} lost, {again:,} repeated, {order}"


# -- the rows ------------------------------------------------------------------------------------


def examine(peer: Peer, work: Path) -> dict[str, str]:
    """Run every row; returns the cells."""
    files, folder = sorted((work.parent / "files").iterdir()), work / "set"
    shutil.copy(work.parent / "expected.npy", work / "expected.npy")
    in_child(lambda: peer.pack(files, folder, PER_SHARD))  # it may leave threads behind
    rng, cells = random.Random(0), {}

    def launch(name: str, **options: Any) -> Launch:
        return Launch(folder, work / f"{name}-saved", work / f"{name}-logs", **options)

    whole = launch("undisturbed")
    fault = run(peer, whole)
    if fault:
        return {"undisturbed": fault_of(whole, fault)}
    reference = read_steps(whole)
    cells["undisturbed"] = count(reference, reference)

    first = launch("first")
    run(peer, first, rng.randrange(10, STEPS // 2))
    step = json.loads((first.saved / "last").read_text())[0]
    before = read_steps(first, step)

    def resumed(name: str, kill_at: int = 0, **options: Any) -> tuple[Launch, str]:
        again = launch(name, **options)
        shutil.copytree(first.saved, again.saved)
        return again, run(peer, again, kill_at)

    for name, options in (("kill", {}), ("ranks", {"ranks": 1}), ("workers", {"workers": 4})):
        if name == "ranks" and peer.PACKAGES[0] == "megatron-energon":
            options = {"ranks": 1, "workers": 4}  # its documented condition: ranks x workers stay
        again, fault = resumed(name, **options)
        steps = before | read_steps(again) if not fault else {}
        cells[name] = fault_of(again, fault) or count(steps, reference)

    again, _ = resumed("twice", kill_at=rng.randrange(STEPS // 2, STEPS - 10) - step)
    second = json.loads((again.saved / "last").read_text())[0]
    middle = read_steps(again, second)
    fault = run(peer, again)
    cells["twice"] = fault_of(again, fault) or count(before | middle | read_steps(again), reference)

    stored = files[VICTIM].read_bytes()
    for name in ("flipped", "cut"):
        shard, offset = find_bytes(folder, stored)
        intact = shard.read_bytes()
        at = offset + len(stored) // 2
        damaged = intact[:at]
        if name == "flipped":
            at = offset + flip(stored)
            damaged = intact[:at] + bytes([intact[at] ^ 0xFF]) + intact[at + 1 :]
        shard.write_bytes(damaged)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        spoiled = launch(name)
        cells[name], said = judge(spoiled, run(peer, spoiled))
        if said:
            cells[f"{name}, message"] = said
        shard.write_bytes(intact)
    return cells


def find_bytes(folder: Path, stored: bytes) -> tuple[Path, int]:
    """Return file and offset of an image's bytes in a packed set."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or parts[0] == "cache":
            continue
        if (offset := path.read_bytes().find(stored)) >= 0:
            return path, offset
    raise SystemExit(f"{folder}: the image is stored in other bytes")


def flip(stored: bytes) -> int:
    """Return a byte whose flip changes the picture much, without an error of Pillow."""
    intact = pixels(stored, "jpg").astype(int)
    for at in range(len(stored) // 2, len(stored) - 2):
        damaged = stored[:at] + bytes([stored[at] ^ 0xFF]) + stored[at + 1 :]
        with contextlib.suppress(OSError, SyntaxError):
            if np.abs(pixels(damaged, "jpg") - intact).mean() > 16:
                return at
    raise SystemExit("no byte of this image matters")


def judge(launch: Launch, fault: str) -> tuple[str, str]:
    """Say what became of a damaged set, refused, trained on or left out; and the message."""
    bad, steps = wrong(launch), read_steps(launch)
    said = last_message(launch)
    if fault:
        done = min(map(len, steps.values()), default=0) and max(steps, default=0)
        parts = [f"stops after {done} steps" if done else "refused before the first step"]
        if fault == "hangs":
            parts = [f"hangs after {done} steps" if done else "hangs before the first step"]
        elif not said:
            said = fault
    else:
        seen = {number for ids in steps.values() for number in ids}
        parts = [f"{IMAGES - len(seen):,} images left out"] * (len(seen) < IMAGES)
        parts += [] if said else ["no message"]
    if bad:
        parts.insert(0, f"trains on {len(bad)} wrong image{'s' * (len(bad) != 1)}")
    return ", ".join(parts), said


def fault_of(launch: Launch, fault: str) -> str:
    """Return the cell of a run that failed: the kind of its error, or "hangs"."""
    return fault and f"fails: `{last_message(launch) or shorten(fault)}`"


def last_message(launch: Launch) -> str:
    """Return the last line of the ranks' output that names an error, without folders."""
    found = ""
    for file in sorted(launch.logs.glob("*.stderr")):
        for line in file.read_text(errors="replace").splitlines():
            if re.match(r"[\w.]*(Error|Exception|Corrupt\w*)\b", line) and "gloo" not in line:
                found = line
    for folder in (launch.folder, launch.folder.parent.parent):
        found = found.replace(f"{folder}/", "")
    return shorten(found)


def shorten(fault: str) -> str:
    line = fault.strip().splitlines()[-1].replace("|", "/") if fault.strip() else ""
    return line if len(line) <= 150 else f"{line[:147]}..."


# -- all of them ---------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    """Write JPEG files of smooth pictures, all different, and their pixels."""
    rng, decoded = np.random.default_rng(0), []
    (folder / "files").mkdir()
    for number in range(IMAGES):
        low = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        out = io.BytesIO()
        low.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
        (folder / "files" / f"{number:08d}.jpg").write_bytes(out.getvalue())
        decoded.append(pixels(out.getvalue(), "jpg"))
    array: NDArray[np.uint8] = np.stack(decoded)
    np.save(folder / "expected.npy", array)


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def examine_elsewhere(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Examine a peer in a process of its own; returns (versions, cells)."""
    work = folder / MODULES[name]
    work.mkdir()
    command = [sys.executable, __file__, "--one", name, str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        return "not installed", {}
    if done.returncode:
        return "failed", {"undisturbed": shorten(done.stderr.strip().splitlines()[-1])}
    shown, cells = json.loads(done.stdout.splitlines()[-1])
    return shown, cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", default=list(MODULES), help="default: all")
    parser.add_argument("--keep", type=Path, help="a new folder for logs, states and sets")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        name, work = options.one
        try:
            peer = find(name)
        except ImportError as error:
            print(error, file=sys.stderr)
            raise SystemExit(3) from None
        print(json.dumps([versions(peer), examine(peer, Path(work))]))
        return
    columns: dict[str, tuple[str, dict[str, str]]] = {}
    with contextlib.ExitStack() as stack:
        if scratch := options.keep:
            scratch.mkdir()
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_images(scratch)
        for name in options.peers:
            began = time.monotonic()
            columns[name] = examine_elsewhere(name, scratch)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"Two ranks, two workers each, {IMAGES} images, {EPOCHS} epochs; commit {commit()}.\n")
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    print(f"| version | {' | '.join(shown for shown, _ in columns.values())} |")
    for row, title in ROWS.items():
        cells = [cells.get(row, "") for _, cells in columns.values()]
        print(f"| {title} | {' | '.join(cells)} |")
    print()
    for row in ("flipped", "cut"):
        for name, (_, found) in columns.items():
            if said := found.get(f"{row}, message"):
                print(f"* {ROWS[row]}, {name}: `{said}`")


if __name__ == "__main__":
    main()
