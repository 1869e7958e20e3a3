"""How a run becomes an Accelerate job, and what its ranks share."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from pipeline.runtime import signals
from pipeline.runtime.errors import USER_ERROR_EXIT_CODE, UserError

T = TypeVar("T")
VISIBLE_SECONDS = 30.0  # how long a network file system may hide a new file from other nodes
POLL_SECONDS = 1.0


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
        run_on_selected_ranks(accelerator, accelerator.is_main_process, attempt, stoppable=False)
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


def run_on_selected_ranks(
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
                thread.join(POLL_SECONDS)
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
    digests: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(digests, digest.digest())
    return len(set(digests)) == 1


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
    """The mean of a float tensor over all ranks."""
    return accelerator.reduce(values, "mean") if accelerator.num_processes > 1 else values


class Peers:
    """All ranks, and what they say to each other."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.nodes = self.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname())

    def gather(self, fact: T) -> list[T]:
        """The fact of every rank, on every rank."""
        if self.count == 1:
            return [fact]
        facts: list[T | None] = [None] * self.count
        dist.all_gather_object(facts, fact)
        return facts  # type: ignore[return-value]

    def where(self, facts: Sequence[T]) -> dict[T, str]:
        """Which nodes each fact was found on: ``{fact: "n1, n2"}``."""
        found: dict[T, list[str]] = {}
        for node, fact in zip(self.nodes, facts, strict=True):
            if node not in found.setdefault(fact, []):
                found[fact].append(node)
        return {fact: ", ".join(nodes) for fact, nodes in found.items()}

    def faults(self, attempt: Callable[[], T]) -> tuple[T | None, list[str]]:
        """What this rank's attempt gave, and ``node: reason`` of all that failed."""
        result, reason = None, ""
        try:
            result = attempt()
        except (UserError, OSError, RuntimeError) as error:
            reason = str(error)
        reasons = self.where(self.gather(reason))
        reasons.pop("", None)
        return result, [f"{nodes}: {reason}" for reason, nodes in reasons.items()]
