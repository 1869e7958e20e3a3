"""What can go wrong on a cluster, looked at before the GPUs burn money: one finding per check.

Every rank takes part in every check with the same collectives in the same order; a rank that cannot
look at its part reports why instead of leaving the others waiting.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator

from pipeline.config.schema import Config, micro_batching
from pipeline.data.cache import Cache
from pipeline.data.loader import checked_index
from pipeline.data.shards import Index
from pipeline.runs.checkpoint import checkpoint_bytes, written_bytes
from pipeline.runs.wandb_log import wandb_mode
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import exists, nearest_existing, sha256_of
from pipeline.runtime.locks import FileLock
from pipeline.runtime.ranks import VISIBLE_SECONDS, Peers
from pipeline.runtime.signals import Agreement

REDUCED_MIB = 64
REPETITIONS = 5
GLOO_SECONDS = 60.0  # for ranks to find each other
MAX_SKEW = 2.0  # seconds
LOW_MIB_PER_S = 50  # slower than that a shared file system starves a GPU


def examine(config: Config, accelerator: Accelerator, precision: str) -> list[Finding]:
    """All checks of a launch; the same list on every rank.

    Args:
        config: of the run that shall start with the same number of nodes and processes.
        accelerator: of this launch.
        precision: what ``train.precision`` resolves to here.
    """
    peers = Peers(accelerator)
    findings = [_software(peers), _devices(peers, precision), _batch(peers, config)]
    findings += [_all_reduce(peers), _stop_requests(peers), _clocks(peers)]
    findings.append(_run_folder(peers, config))
    index, finding = _shards(peers, config)
    return [*findings, finding, *_room(peers, config, index), _tracking(peers, config)]


def _software(peers: Peers) -> Finding:
    names = ("torch", "accelerate", "wandb", "numpy")
    versions = [f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]
    if torch.version.cuda:
        versions.append(f"CUDA {torch.version.cuda}")
    if torch.cuda.is_available():
        versions.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    found = peers.where(peers.gather(", ".join(versions)))
    if len(found) == 1:
        nodes = len(set(peers.nodes))
        text = f"{next(iter(found))}; the same on {nodes} nodes" if nodes > 1 else next(iter(found))
        return Finding("software", "ok", text)
    lines = [f"{nodes}: {text}" for text, nodes in found.items()]
    lines.append("use one environment on all nodes: a shared .venv or an image")
    return Finding("software", "FAILED", "\n".join(lines))


def _devices(peers: Peers, precision: str) -> Finding:
    device = peers.accelerator.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        kind = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}{_driver()}"
    else:
        cores = len(os.sched_getaffinity(0))
        kind = f"no GPU in use, {cores} cores, {torch.get_num_threads()} threads per process"
        if torch.cuda.is_available():
            kind += ", although CUDA is there"
    found = peers.where(peers.gather(f"{kind}, {precision}"))
    lines = [f"{nodes}: {text}" for text, nodes in found.items()]
    verdict: Verdict = "ok" if len(found) == 1 else "note"
    if len(set(peers.gather(precision))) > 1:
        lines.append("train.precision (auto) differs: set it, or take nodes of one kind")
        verdict = "FAILED"
    return Finding("devices", verdict, "\n".join(lines))


def _driver() -> str:
    with suppress(OSError):
        line = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
        if number := re.search(r"\s(\d+(?:\.\d+)+)\s", line):
            return f", driver {number[1]}"
    return ""


def _batch(peers: Peers, config: Config) -> Finding:
    try:
        micro_batch, accumulation = micro_batching(config, peers.count)
    except UserError as error:
        return Finding("batch", "FAILED", str(error))
    parts = f"{peers.count} processes x {accumulation} micro-batches x {micro_batch}"
    return Finding("batch", "ok", f"data.batch_size {config.data.batch_size} = {parts}")


def _all_reduce(peers: Peers) -> Finding:
    """The real backend between the real nodes: is the sum right, and how fast is it."""
    if peers.count == 1:
        return Finding("all-reduce", "ok", "one process, nothing to exchange")
    device = peers.accelerator.device
    numbers = REDUCED_MIB * 2**20 // 4
    seconds, right = [], True
    for _ in range(REPETITIONS):
        values = torch.full((numbers,), float(peers.rank + 1), device=device)
        peers.accelerator.wait_for_everyone()
        began = time.perf_counter()
        dist.all_reduce(values)
        right &= bool((values == peers.count * (peers.count + 1) / 2).all())  # waits for the device
        seconds.append(time.perf_counter() - began)
    slowest = max(peers.gather(statistics.median(seconds)))
    # What a ring moves over each link, comparable for any number of processes.
    bus = 2 * (peers.count - 1) / peers.count * REDUCED_MIB / 1024 / slowest
    text = f"{dist.get_backend()}: {REDUCED_MIB} MiB in {slowest * 1000:.1f} ms, {bus:.2f} GiB/s"
    if not all(peers.gather(right)):
        return Finding("all-reduce", "FAILED", f"{text}; the sum is wrong: check the network")
    return Finding("all-reduce", "ok", f"{text} per link")


def _stop_requests(peers: Peers) -> Finding:
    """Gloo on the CPU, by which ranks agree on stops, also where NCCL serves the GPUs."""
    if peers.count == 1:
        return Finding("stop requests", "ok", "one process, nobody to agree with")

    def agree() -> float:
        agreement = Agreement(peers.count, timedelta(seconds=GLOO_SECONDS))
        began = time.perf_counter()
        agreement.agree(stop=peers.rank == peers.count - 1, also=False)
        agreed = agreement.agree(stop=False, also=False)
        seconds = time.perf_counter() - began
        agreement.close()
        if agreed != (True, False):
            raise RuntimeError("the last rank's stop request did not arrive")
        return seconds

    seconds, faults = peers.faults(agree)
    if faults:
        faults.append(
            "set GLOO_SOCKET_IFNAME to the interface that reaches the other nodes; without it gloo "
            "takes the one that the node's own host name leads to"
        )
        return Finding("stop requests", "FAILED", "\n".join(faults))
    slowest = max(peers.gather(seconds or 0.0))
    return Finding("stop requests", "ok", f"gloo: agreed in {slowest * 1000:.1f} ms")


def _clocks(peers: Peers) -> Finding:
    skew = float("inf")
    for _ in range(REPETITIONS):  # the least of several: leaving a barrier takes time too
        peers.accelerator.wait_for_everyone()
        times = peers.gather(time.time())
        skew = min(skew, max(times) - min(times))
    text = f"apart by {skew:.2f} s at most"
    if skew > MAX_SKEW:
        text += ": times in logs and W&B will disagree; start an NTP client on the nodes"
    return Finding("clocks", "note" if skew > MAX_SKEW else "ok", text)


def _run_folder(peers: Peers, config: Config) -> Finding:
    """Every rank writes a file and must see all the others' files, and their content."""
    folder = Path(config.run.dir).expanduser()
    made = _missing_parents(folder) if peers.rank == 0 else []
    mine = folder / f".preflight-{peers.rank}"
    token = peers.gather(f"{os.urandom(8).hex()}")

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(mine) as lock:
            lock.acquire(wait=False)
            lock.write_holder(token[peers.rank])

    def see() -> None:
        unseen, deadline = set(range(peers.count)), time.monotonic() + VISIBLE_SECONDS
        while unseen:
            for rank in sorted(unseen):
                with suppress(OSError):
                    if (folder / f".preflight-{rank}").read_text() == token[rank]:
                        unseen.remove(rank)
            if unseen and time.monotonic() > deadline:
                nodes = sorted({peers.nodes[rank] for rank in unseen})
                raise OSError(f"files from {', '.join(nodes)} are not seen: not a shared folder")
            time.sleep(0.05)

    try:
        _, faults = peers.faults(write)
        if not faults:
            _, faults = peers.faults(see)
    finally:
        peers.accelerator.wait_for_everyone()
        with suppress(OSError):  # whatever kept it from being written
            mine.unlink(missing_ok=True)
        peers.accelerator.wait_for_everyone()
        for path in made:  # what a check of a run that is yet to start must not leave
            with suppress(OSError):
                path.rmdir()
    if faults:
        return Finding("run folder", "FAILED", "\n".join([f"run.dir ({folder})", *faults]))
    return Finding("run folder", "ok", f"{folder}: written, locked and seen by all processes")


def _missing_parents(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.parents) if not exists(path)]


def _shards(peers: Peers, config: Config) -> tuple[Index | None, Finding]:
    """The same index everywhere, and one whole shard per rank with the checksum it should have."""
    where = config.data.shards

    def look() -> tuple[Index, float]:
        index = checked_index(config)
        shard = index.shards[peers.rank % len(index.shards)]
        began = time.perf_counter()
        path = Cache(index, config.data.cache_dir, config.data.cache_gib).path(shard)
        if sha256_of(path) != shard.sha256:
            raise OSError(f"{path}: its checksum differs from the index")
        return index, shard.filesize / 2**20 / (time.perf_counter() - began)

    seen, faults = peers.faults(look)
    index, rate = seen if seen is not None else (None, 0.0)
    fingerprints = peers.where(peers.gather(index.fingerprint if index else ""))
    if faults:  # None on all ranks, which must go on alike
        return None, Finding("shards", "FAILED", "\n".join(faults))
    assert index is not None
    if len(fingerprints) > 1:
        nodes = "; ".join(f"{text[:12]} on {nodes}" for text, nodes in fingerprints.items())
        return index, Finding("shards", "FAILED", f"{where}: differs between nodes: {nodes}")
    slowest = min(peers.gather(rate))
    text = (
        f"{index.num_samples} samples in {len(index.shards)} shards, {index.fingerprint[:12]} "
        f"everywhere, checksums right, {slowest:.0f} MiB/s a process"
    )
    return index, Finding("shards", "note" if slowest < LOW_MIB_PER_S else "ok", text)


def _room(peers: Peers, config: Config, index: Index | None) -> list[Finding]:
    """Free space against what the run has yet to write, and against the shards a node copies."""
    folder = Path(config.run.dir).expanduser()
    whole, one = checkpoint_bytes(config)
    needed = max(0, whole - peers.gather(written_bytes(folder))[0])
    free = min(peers.gather(shutil.disk_usage(nearest_existing(folder)).free))
    text = f"{folder}: {_gib(free)} free, checkpoints and snapshots to the end take {_gib(needed)}"
    findings = [Finding("disk", "ok" if free > needed + one else "FAILED", text)]
    if index is not None and index.is_remote:
        cache = Path(config.data.cache_dir).expanduser()
        total = sum(shard.filesize for shard in index.shards)
        wanted = min(total, int(config.data.cache_gib * 2**30) or total)
        held = sum(path.stat().st_size for path in cache.glob("*.tar")) if cache.is_dir() else 0
        free = min(peers.gather(shutil.disk_usage(nearest_existing(cache)).free + held))
        text = f"{cache}: {_gib(free)} free or in use for shards, they take {_gib(wanted)}"
        findings.append(Finding("shard cache", "ok" if free > wanted else "FAILED", text))
    return findings


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _tracking(peers: Peers, config: Config) -> Finding:
    mode = peers.gather(wandb_mode(config))[0]  # only rank 0 logs
    said = {
        "online": "online: a key is configured, rank 0 logs",
        "offline": "offline: no key; upload later with wandb sync",
        "disabled": "disabled: metrics.jsonl only",
    }
    return Finding("W&B", "ok" if mode == "online" else "note", said[mode])


Verdict = Literal["ok", "note", "FAILED"]


class Finding(NamedTuple):
    """One line of the table."""

    check: str
    verdict: Verdict
    found: str


def table(findings: Sequence[Finding]) -> str:
    """The findings as aligned text, the verdict over all of them in the last line."""
    width = max(len(finding.check) for finding in findings)
    lines = [
        f"{finding.check:{width}}  {finding.verdict:6}  "
        + finding.found.replace("\n", "\n" + " " * (width + 10))
        for finding in findings
    ]
    failed = [finding.check for finding in findings if finding.verdict == "FAILED"]
    return "\n".join([*lines, f"NOT READY: {', '.join(failed)}" if failed else "READY"])
