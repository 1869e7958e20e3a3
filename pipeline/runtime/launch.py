"""Make the Accelerator of a launched process, or refuse a launch that cannot work."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Timer

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from pipeline.runtime import environment, errors, signals
from pipeline.runtime.errors import ConfigError, LaunchError
from pipeline.runtime.hardware import (
    cpu_requested,
    keep_freed_memory,
    launcher_words,
    local_world_size,
    use_all_cores,
)
from pipeline.runtime.ranks import gather_by_node, node_name

log = logging.getLogger("pipeline")
NCCL_EXTRA_SECONDS = 60.0
JOIN_MARGIN = 10.0  # seconds in which PyTorch's own messages about its time limit come first
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(precision: str, rank_timeout: float = 600.0) -> Accelerator:
    """Return the Accelerator of this process.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``; ``resolve_precision`` replaces ``auto``.
        rank_timeout: seconds that ranks wait for each other in a collective.

    Raises:
        LaunchError: PyTorch does not see the GPUs that were allocated, or there are fewer GPUs
            than processes.
        ConfigError: fp16 without a GPU, or processes that did not join one group.
    """
    environment.require_whole_launch()
    environment.use_reachable_interface()
    for line in environment.drop_accelerate_settings(MIXED_PRECISION[precision]):
        if os.environ.get("RANK", "0") == "0":
            log.warning(line)
    _refuse_missing_gpus()
    on_cuda = torch.cuda.is_available() and not cpu_requested()
    # Launchers other than torchrun may show each process only its own GPU.
    if on_cuda and "TORCHELASTIC_RUN_ID" in os.environ:
        _refuse_shared_gpus(local_world_size(), torch.cuda.device_count())
    if not on_cuda:
        keep_freed_memory()
        use_all_cores()
    if precision == "fp16" and not on_cuda:
        raise ConfigError(
            "train.precision (fp16): needs a CUDA device; use bf16, fp32 or auto on this machine."
        )
    errors.rank_timeout = f"{rank_timeout:g} s"
    # NCCL ends a process with a dump of its threads. The ranks also meet over gloo once a step,
    # which fails with an error that has a message: it comes first.
    limit = timedelta(seconds=rank_timeout + (NCCL_EXTRA_SECONDS if on_cuda else 0))
    with _bounded(rank_timeout + JOIN_MARGIN):
        accelerator = Accelerator(
            # Without cpu=True, processes on a machine without GPUs would not join one group.
            cpu=not on_cuda,
            mixed_precision=MIXED_PRECISION[precision],
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    # The only buffers in training, the vectors of spectral norm, are functions of
                    # the weights: no rank needs another's.
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                ),
                InitProcessGroupKwargs(timeout=limit),
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


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End this process if joining the other ranks takes longer.

    gloo has no time limit for a rank that waits to be connected to, and the other may be dead.
    """

    def give_up() -> None:
        print(
            f"error: rank {os.environ.get('RANK', '0')} on {node_name()} waited {seconds:.0f} s "
            "for the other ranks, but not all reached it. The first failure of their logs is "
            "the cause; without one, set GLOO_SOCKET_IFNAME to the interface that reaches them.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(errors.USER_ERROR_EXIT_CODE)

    timer = Timer(seconds, give_up)
    timer.daemon = True
    if os.environ.get("WORLD_SIZE", "1") != "1":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _refuse_missing_gpus() -> None:
    """Raise if PyTorch sees fewer GPUs than GPUS_PER_NODE, which the launch scripts set.

    Without this check a node with an old driver would train on its CPU. The scripts take the
    number from the scheduler or from nvidia-smi.
    """
    allocated = os.environ.get("GPUS_PER_NODE", "")
    if not allocated.isdecimal() or cpu_requested():
        return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= min(int(allocated), local_world_size()):
        return
    reason = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is a CPU build
        reason = f" ({str(error).partition('. ')[0]})"
    raise LaunchError(
        f"GPUS_PER_NODE ({allocated}): PyTorch {torch.__version__} sees {seen} on "
        f"{node_name()}{reason}; compare with nvidia-smi there, update the driver or install "
        "a PyTorch for it, or set ACCELERATE_USE_CPU=true to compute without GPUs."
    )


def _refuse_shared_gpus(processes: int, gpus: int) -> None:
    """Raise if processes would share a GPU: NCCL fails with a traceback at the first collective."""
    if processes > gpus:
        raise LaunchError(
            f"{processes} processes on {node_name()}, which has {gpus} GPU(s) for them: two "
            "processes cannot share a GPU. Start one process per GPU (--nproc_per_node, "
            "--num_processes, NPROC_PER_NODE), or set ACCELERATE_USE_CPU=true to compute on CPUs."
        )


def require_equal_precision(
    accelerator: Accelerator, precision: str, field: str = "train.precision"
) -> None:
    """Raise on all ranks if ``auto`` was resolved to different precisions on different nodes.

    Raises:
        ConfigError: naming the precision of each node.
    """
    nodes = gather_by_node(accelerator, precision)
    if len(nodes) > 1:
        listed = "; ".join(f"{one} on {names}" for one, names in sorted(nodes.items()))
        raise ConfigError(
            f"{field} (auto): means different things to these nodes: {listed}. Set "
            f"{field}=fp32 or bf16, or use nodes of one kind."
        )


def warn_about_missing_processes(accelerator: Accelerator) -> None:
    """Log a warning if the launcher was asked for more processes than it started.

    ``accelerate launch --cpu --num_processes 2`` starts one process without a message; only the
    launcher's own command line has the number.
    """
    asked = _processes_asked_for(launcher_words("cmdline"))
    if asked > accelerator.num_processes:
        log.warning(
            f"--num_processes ({asked}): this run has {accelerator.num_processes} process, because "
            "accelerate launch starts one with --cpu. On CPUs too, use: accelerate launch "
            f"--multi_gpu --num_processes {asked} ..."
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
