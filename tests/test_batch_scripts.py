"""slurm/*.sh without Slurm: their help, and the step that a job would start."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import REPO

SCRIPTS = sorted(path.name for path in (REPO / "slurm").glob("*.sh") if path.name != "launch.sh")


def say(script: str, *words: str, cwd: Path = REPO, **env: str) -> list[str]:
    """The lines that a script prints outside of any job."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    for name in ("CONTAINER", "GPUS_PER_NODE", "NPROC_PER_NODE", "PYTHON", "OMP_NUM_THREADS"):
        clean.pop(name, None)
    done = subprocess.run(
        ["bash", f"slurm/{script}", *words],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_head_of_the_script(script: str, option: str) -> None:
    """What it does, then commands to copy; no comment signs and no options of sbatch."""
    lines = say(script, option)
    source = (REPO / "slurm" / script).read_text().splitlines()
    assert lines == [line[2:] for line in source[1 : len(lines) + 1]]
    assert source[len(lines) + 1].startswith("#SBATCH")
    assert any(f"slurm/{script}" in line for line in lines)


def test_a_dry_run_shows_one_process_on_this_machine(tmp_path: Path) -> None:
    """From a checkout without an environment; nothing is started and no file is made."""
    shutil.copytree(REPO / "slurm", tmp_path / "slurm")
    step, node = say("train.sh", "--dry-run", "run.dir=runs/a b", cwd=tmp_path)
    words = shlex.split(step)
    assert words[:4] == ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    ours = ["--config", "configs/dcgan_64.yaml", "run.dir=runs/a b"]
    assert words[-5:] == ["launch", "pipeline.train", *ours]
    assert (
        node == "node 0: python3 -m pipeline.train --config configs/dcgan_64.yaml run.dir=runs/a b"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]


def test_a_dry_run_shows_the_container_and_the_launcher_of_many_nodes() -> None:
    """Two nodes with eight GPUs each: the options of srun, of the engine and of accelerate."""
    size = {"SLURM_JOB_NUM_NODES": "2", "GPUS_PER_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "64"}
    image = {"CONTAINER": "apptainer", "IMAGE": "/x.sif", "MOUNTS": "/shared", "MASTER_ADDR": "n1"}
    step, node = say("train.sh", "--config", "configs/demo.yaml", "--dry-run", **size, **image)
    begin = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 --gpus-per-node=8 "
    assert step.startswith(begin)
    assert " apptainer exec --nv --bind /shared " in step
    assert node == (
        "node 0: python -m accelerate.commands.launch --multi_gpu --gpu_ids all --num_machines 2 "
        "--num_processes 16 --machine_rank 0 --main_process_ip n1 --main_process_port 20010 "
        "--mixed_precision no --dynamo_backend no -m pipeline.train --config configs/demo.yaml"
    )
