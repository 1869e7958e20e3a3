"""The image's entry point, run by a shell with programs in place of python and nvidia-smi."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from launching import REPO

SAY = """#!/bin/sh
echo "$@"
echo "$GPUS_PER_NODE ${ACCELERATE_USE_CPU:-no}"
"""
GPUS = """#!/bin/sh
echo "GPU 0: NVIDIA A"
echo "  MIG 1g.5gb Device 0: (UUID: x)"
echo "GPU 1: NVIDIA A"
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH: `python` prints its arguments, `nvidia-smi` lists two GPUs."""
    for name, content in (("python", SAY), ("nvidia-smi", GPUS)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def enter(programs: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{programs}:{os.defpath}"}
    entry = REPO / "docker" / "entrypoint.sh"
    return subprocess.run([entry, *words], env=path | env, capture_output=True, text=True)


def test_one_process_per_gpu_and_the_number_of_gpus_is_passed_on(programs: Path) -> None:
    """--gpu_ids all overrides GPUs named in the user's configuration of accelerate."""
    words, facts = enter(programs, "train", "--config", "x").stdout.splitlines()
    assert words.startswith("-m accelerate.commands.launch --multi_gpu")
    assert "--num_machines 1 --num_processes 2 --machine_rank 0" in words
    assert "--gpu_ids all" in words
    assert words.endswith("-m pipeline.train --config x")
    assert facts == "2 no"


@pytest.mark.parametrize("env", [{}, {"GPUS_PER_NODE": "0"}], ids=["none seen", "by wish"])
def test_without_gpus_one_python_computes_on_the_cpu(programs: Path, env: dict[str, str]) -> None:
    if not env:
        (programs / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found\nexit 9\n")
    said = enter(programs, "evaluate", "--run", "x", **env).stdout.splitlines()
    assert said == ["-m pipeline.evaluate --run x", "0 true"]


@pytest.mark.parametrize("command", ["prepare", "generate"])
def test_a_command_without_ranks_is_one_python_on_any_machine(programs: Path, command: str) -> None:
    words, facts = enter(programs, command, "a b", "--out", "x").stdout.splitlines()
    assert words == f"-m pipeline.{command} a b --out x"
    assert facts == " no"  # nothing was counted


def test_of_several_nodes_each_needs_its_number_and_the_address_of_node_0(programs: Path) -> None:
    """Without both, each node would take itself for node 0 and wait for the others forever."""
    number, address = {"NODE_RANK": "1"}, {"MASTER_ADDR": "10.0.0.1"}
    for env, missing in ((number, "MASTER_ADDR (missing)"), (address, "NODE_RANK (missing)")):
        done = enter(programs, "train", NNODES="2", **env)
        assert done.returncode == 2
        assert not done.stdout
        assert missing in done.stderr
    words = enter(programs, "train", NNODES="2", **number, **address).stdout
    assert "--num_machines 2 --num_processes 4 --machine_rank 1 --main_process_ip 10.0.0.1" in words
