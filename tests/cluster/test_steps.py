"""What a step gets: all CPUs and GPUs of the job on each node, whatever the user asked for and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import REPO

from .mini_slurm import MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.both_versions]

# In Python's place: name the run folder, then say what a training would have got.
REPORT = """#!/bin/bash
if [ "$1" = -c ]; then echo "{run}"; exit; fi
echo "$SLURMD_NODENAME: $SLURM_CPUS_ON_NODE cpus, gpus <$SLURM_STEP_GPUS>, $PWD," \
  "$SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes, $OMP_NUM_THREADS threads"
touch "{run}/FINISHED"
"""
LEFT = {
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_TRES_PER_TASK": "cpu=1",
    "SRUN_CPUS_PER_TASK": "1",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_GPUS": "7",
    "SLURM_GPUS_ON_NODE": "7",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_TRES_BIND": "gres/gpu:per_task:1",
    "SLURM_CPUS_PER_GPU": "1",
    "SLURM_MEM_PER_CPU": "1",
    "SLURM_NPROCS": "9",
    "SLURM_NTASKS": "9",
    "SLURM_GRES": "gpu:1",
    "SLURM_WORKING_DIR": "/",
    "SLURM_STDOUTMODE": "none",
}
"""What the shell of another job has."""
CASES = {
    "tasks": ("--ntasks-per-node=2 --cpus-per-task=4", {}, 8, "", 8),
    "gpus per task": ("--ntasks=4 --gpus-per-task=1 --cpus-per-task=2", {}, 4, "0,1", 2),
    "tasks per gpu": ("--gpus=2 --ntasks-per-gpu=1", {}, 2, "0", 2),
    "cpus per gpu": ("--gpus-per-node=2 --cpus-per-gpu=2", {}, 4, "0,1", 2),
    "gres": ("--gres=gpu:2 --cpus-per-task=5", {}, 6, "0,1", 3),
    "cores": ("--hint=nomultithread --cpus-per-task=3", {}, 6, "", 3),
    "left": ("--ntasks-per-node=8", LEFT, 8, "", 8),
}
Case = tuple[str, dict[str, str], int, str, int]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_gets_all_of_its_node(slurm: MiniSlurm, tmp_path: Path, case: Case) -> None:
    options, env, cpus, gpus, threads = case
    report, output, run = tmp_path / "report", tmp_path / "out", tmp_path / "run"
    run.mkdir()
    report.write_text(REPORT.format(run=run))
    report.chmod(0o755)
    words = ["--partition=wide", "--nodes=2", *options.split(), "slurm/train.sh"]
    env = env | {"PYTHON": str(report), "OMP_NUM_THREADS": ""}
    slurm.wait(slurm.submit(output, *words, **env), "COMPLETED")
    for node in ("w1", "w2"):
        got = f"{node}: {cpus} cpus, gpus <{gpus}>, {REPO}, 2 tasks on 2 nodes, {threads} thr"
        assert got in output.read_text()


def test_gpus_that_differ_from_node_to_node_are_refused(slurm: MiniSlurm, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["--nodes=2", "--gpus=3", "slurm/train.sh"]
    slurm.wait(slurm.submit(output, *words), "FAILED")
    assert "the nodes have different numbers of GPUs for this job (1, 2)" in output.read_text()
