"""Run work on some or all ranks of a job, gather its results and raise its errors everywhere."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from pipeline.runtime import signals
from pipeline.runtime.errors import USER_ERROR_EXIT_CODE, UserError, as_user_error

T = TypeVar("T")
VISIBLE_SECONDS = 30.0  # how long a network file system may hide a new file from other nodes
POLL_SECONDS = 1.0  # between two collectives in which ranks ask whether the others still work


def on_rank_zero(accelerator: Accelerator, work: Callable[[], T], *, lengthy: bool = False) -> T:
    """Run ``work`` on rank 0 and broadcast its result, or raise its error, on all ranks.

    Args:
        accelerator: the ranks.
        work: its result must be picklable.
        lengthy: run ``work`` in a thread while the other ranks poll, so that it may take longer
            than a collective may. Stop signals are acted on after its end.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[object] = [None, None]

    def attempt(_: object = None) -> None:
        outcome[0], outcome[1] = _attempt(work)

    if lengthy:
        run_on_selected_ranks(accelerator, accelerator.is_main_process, attempt, stoppable=False)
    elif accelerator.is_main_process:
        attempt()
    dist.broadcast_object_list(outcome)
    if isinstance(error := outcome[1], UserError):
        error.raised_on_all = True
        raise error
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank and return this rank's result after all ranks have finished.

    If ``work`` raises what ``as_user_error`` knows on any rank, all ranks raise it. Otherwise a
    rank that finds a damaged file would leave, and the others would wait for it in the next
    collective.
    """
    result, failure = _attempt(work)
    failures = gather(accelerator, failure)
    nodes = gather_by_node(accelerator, str(failure or ""))
    if failed := next(filter(None, failures), None):
        if len(nodes) > 1:  # not the same on every rank: name the nodes
            failed = type(failed)(f"{nodes[str(failed)]}: {failed}")
        failed.raised_on_all = True
        raise failed
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Return the result of ``work``, or the error that all ranks are to raise."""
    try:
        return work(), None
    except Exception as error:
        if (known := as_user_error(error)) is None:
            raise
        return None, known


def try_on_every_rank(
    accelerator: Accelerator, work: Callable[[], T]
) -> tuple[T | None, list[str]]:
    """Return this rank's result of ``work``, and a line ``nodes: reason`` per failure of any rank.

    The result is None on a rank where ``work`` raised UserError, OSError or RuntimeError.
    """
    result, reason = None, ""
    try:
        result = work()
    except (UserError, OSError, RuntimeError) as error:
        reason = str(error)
    reasons = gather_by_node(accelerator, reason)
    return result, [f"{nodes}: {reason}" for reason, nodes in reasons.items() if reason]


def run_on_selected_ranks(
    accelerator: Accelerator,
    selected: bool,
    work: Callable[[Callable[[], bool]], object],
    *,
    stoppable: bool = True,
) -> None:
    """Run ``work`` in a thread on the selected ranks. The other ranks poll once a second.

    A barrier would fail after the time limit of a collective (ten minutes with NCCL), and a rank
    that waits in it would not react to signals.

    Args:
        accelerator: the ranks; all of them call this function.
        selected: whether this rank runs ``work``.
        work: is given a function that returns True once it shall return early.
        stoppable: stop when any rank received a stop signal.

    Raises:
        Stopped: on all ranks, after a stop signal to any of them.
        UserError: on the rank where ``work`` raised it. The other ranks exit silently.
    """
    leave, failures = Event(), list[BaseException]()

    def attempt() -> None:
        try:
            work(leave.is_set)
        except BaseException as error:
            failures.append(error)

    # A daemon thread does not keep the process alive after a second Ctrl-C.
    thread = Thread(target=attempt, daemon=True)
    if selected:
        thread.start()
    try:
        while True:
            if selected:
                thread.join(POLL_SECONDS)
            busy = thread.is_alive()
            failed = not busy and bool(failures)
            flags = [busy, failed, stoppable and signals.received() is not None]
            any_busy, any_failed, stop = _on_any_rank(accelerator, flags)
            if failed:
                raise failures[0]
            if any_failed:
                raise SystemExit(USER_ERROR_EXIT_CODE)
            if not any_busy:
                return
            if stop:
                leave.set()
                if selected:
                    thread.join()
                raise signals.Stopped
    finally:
        leave.set()


def _on_any_rank(accelerator: Accelerator, flags: list[bool]) -> list[bool]:
    """All-reduce flags with MAX: True where any rank has True."""
    if accelerator.num_processes == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32, device=accelerator.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Gather a picklable value from every rank, on every rank, in the order of ranks."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


def count_nodes(accelerator: Accelerator) -> int:
    """Return the number of nodes of a launch, the same on every rank."""
    return len(set(gather(accelerator, node_name())))


def gather_by_node(accelerator: Accelerator, value: T) -> dict[T, str]:
    """Gather a hashable value from every rank; return the nodes of each: ``{value: "n1, n2"}``."""
    nodes: dict[T, list[str]] = {}
    for node, one in gather(accelerator, (node_name(), value)):
        if node not in nodes.setdefault(one, []):
            nodes[one].append(node)
    return {one: ", ".join(names) for one, names in nodes.items()}


def node_name() -> str:
    """Return the name of this node as Slurm knows it, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def same_on_all_ranks(accelerator: Accelerator, *holders: Mapping[str, Any]) -> bool:
    """Return whether all ranks hold the same state, bit for bit.

    Each rank computes one SHA-256 of its state, and the digests are gathered. The cost is one copy
    of the state to the CPU and about 0.7 s of hashing per GB: 0.3 s for configs/dcgan_64.yaml.

    Args:
        accelerator: the ranks to compare.
        holders: objects with ``state_dict`` by name, as ``checkpoint.save`` takes them. Parameters,
            buffers, optimizer moments and the state of a gradient scaler are all compared.
    """
    if accelerator.num_processes == 1:
        return True
    digest = hashlib.sha256()
    for holder in holders:
        _update_digest(digest, {name: one.state_dict() for name, one in holder.items()})
    return len(set(gather(accelerator, digest.digest()))) == 1


def _update_digest(digest: hashlib._Hash, state: Any) -> None:
    """Add nested dicts and lists of tensors and plain values to a hash, in their order."""
    if isinstance(state, Tensor):
        digest.update(f"{state.dtype} {tuple(state.shape)} ".encode())
        digest.update(state.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(state, Mapping | list | tuple):
        pairs = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in pairs:
            digest.update(f"{key!r}: ".encode())
            _update_digest(digest, value)
    else:
        digest.update(f"{state!r} ".encode())


def mean_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the element-wise mean of a float tensor over all ranks."""
    return accelerator.reduce(values, "mean") if accelerator.num_processes > 1 else values
