"""Choose how a process uses its hardware: precision, kernels, threads and memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.runtime.host import cores

PEAK_TFLOPS = {
    ("B200",): (2250.0, 1120.0),
    ("H200",): (989.0, 494.0),
    ("H100", "NVL"): (835.0, 417.0),
    ("H100", "PCIe"): (756.0, 378.0),
    ("H100",): (989.0, 494.0),
    ("A100",): (312.0, 156.0),
    ("L40S",): (362.0, 183.0),
    ("L4",): (121.0, 60.0),
    ("V100",): (125.0, 15.7),
    ("T4",): (65.0, 8.1),
}
"""TFLOP/s of NVIDIA's data sheets without sparsity, by words of a GPU's name: (bf16 or fp16, fp32).

Where the sheet states the speed with sparsity alone, this is half of it. fp32 is TF32 since Ampere,
as PyTorch computes convolutions.
"""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the TFLOP/s that a device can reach in ``fp32``, ``bf16`` or ``fp16``; None: unknown.

    It is unknown for a CPU, a GPU that is not in ``PEAK_TFLOPS``, and a part of a GPU (MIG).
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """Return ``peak_tflops`` of a GPU's name, e.g. ``NVIDIA A100-SXM4-80GB``."""
    words = set(name.replace("-", " ").split())
    known = (peaks for key, peaks in PEAK_TFLOPS.items() if words.issuperset(key))
    peaks = None if "MIG" in words else next(known, None)
    return peaks and peaks[precision == "fp32"]


def resolve_precision(precision: str) -> str:
    """Return the precision; ``auto`` becomes bf16 where the hardware has it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if native_bf16() else "fp32"


def native_bf16() -> bool:
    """Return whether the device of ``launch.make_accelerator`` multiplies bf16 in hardware."""
    if torch.cuda.is_available() and not cpu_requested():
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})


def cpu_requested() -> bool:
    """Return whether ACCELERATE_USE_CPU asks for the CPU, as Accelerate reads it."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def configure_kernels(device: torch.device, deterministic: bool, exact: bool = False) -> None:
    """Select deterministic kernels on a GPU, or let cuDNN choose the fastest by benchmark.

    Two benchmarks may choose different kernels, and some of the fastest add in the order in which
    threads arrive. On CPUs every kernel in use is deterministic for a given number of threads.

    Args:
        device: of this process.
        deterministic: select deterministic kernels.
        exact: ``train.exact_sum``: deterministic kernels, and one thread on a CPU, because kernels
            add up the parts of their threads.
    """
    deterministic = deterministic or exact
    if device.type != "cuda":
        if exact:
            torch.set_num_threads(1)
        return
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at first use
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def deterministic_fp32() -> Iterator[None]:
    """Compute in deterministic fp32: without TF32, bf16 products or cuDNN benchmarks.

    ``torch.backends.fp32_precision`` and its kin set the precision of whole libraries. What is set
    for single operators, as here, wins over them. The old switches (``allow_tf32``) do not.
    """
    cudnn: Any = torch.backends.cudnn
    products, mkldnn = torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn)
    operators: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, products, mkldnn.conv, mkldnn.matmul)
    before = [operator.fp32_precision for operator in operators]
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    for operator in operators:
        operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision


@contextmanager
def page_locked(memory: torch.Tensor) -> Iterator[None]:
    """Let the GPU of this process copy from host memory by itself; ``is_pinned`` is then True.

    No-op before CUDA is in use, as on a CPU. If the driver refuses, the memory stays as it is.
    """
    runtime = torch.cuda.cudart() if torch.cuda.is_initialized() else None
    if runtime is None:
        yield
        return
    refused = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if refused != runtime.cudaError.success:
        with suppress(RuntimeError):  # CUDA keeps an error for the next kernel, here this one
            torch.zeros((), device="cuda")
        yield
        return
    try:
        yield
    finally:
        torch.cuda.synchronize()  # a copy may be under way
        runtime.cudaHostUnregister(memory.data_ptr())


def use_all_cores() -> None:
    """Give this process its share of the cores if the launcher set OMP_NUM_THREADS=1 by default.

    accelerate launch, and torchrun with several processes, do so unless told otherwise, and leave
    the other cores idle. No-op if the user gave the launcher a number, in its environment or on
    its command line.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    words = [*launcher_words("environ"), *launcher_words("cmdline")]
    if not words or any("OMP_NUM_THREADS=" in word or "cpu_threads" in word for word in words):
        return
    torch.set_num_threads(max(1, cores() // local_world_size()))


def local_world_size() -> int:
    """Return the number of processes of this launch on this node, 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launcher_words(file: str) -> list[str]:
    """Return the words of the parent's ``cmdline`` or initial ``environ``; [] if unreadable."""
    try:
        return Path(f"/proc/{os.getppid()}/{file}").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks in the process, so that the next step can reuse them.

    By default glibc returns large blocks to the kernel. Each step then waits until the kernel has
    zeroed and mapped tens of thousands of pages again, mostly for the scratch buffers of the
    convolutions: 5 % of the time (benchmarks/README.md). No-op with another C library, or if the
    user tunes glibc with GLIBC_TUNABLES.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "GLIBC_TUNABLES" in os.environ:
        return
    for option, value in (
        (-4, 0),  # M_MMAP_MAX: no block gets a mapping of its own, which free() would unmap
        (-1, -1),  # M_TRIM_THRESHOLD: the heap never shrinks
        (-2, 256 << 20),  # M_TOP_PAD: the heap grows by 256 MiB at a time
    ):
        mallopt(option, value)
