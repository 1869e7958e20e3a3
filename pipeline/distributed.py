"""How a run becomes an Accelerate job, and what its ranks share."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from itertools import pairwise
from threading import Event, Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from pipeline import signals
from pipeline.errors import USER_ERROR_EXIT_CODE, ConfigError, LaunchError, UserError
from pipeline.hardware import (
    asked_for_cpu,
    keep_freed_memory,
    of_the_launcher,
    processes_here,
    use_all_cores,
)
from pipeline.peers import Peers

T = TypeVar("T")
log = logging.getLogger("pipeline")
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
ASK_SECONDS = 1.0


def start(precision: str) -> Accelerator:
    """The Accelerator of this process.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``; ``resolve_precision`` makes one of ``auto``.

    Raises:
        LaunchError: GPUs were allocated that PyTorch does not see, or fewer than processes.
        ConfigError: fp16 without a GPU, or processes that do not see each other.
    """
    _refuse_missing_gpus()
    on_cuda = torch.cuda.is_available() and not asked_for_cpu()
    if on_cuda and "TORCHELASTIC_RUN_ID" in os.environ:  # others may show a process its GPU alone
        _refuse_shared_gpus(processes_here(), torch.cuda.device_count())
    if not on_cuda:
        keep_freed_memory()
        use_all_cores()
    if precision == "fp16" and not on_cuda:
        raise ConfigError(
            "train.precision (fp16): needs a CUDA device; use bf16, fp32 or auto on this machine."
        )
    accelerator = Accelerator(
        # Without this, processes on a machine without GPUs would not join into one group.
        cpu=not on_cuda,
        mixed_precision=MIXED_PRECISION[precision],
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                # Broadcasting buffers before the second of D's two forward passes breaks the first
                # one's backward pass on torch >= 2.6 (github.com/pytorch/pytorch/issues/175024).
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"WORLD_SIZE ({launched}) processes were launched but Accelerate sees "
            f"{accelerator.num_processes}: every process would train alone and write the same "
            "files. Launch with: accelerate launch --multi_gpu --num_processes N pipeline/train.py "
            "... (also on CPU), or torchrun --nproc_per_node N pipeline/train.py ..."
        )
    return accelerator


def _refuse_missing_gpus() -> None:
    """Or a node with an old driver would train on its CPU without a word.

    GPUS_PER_NODE is what the launch scripts know from the scheduler or from nvidia-smi.
    """
    promised = os.environ.get("GPUS_PER_NODE", "")
    if not promised.isdecimal() or asked_for_cpu():
        return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= min(int(promised), processes_here()):
        return
    why = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is a build for CPUs
        why = f" ({str(error).partition('. ')[0]})"
    raise LaunchError(
        f"GPUS_PER_NODE ({promised}): PyTorch {torch.__version__} sees {seen} on "
        f"{socket.gethostname()}{why}; compare with nvidia-smi there, update the driver or install "
        "a PyTorch for it, or set ACCELERATE_USE_CPU=true to compute without GPUs."
    )


def _refuse_shared_gpus(processes: int, gpus: int) -> None:
    """Or NCCL would end the launch with a traceback of its own at the first exchange."""
    if processes > gpus:
        raise LaunchError(
            f"{processes} processes on {socket.gethostname()}, which has {gpus} GPU(s) for them: "
            "two processes cannot share one. Start one per GPU (--nproc_per_node, "
            "--num_processes, NPROC_PER_NODE), or set ACCELERATE_USE_CPU=true to compute without."
        )


def refuse_unequal_precisions(
    accelerator: Accelerator, precision: str, field: str = "train.precision"
) -> None:
    """``auto`` is made concrete by each rank for itself; unequal nodes must not mix arithmetic.

    Raises:
        ConfigError: on all ranks.
    """
    peers = Peers(accelerator)
    found = peers.where(peers.gather(precision))
    if len(found) > 1:
        said = "; ".join(f"{one} on {nodes}" for one, nodes in sorted(found.items()))
        raise ConfigError(
            f"{field} (auto): means different things to these nodes: {said}. Set {field}=fp32 or "
            "bf16, or take nodes of one kind."
        )


def warn_of_a_lost_launch(accelerator: Accelerator) -> None:
    """Say so when the launcher was asked for more processes than it started.

    ``accelerate launch --cpu --num_processes 2`` starts one process and is silent about it; only
    the launcher's own command line knows.
    """
    words = of_the_launcher("cmdline")
    for word, value in pairwise(words):
        asked = (
            int(value) if word.replace("-", "_") == "__num_processes" and value.isdecimal() else 0
        )
        if asked > accelerator.num_processes:
            log.warning(
                f"--num_processes {asked} was asked for, but this run has "
                f"{accelerator.num_processes} process: accelerate launch starts no second one with "
                f"--cpu. Use: accelerate launch --multi_gpu --num_processes {asked} ... on CPUs too"
            )


def on_rank_zero(accelerator: Accelerator, work: Callable[[], T], *, lengthy: bool = False) -> T:
    """The result of ``work`` on rank 0, given to every rank; so is its ``UserError``.

    With ``lengthy`` it may take longer than the ranks' time limit for each other; it then runs in a
    thread. Stop signals wait for its end.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[object] = [None, None]

    def attempt(_: object = None) -> None:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error

    if lengthy:
        while_others_wait(accelerator, accelerator.is_main_process, attempt, stoppable=False)
    elif accelerator.is_main_process:
        attempt()
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[1], UserError):
        raise _of_all(outcome[1])
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """This rank's result of ``work``, once all ranks have one; all raise a ``UserError`` of any.

    Without it a rank that alone meets a damaged file, or does not see it yet, would leave the
    others waiting in the next collective, which it never joins.
    """
    result: T | None = None
    failure: UserError | None = None
    try:
        result = work()
    except UserError as error:
        failure = error
    peers = Peers(accelerator)
    failures = peers.gather(failure)
    if failed := next(filter(None, failures), None):
        where = peers.where([str(error or "") for error in failures])
        raise _of_all(
            failed if len(where) == 1 else type(failed)(f"{where[str(failed)]}: {failed}")
        )
    return result  # type: ignore[return-value]


def _of_all(error: UserError) -> UserError:
    error.raised_on_all = True
    return error


def while_others_wait(
    accelerator: Accelerator,
    mine: bool,
    work: Callable[[Callable[[], bool]], object],
    *,
    stoppable: bool = True,
) -> None:
    """``work`` on the ranks whose it is, for as long as it takes, while the others wait for them.

    A barrier would give up after its time limit, ten minutes with NCCL, and be deaf to signals. So
    ranks ask each other every second, and ``work``, in a thread, is given a function to ask too.

    Raises:
        Stopped: a stop signal came to any rank, and it is ``stoppable``; on all of them.
        UserError: of ``work``, on the rank that met it. The others leave in silence.
    """
    leave, failures = Event(), list[BaseException]()

    def attempt() -> None:
        try:
            work(leave.is_set)
        except BaseException as error:
            failures.append(error)

    # A daemon: a second Ctrl-C, which means now, leaves it behind.
    thread = Thread(target=attempt, daemon=True)
    if mine:
        thread.start()
    try:
        while True:
            if mine:
                thread.join(ASK_SECONDS)
            busy = thread.is_alive()
            failed = not busy and bool(failures)
            facts = [busy, failed, stoppable and signals.received() is not None]
            working, failure, stop = _on_any_rank(accelerator, facts)
            if failed:
                raise failures[0]
            if failure:
                raise SystemExit(USER_ERROR_EXIT_CODE)
            if not working:
                return
            if stop:
                leave.set()
                if mine:
                    thread.join()
                raise signals.Stopped
    finally:
        leave.set()


def _on_any_rank(accelerator: Accelerator, facts: list[bool]) -> list[bool]:
    if accelerator.num_processes == 1:
        return facts
    flags = torch.tensor(facts, dtype=torch.int32, device=accelerator.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def ranks_hold_the_same(accelerator: Accelerator, networks: list[nn.Module]) -> bool:
    """Whether all ranks have bitwise the same parameters (compared by a 64-bit sum of the bits)."""
    if accelerator.num_processes == 1:
        return True
    bits = [
        p.detach().contiguous().view(torch.int32).to(torch.int64).sum()
        for network in networks
        for p in network.parameters()
    ]
    mine = torch.stack(bits)
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool((most == least).all())


def mean_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The mean of a float tensor over all ranks."""
    return accelerator.reduce(values, "mean") if accelerator.num_processes > 1 else values
