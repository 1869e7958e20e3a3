"""The Dockerfile's CPU image, with a CPU build of PyTorch that this machine has as a wheel."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import CPU_IMAGE, DEMO, IMAGE, QUIET, Folders, steps

pytestmark = pytest.mark.container


def megabytes(folders: Folders, image: str) -> int:
    size = folders.docker.docker("image", "inspect", "--format", "{{.Size}}", image)
    return int(size) // 10**6


def test_the_cpu_image_has_no_library_of_gpus_and_trains(
    built: set[str], folders: Folders, data: Path
) -> None:
    if CPU_IMAGE not in built:
        pytest.skip("PIP_FIND_LINKS has no wheel torch-*+cpu-cp311-*.whl")
    cpu = replace(folders, image=CPU_IMAGE)
    listed = cpu.run("sh", "-c", "ls /opt/venv/lib/python3*/site-packages").stdout.split()
    assert [name for name in listed if re.match("nvidia|triton|cuda", name)] == []
    assert "accelerate" in listed
    said = cpu.run("python", "-c", "import torch; print(torch.__version__, torch.version.cuda)")
    assert said.stdout.split()[0].endswith("+cpu"), said.stdout
    assert said.stdout.split()[1] == "None"
    done = cpu.run(*DEMO, *QUIET, "train.total_steps=5", "train.log_every=1", "run.dir=/runs/cpu")
    assert done.returncode == 0, done.stdout
    assert steps(folders.runs / "cpu")[-1] == 5
    sizes = [megabytes(folders, name) for name in (IMAGE, CPU_IMAGE)]
    print("MB of the image and of the CPU image:", *sizes)
    assert sizes[1] < sizes[0] / 3
    parts = "du -sm /opt/venv/lib/python3*/site-packages/* | sort -rn | head -n 12"
    for one in (folders, cpu):
        print(one.run("sh", "-c", parts).stdout)
