"""What a process computes with: precision, kernels, cores and memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def resolve_precision(precision: str) -> str:
    """Replace ``auto`` by bf16 where the hardware multiplies it natively, else by fp32."""
    if precision != "auto":
        return precision
    return "bf16" if native_bf16() else "fp32"


def native_bf16() -> bool:
    """Whether the device that ``launch.make_accelerator`` picks multiplies bf16 in hardware."""
    if torch.cuda.is_available() and not cpu_requested():
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})


def cpu_requested() -> bool:
    """Whether the environment says so, as Accelerate reads it."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def configure_kernels(device: torch.device, deterministic: bool) -> None:
    """On a GPU: kernels that repeat a run bit for bit, or the fastest, which cuDNN finds by trial.

    Two trials may choose two kernels, and some of the fastest sum in the order that threads
    happen to arrive in. On CPUs every kernel in use repeats itself.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at first use
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def deterministic_fp32() -> Iterator[None]:
    """fp32 in full and the same bits every time: on GPUs no TF32, no kernels found by trial."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, products.allow_tf32
    cudnn.benchmark, cudnn.deterministic = False, True
    cudnn.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, products.allow_tf32 = before


def use_all_cores() -> None:
    """This process's share of them, where the launcher said 1 because nobody had told it otherwise.

    accelerate launch (and torchrun with several processes) sets OMP_NUM_THREADS=1 then, which
    leaves the other cores idle. A value that the launcher itself was given, in its environment or
    on its command line, stands.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    given = [*of_the_launcher("environ"), *of_the_launcher("cmdline")]
    if not given or any("OMP_NUM_THREADS=" in word or "cpu_threads" in word for word in given):
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size()))


def local_world_size() -> int:
    """Of this launch on this machine, as far as the launcher tells."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def of_the_launcher(what: str) -> list[str]:
    """The parent's ``cmdline`` or first ``environ``, word by word; empty where it is not ours."""
    try:
        return Path(f"/proc/{os.getppid()}/{what}").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def keep_freed_memory() -> None:
    """Large blocks stay in the process when they are freed, for the next step to take again.

    glibc hands them back to the kernel instead, and each step then waits for the same tens of
    thousands of pages to be zeroed and mapped anew, most of all in the convolutions' scratch
    buffers: a twentieth of the time (benchmarks/README.md). Other C libraries have no mallopt;
    whoever tunes glibc by its environment is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "GLIBC_TUNABLES" in os.environ:
        return
    for option, value in (
        (-4, 0),  # M_MMAP_MAX: no block has a mapping of its own, to be unmapped with it
        (-1, -1),  # M_TRIM_THRESHOLD: the heap never shrinks
        (-2, 256 << 20),  # M_TOP_PAD: and grows by large pieces
    ):
        mallopt(option, value)
