"""Check a cluster before a run starts: one finding per check.

Every rank takes part in every check and calls the same collectives in the same order. A rank on
which a check fails gathers the reason with the others instead of leaving them waiting.
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

from pipeline.config.schema import Config
from pipeline.config.sizes import micro_batching, require_memory
from pipeline.data.cache import Cache
from pipeline.data.loader import checked_index
from pipeline.data.shards import Index
from pipeline.runs.disk_use import checkpoint_bytes, written_bytes
from pipeline.runs.wandb_log import wandb_mode
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import exists, nearest_existing, sha256_of
from pipeline.runtime.hardware import local_world_size
from pipeline.runtime.host import cores, memory
from pipeline.runtime.locks import FileLock
from pipeline.runtime.ranks import (
    VISIBLE_SECONDS,
    gather,
    gather_by_node,
    node_name,
    try_on_every_rank,
)
from pipeline.runtime.signals import Agreement

ALL_REDUCE_MIB = 64
REPETITIONS = 5
GLOO_SECONDS = 60.0  # time limit for connecting the ranks
MAX_SKEW = 2.0  # seconds between the clocks of two nodes
LOW_MIB_PER_S = 50  # a slower file system cannot feed a GPU


def examine(config: Config, accelerator: Accelerator, precision: str) -> list[Finding]:
    """Run all checks; the list of findings is the same on every rank.

    Args:
        config: the configuration of the run to start, on as many nodes and processes as now.
        accelerator: the ranks of this launch.
        precision: ``train.precision`` as this rank resolved it.
    """
    found = [_software(accelerator), _devices(accelerator, precision), _batch(accelerator, config)]
    found += [_all_reduce(accelerator), _stop_requests(accelerator), _clocks(accelerator)]
    found.append(_run_folder(accelerator, config))
    index, shards = _shards(accelerator, config)
    found += [shards, *_disk_space(accelerator, config, index), _tracking(accelerator, config)]
    return found


def _software(accelerator: Accelerator) -> Finding:
    """Compare the versions of Python, PyTorch and the other libraries between nodes."""
    names = ("torch", "accelerate", "wandb", "numpy")
    parts = [f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]
    if torch.version.cuda:
        parts.append(f"CUDA {torch.version.cuda}")
    if torch.cuda.is_available():
        parts.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    text = ", ".join(parts)
    by_version = gather_by_node(accelerator, text)
    if len(by_version) == 1:
        nodes = by_version[text].count(",") + 1
        return Finding("software", "ok", text + f"; the same on {nodes} nodes" * (nodes > 1))
    lines = [f"{nodes}: {versions}" for versions, nodes in by_version.items()]
    lines.append("use one environment on all nodes: a shared .venv or an image")
    return Finding("software", "FAILED", "\n".join(lines))


def _devices(accelerator: Accelerator, precision: str) -> Finding:
    """Compare devices and precision between nodes."""
    device = accelerator.device
    if device.type == "cuda":
        kind = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}{_driver()}"
    else:
        kind = f"no GPU in use, {cores()} cores, {torch.get_num_threads()} threads per process"
        if torch.cuda.is_available():
            kind += ", although CUDA is available"
    by_kind = gather_by_node(accelerator, f"{kind}, {precision}")
    lines = [f"{nodes}: {text}" for text, nodes in by_kind.items()]
    verdict: Verdict = "ok" if len(by_kind) == 1 else "note"
    if len(set(gather(accelerator, precision))) > 1:
        lines.append("train.precision (auto) differs: set it, or use nodes of one kind")
        verdict = "FAILED"
    return Finding("devices", verdict, "\n".join(lines))


def _driver() -> str:
    """Return ", driver VERSION" of the NVIDIA driver; "" if unknown."""
    with suppress(OSError):
        line = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
        if number := re.search(r"\s(\d+(?:\.\d+)+)\s", line):
            return f", driver {number[1]}"
    return ""


def _batch(accelerator: Accelerator, config: Config) -> Finding:
    """Check that ``data.batch_size`` can be divided among the ranks, and fits their memory."""
    world_size = accelerator.num_processes
    try:
        micro_batch, accumulation = micro_batching(config, world_size)
        require_memory(config, world_size, local_world_size(), memory())
    except UserError as error:
        return Finding("batch", "FAILED", str(error))
    parts = f"{world_size} processes x {accumulation} micro-batches x {micro_batch}"
    return Finding("batch", "ok", f"data.batch_size {config.data.batch_size} = {parts}")


def _all_reduce(accelerator: Accelerator) -> Finding:
    """Check the sum and the bandwidth of all-reduces with the backend that training uses."""
    world_size = accelerator.num_processes
    if world_size == 1:
        return Finding("all-reduce", "ok", "one process, nothing to exchange")
    numbers = ALL_REDUCE_MIB * 2**20 // 4
    seconds, right = [], True
    for _ in range(REPETITIONS):
        values = torch.full((numbers,), accelerator.process_index + 1.0, device=accelerator.device)
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        dist.all_reduce(values)
        right &= bool((values == world_size * (world_size + 1) / 2).all())  # waits for the device
        seconds.append(time.perf_counter() - began)
    slowest = max(gather(accelerator, statistics.median(seconds)))
    # The bus bandwidth of nccl-tests: bytes per link of a ring, comparable for any world size.
    bus = 2 * (world_size - 1) / world_size * ALL_REDUCE_MIB / 1024 / slowest
    text = f"{dist.get_backend()}: {ALL_REDUCE_MIB} MiB in {slowest * 1000:.1f} ms, {bus:.2f} GiB/s"
    if not all(gather(accelerator, right)):
        return Finding("all-reduce", "FAILED", f"{text}; the sum is wrong: check the network")
    return Finding("all-reduce", "ok", f"{text} per link")


def _stop_requests(accelerator: Accelerator) -> Finding:
    """Check gloo on the CPU: ranks agree on stop requests over it, also beside NCCL."""
    world_size = accelerator.num_processes
    if world_size == 1:
        return Finding("stop requests", "ok", "one process, nobody to agree with")

    def agree() -> float:
        agreement = Agreement(world_size, timedelta(seconds=GLOO_SECONDS))
        began = time.perf_counter()
        agreement.agree(stop=accelerator.process_index == world_size - 1)
        agreed = agreement.agree(stop=False)
        seconds = time.perf_counter() - began
        agreement.close()
        if agreed != (True, False):
            raise RuntimeError("the last rank's stop request did not arrive")
        return seconds

    seconds, faults = try_on_every_rank(accelerator, agree)
    if faults:
        faults.append(
            "set GLOO_SOCKET_IFNAME to the interface that reaches the other nodes; without it gloo "
            "takes the one that the node's own host name leads to"
        )
        return Finding("stop requests", "FAILED", "\n".join(faults))
    slowest = max(gather(accelerator, seconds or 0.0))
    return Finding("stop requests", "ok", f"gloo: agreed in {slowest * 1000:.1f} ms")


def _clocks(accelerator: Accelerator) -> Finding:
    """Measure the largest difference between the clocks of the nodes."""
    skew = float("inf")
    for _ in range(REPETITIONS):  # the smallest: ranks do not leave a barrier at the same instant
        accelerator.wait_for_everyone()
        times = gather(accelerator, time.time())
        skew = min(skew, max(times) - min(times))
    text = f"differ by at most {skew:.2f} s"
    if skew > MAX_SKEW:
        text += ": times in logs and W&B will disagree; start an NTP client on the nodes"
    return Finding("clocks", "note" if skew > MAX_SKEW else "ok", text)


def _run_folder(accelerator: Accelerator, config: Config) -> Finding:
    """Check that every rank can write a file to the run folder and read the files of all ranks."""
    rank = accelerator.process_index
    nodes = gather(accelerator, node_name())
    folder = Path(config.run.dir).expanduser()
    made = _missing_parents(folder) if rank == 0 else []
    mine = folder / f".preflight-{rank}"
    tokens = gather(accelerator, os.urandom(8).hex())

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(mine) as lock:
            lock.acquire(wait=False)
            lock.write_holder(tokens[rank])

    def read() -> None:
        unseen, deadline = set(range(len(tokens))), time.monotonic() + VISIBLE_SECONDS
        while unseen:
            for other in sorted(unseen):
                with suppress(OSError):
                    if (folder / f".preflight-{other}").read_text() == tokens[other]:
                        unseen.remove(other)
            if unseen and time.monotonic() > deadline:
                names = ", ".join(sorted({nodes[other] for other in unseen}))
                raise OSError(f"files from {names} are not seen: not a shared folder")
            time.sleep(0.05)

    try:
        _, faults = try_on_every_rank(accelerator, write)
        if not faults:
            _, faults = try_on_every_rank(accelerator, read)
    finally:
        accelerator.wait_for_everyone()
        with suppress(OSError):  # e.g. the folder does not exist
            mine.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        for path in made:  # the check leaves no folders behind
            with suppress(OSError):
                path.rmdir()
    if faults:
        return Finding("run folder", "FAILED", "\n".join([f"run.dir ({folder})", *faults]))
    return Finding("run folder", "ok", f"{folder}: written, locked and seen by all processes")


def _missing_parents(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not exists(path)]


def _shards(accelerator: Accelerator, config: Config) -> tuple[Index | None, Finding]:
    """Check that all ranks read the same index, and the checksum of one shard per rank."""

    def read() -> tuple[Index, float]:
        index = checked_index(config)
        shard = index.shards[accelerator.process_index % len(index.shards)]
        began = time.perf_counter()
        path = Cache(index, config.data.cache_dir, config.data.cache_gib).path(shard)
        if sha256_of(path) != shard.sha256:
            raise OSError(f"{path}: its checksum differs from the index")
        return index, shard.filesize / 2**20 / (time.perf_counter() - began)

    result, faults = try_on_every_rank(accelerator, read)
    index, rate = result if result is not None else (None, 0.0)
    fingerprints = gather_by_node(accelerator, index.fingerprint if index else "")
    if faults:  # None on all ranks: each must call the same collectives after this
        return None, Finding("shards", "FAILED", "\n".join(faults))
    assert index is not None
    if len(fingerprints) > 1:
        nodes = "; ".join(f"{text[:12]} on {nodes}" for text, nodes in fingerprints.items())
        text = f"{config.data.shards}: differs between nodes: {nodes}"
        return index, Finding("shards", "FAILED", text)
    slowest = min(gather(accelerator, rate))
    text = (
        f"{index.num_samples} samples in {len(index.shards)} shards, {index.fingerprint[:12]} "
        f"on all nodes, checksums correct, {slowest:.0f} MiB/s per process"
    )
    return index, Finding("shards", "note" if slowest < LOW_MIB_PER_S else "ok", text)


def _disk_space(accelerator: Accelerator, config: Config, index: Index | None) -> list[Finding]:
    """Compare free space with what the run has yet to write and with the shards a node caches."""
    folder = Path(config.run.dir).expanduser()
    total, one = checkpoint_bytes(config)
    needed = max(0, total - gather(accelerator, written_bytes(folder))[0])
    free = min(gather(accelerator, shutil.disk_usage(nearest_existing(folder)).free))
    text = f"{folder}: {_gib(free)} free, checkpoints and snapshots to come need {_gib(needed)}"
    findings = [Finding("disk", "ok" if free > needed + one else "FAILED", text)]
    if index is not None and index.is_remote:
        copies = Cache(index, config.data.cache_dir)
        cache = copies.folder
        size = sum(shard.filesize for shard in index.shards if copies.is_copied(shard))
        needed = min(size, int(config.data.cache_gib * 2**30) or size)
        held = sum(path.stat().st_size for path in cache.glob("*.tar")) if cache.is_dir() else 0
        free = min(gather(accelerator, shutil.disk_usage(nearest_existing(cache)).free + held))
        text = f"{cache}: {_gib(free)} free or in use for shards, they need {_gib(needed)}"
        if free <= needed:
            text += f"; another data.cache_dir, or data.cache_gib={0.9 * free / 2**30:.3g}"
        findings.append(Finding("shard cache", "ok" if free > needed else "FAILED", text))
    return findings


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _tracking(accelerator: Accelerator, config: Config) -> Finding:
    """Report the W&B mode of rank 0, which alone logs."""
    mode = gather(accelerator, wandb_mode(config))[0]
    details = {
        "online": "online: rank 0 logs",
        "offline": "offline: upload later with wandb sync",
        "disabled": "disabled: metrics.jsonl only",
    }
    return Finding("W&B", "ok" if mode == "online" else "note", details[mode])


Verdict = Literal["ok", "note", "FAILED"]


class Finding(NamedTuple):
    """The result of one check; ``detail`` may have several lines."""

    check: str
    verdict: Verdict
    detail: str


def table(findings: Sequence[Finding]) -> str:
    """Format the findings as aligned text; the last line is READY or NOT READY: failed checks."""
    width = max(len(finding.check) for finding in findings)
    lines = [
        f"{finding.check:{width}}  {finding.verdict:6}  "
        + finding.detail.replace("\n", "\n" + " " * (width + 10))
        for finding in findings
    ]
    failed = [finding.check for finding in findings if finding.verdict == "FAILED"]
    return "\n".join([*lines, f"NOT READY: {', '.join(failed)}" if failed else "READY"])
