"""Run the ranks of a loader as training would: steps, states, kills, logs."""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from peers import Peer, Place

BATCH, EPOCHS = 32, 2
EVERY = 4  # steps between stored states
STEP_SECONDS = 0.004  # a training step
LIMIT = 60.0  # seconds without a step: it hangs. States are converted meanwhile


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
    killed, steps = False, 0
    while len(ended) < len(ranks):
        for pid in set(ranks) - set(ended):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = status
        if any(ended.values()) and len(ended) < len(ranks):
            deadline = min(deadline, time.monotonic() + 3)  # the others see it, or never will
        if log.exists() and (done := log.read_bytes().count(b"\n")) > steps:
            steps, deadline = done, max(deadline, time.monotonic() + LIMIT)
        if kill_at and steps >= kill_at:
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
    return "hangs" if any(ended.values()) else ""


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
