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
import atexit
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peers import MODULES, Peer, Place, find, pixels, versions
from PIL import Image

IMAGES, SIZE, PER_SHARD, BATCH, EPOCHS = 2048, 32, 128, 32, 2
STEPS = EPOCHS * IMAGES // BATCH
EVERY = 4  # steps between stored states
STEP_SECONDS = 0.004  # a training step
LIMIT = 60.0  # seconds for a launch; an undisturbed one takes 3
VICTIM = 1000  # the damaged image: of shard 7 of 16
ROWS = {
    "undisturbed": "two epochs, undisturbed",
    "kill": "killed, resumed",
    "twice": "killed, resumed, killed, resumed",
    "ranks": "resumed on one rank instead of two",
    "workers": "resumed with four workers a rank instead of two",
    "flipped": "a flipped byte in a shard",
    "cut": "a truncated shard",
}


# -- one rank ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Folders and size of a run; ``saved`` holds its states."""

    folder: Path
    saved: Path
    logs: Path
    ranks: int = 2
    workers: int = 2


def train(peer: Peer, launch: Launch, rank: int) -> None:
    """Load two epochs from the last complete states on; log the ids, and images that are wrong."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(launch.ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(launch.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # the ranks meet in a file; packages only look whether it is set
    }
    store = torch.distributed.FileStore(str(launch.logs / "store"), launch.ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=launch.ranks)
    expected = np.load(launch.folder.parent / "expected.npy", mmap_mode="r")
    place = Place(rank, launch.ranks, launch.workers, BATCH // launch.ranks, checked=True)
    feed = peer.open_feed(launch.folder, "jpg", place)
    step = begun = 0
    if (last := launch.saved / "last").exists():
        step, begun, old_ranks = json.loads(last.read_text())
        files = [launch.saved / f"{step}_{k}.pickle" for k in range(old_ranks)]
        states = [pickle.loads(file.read_bytes()) for file in files]
        if states[0] is not None:
            feed.load(states)
    with (launch.logs / f"{rank}.jsonl").open("a") as log:
        for epoch in range(begun, EPOCHS):
            for images, ids in all_have_one(feed.epoch(epoch)):
                step += 1
                shown = ((images + 1) * 127.5).permute(0, 2, 3, 1).numpy()
                far = np.abs(shown - expected[ids.numpy()]).mean((1, 2, 3)) > 8
                row = {"step": step, "ids": ids.tolist(), "wrong": ids[torch.tensor(far)].tolist()}
                print(json.dumps(row), file=log, flush=True)
                if step % EVERY == 0:
                    store_state(launch, rank, feed.state(), step, epoch)
                time.sleep(STEP_SECONDS)
    dist.barrier()


def all_have_one(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches until a rank has none: as in DDP, ranks go on together."""
    while True:
        batch = next(batches, None)
        more = torch.tensor(int(batch is not None))
        dist.all_reduce(more, dist.ReduceOp.MIN)
        if not more:
            return
        yield batch


def store_state(launch: Launch, rank: int, state: Any, step: int, epoch: int) -> None:
    (launch.saved / f"{step}_{rank}.pickle").write_bytes(pickle.dumps(state))
    dist.barrier()
    if rank == 0:
        new = launch.saved / "new"
        new.write_text(json.dumps([step, epoch, launch.ranks]))
        new.replace(launch.saved / "last")


def run(peer: Peer, launch: Launch, kill_at: int = 0) -> str:
    """Fork the ranks, kill them all at a step. Returns why they ended, "" after the last epoch."""
    shutil.rmtree(launch.logs, ignore_errors=True)
    launch.logs.mkdir()
    launch.saved.mkdir(exist_ok=True)
    ranks = [fork_rank(peer, launch, rank) for rank in range(launch.ranks)]
    ended: dict[int, int] = {}
    deadline, log = time.monotonic() + LIMIT, launch.logs / "0.jsonl"
    killed = False
    while len(ended) < len(ranks):
        for pid in set(ranks) - set(ended):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = status
        if any(ended.values()) and len(ended) < len(ranks):
            deadline = min(deadline, time.monotonic() + 3)  # the others see it, or never will
        if not killed and kill_at and log.exists() and log.read_bytes().count(b"\n") >= kill_at:
            killed = True
            time.sleep(random.random() * 0.02)
        if killed or time.monotonic() > deadline:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            for pid in set(ranks) - set(ended):
                ended[pid] = os.waitpid(pid, 0)[1]
            if killed:
                return "killed"
        time.sleep(0.005)
    for pid in ranks:  # workers that outlived a rank
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    faults = [file.read_text() for file in sorted(launch.logs.glob("*.error"))]
    if faults:  # that of a rank which waited for another comes second
        return min(faults, key=lambda text: text.startswith(("SystemExit", "RuntimeError: [")))
    return "" if not any(ended.values()) else "no end"


def in_child(work: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit("the images could not be packed")


def fork_rank(peer: Peer, launch: Launch, rank: int) -> int:
    """Run a rank in a process group of its own, forked before any thread was started."""
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    with (launch.logs / f"{rank}.stderr").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 0
    try:
        train(peer, launch, rank)
    except BaseException as error:
        (launch.logs / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        code = 2
    else:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -- what is counted -----------------------------------------------------------------------------


def read_steps(launch: Launch, last: int = 10**9) -> dict[int, list[int]]:
    """Return the ids of each step, of all ranks in turn."""
    found: dict[int, list[int]] = {}
    for rank in range(launch.ranks):
        for line in (launch.logs / f"{rank}.jsonl").read_text().splitlines():
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
        order = "same order"
    elif {k: sorted(v) for k, v in steps.items()} == {k: sorted(v) for k, v in reference.items()}:
        order = "same batches"
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
        return {"undisturbed": shorten(fault)}
    reference = read_steps(whole)
    cells["undisturbed"] = count(reference, reference).rpartition(",")[0]

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
        cells[name] = shorten(fault) or count(steps, reference)

    again, _ = resumed("twice", kill_at=rng.randrange(STEPS // 2, STEPS - 10) - step)
    second = json.loads((again.saved / "last").read_text())[0]
    middle = read_steps(again, second)
    fault = run(peer, again)
    cells["twice"] = shorten(fault) or count(before | middle | read_steps(again), reference)

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
        cells[name] = judge(spoiled, run(peer, spoiled))
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


def judge(launch: Launch, fault: str) -> str:
    """Say what became of a damaged set: refused, trained on, or left out."""
    steps, bad = read_steps(launch) if not fault else {}, wrong(launch)
    logs = [file.read_text() for file in launch.logs.glob("*.jsonl")]
    done = min((text.count("\n") for text in logs), default=0)
    trained = f"{len(bad)} wrong image{'s' * (len(bad) != 1)} trained on" if bad else ""
    if fault:
        when = f"stops after {done} steps" if done else "refused before the first step"
        parts = [when, trained, shorten(fault)]
    else:
        said = any(
            word in file.read_text().lower()
            for file in launch.logs.glob("*.stderr")
            for word in ("error", "exception", "corrupt", "truncated")
        )
        parts = [trained, count(steps, steps).rpartition(",")[0]]
        parts.append("with a line" if said else "without a line")
    return "; ".join(part for part in parts if part)


def shorten(fault: str) -> str:
    line = fault.strip().splitlines()[-1].replace("|", "/") if fault.strip() else ""
    return f"`{line[:117]}...`" if len(line) > 120 else f"`{line}`" if line else ""


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
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    print(f"| version | {' | '.join(shown for shown, _ in columns.values())} |")
    for row, title in ROWS.items():
        cells = [cells.get(row, "") for _, cells in columns.values()]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
