"""Turn a launched process into an Accelerator, or refuse a launch that cannot work."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from pipeline.runtime import environment, signals
from pipeline.runtime.errors import ConfigError, LaunchError
from pipeline.runtime.hardware import (
    cpu_requested,
    keep_freed_memory,
    local_world_size,
    of_the_launcher,
    use_all_cores,
)
from pipeline.runtime.ranks import Peers

log = logging.getLogger("pipeline")
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``; ``resolve_precision`` makes one of ``auto``.

    Raises:
        LaunchError: GPUs were allocated that PyTorch does not see, or fewer than processes.
        ConfigError: fp16 without a GPU, or processes that do not see each other.
    """
    environment.require_whole_launch()
    for line in environment.drop_accelerate_settings(MIXED_PRECISION[precision]):
        if os.environ.get("RANK", "0") == "0":
            log.warning(line)
    _refuse_missing_gpus()
    on_cuda = torch.cuda.is_available() and not cpu_requested()
    if on_cuda and "TORCHELASTIC_RUN_ID" in os.environ:  # others may show a process its GPU alone
        _refuse_shared_gpus(local_world_size(), torch.cuda.device_count())
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
                # The only buffers in training, the vectors of spectral norm, are functions of the
                # weights: no rank needs another's.
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
    if not promised.isdecimal() or cpu_requested():
        return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= min(int(promised), local_world_size()):
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


def require_equal_precision(
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


def warn_about_missing_processes(accelerator: Accelerator) -> None:
    """Say so when the launcher was asked for more processes than it started.

    ``accelerate launch --cpu --num_processes 2`` starts one process and is silent about it; only
    the launcher's own command line knows.
    """
    asked = _processes_asked_for(of_the_launcher("cmdline"))
    if asked > accelerator.num_processes:
        log.warning(
            f"--num_processes {asked} was asked for, but this run has "
            f"{accelerator.num_processes} process: accelerate launch starts no second one with "
            f"--cpu. Use: accelerate launch --multi_gpu --num_processes {asked} ... on CPUs too"
        )


def _processes_asked_for(launcher: list[str]) -> int:
    """Return what ``accelerate launch`` was told, by its command line or its file; else 0.

    Args:
        launcher: words of the parent's command line; [] if it cannot be read.
    """
    if not any(Path(word).name in signals.LAUNCHERS for word in launcher):
        return 0
    options = {"__num_processes": "", "__config_file": ""}
    for word, following in zip(launcher, [*launcher[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if (name := name.replace("-", "_")) in options and not options[name]:
            options[name] = value if equals else following
    if options["__num_processes"].isdecimal():
        return int(options["__num_processes"])
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    file = options["__config_file"] or default_config_file
    if not Path(file).is_file():
        return 0
    try:
        return int(load_config_from_file(file).num_processes or 0)
    except (ValueError, TypeError, AttributeError, OSError):  # the launcher has read it: a new key
        return 0
