"""How a command ends: one message and exit code 2 for what a user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import command, environment

ENDING = """
import sys
from pipeline.runtime.errors import exit_on_user_error
with exit_on_user_error("Lower it."):
    assert "torch" not in sys.modules
    {body}
"""


def ended(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ENDING.format(body=body)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("bytearray(2**62)", "no more memory for Python"),
        ("import numpy; numpy.zeros(2**50)", "Unable to allocate 8.00 PiB"),
        ("import torch; torch.empty(2**58)", "DefaultCPUAllocator: can't allocate memory"),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory')", "CUDA out of memory"),
    ],
)
def test_out_of_memory_is_one_message(body: str, detail: str) -> None:
    """Of Python, NumPy, PyTorch on a CPU and (raised by hand: no GPU here) on a GPU."""
    done = ended(body)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out of memory: ")
    assert detail in done.stderr
    assert done.stderr.endswith(" Lower it. (docs/troubleshooting.md#out-of-memory)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('/nowhere/x')", "/nowhere/x: No such file or directory: Mend it"),
        ("open('/dev/full', 'w', 1).write('line\\n')", "No space left on device: Make room"),
        ("raise OSError('a library said so')", "a library said so"),
        ("raise RuntimeError('DataLoader worker (pid 7) is killed')", "data.workers"),
    ],
)
def test_what_the_machine_causes_is_one_message(body: str, message: str) -> None:
    """Wherever it happens: with the file, the reason and what to do."""
    done = ended(body)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


def test_another_fault_keeps_its_traceback() -> None:
    """It is ours."""
    done = ended("raise RuntimeError('illegal memory access')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
@pytest.mark.faults
def test_networks_too_large_for_the_machine_end_the_training_with_advice(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """A layer of two terabytes, in 64 GiB of address space: the setting to lower is named."""
    wide = command(1, tiny_config, *training_settings, f"run.dir={tmp_path}", "model.ngf=65536")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 67108864 && exec "$@"', "sh", *wide],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "more than the " in done.stderr
    assert "error: model.ngf (65536), " in done.stderr
