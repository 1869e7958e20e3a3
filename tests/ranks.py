"""A function on several real ranks: processes of their own that talk over gloo on loopback."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from launching import free_port

# Imported once, in the server that ranks are forked from: torch alone takes seconds.
HEAVY = [
    "torch._dynamo",
    "accelerate",
    "pipeline.runtime.ranks",
    "pipeline.training.gan",
    "pipeline.training.run",
    "pipeline.training.inputs",
    "launching",
]


def on_ranks(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(*arguments)`` as ranks 0 to count - 1 and wait; raises what a rank raised."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
    torch.multiprocessing.start_processes(
        _rank, (count, free_port(), work, arguments), nprocs=count, start_method="forkserver"
    )


def start_ranks(count: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start the same and return the processes, for tests in which some do not end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    port = free_port()
    made = [
        context.Process(target=_rank, args=(rank, count, port, work, arguments))
        for rank in range(count)
    ]
    for process in made:
        process.start()
    return made


def _rank(
    rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
