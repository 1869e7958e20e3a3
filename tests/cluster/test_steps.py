"""What a step gets: all CPUs and GPUs of the job on a node, whatever users ask for and export."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import REPO

from .conftest import Program
from .mini_slurm import MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
both_versions = pytest.mark.both_versions

# In Python's place: name the run folder, then say what a training would have got.
REPORT = """#!/bin/bash
if [ "$1" = -c ]; then echo "{run}"; exit; fi
echo "$SLURMD_NODENAME: $SLURM_CPUS_ON_NODE cpus, gpus <$SLURM_STEP_GPUS>, $PWD," \
  "$SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes, $OMP_NUM_THREADS threads"
env | grep -E "^(SITE|TORCH_NCCL)_" | sort
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


@pytest.fixture
def report(tmp_path: Path) -> str:
    """A program in Python's place: it trains nothing, and says what it was given."""
    run, path = tmp_path / "run", tmp_path / "report"
    run.mkdir()
    path.write_text(REPORT.format(run=run))
    path.chmod(0o755)
    return str(path)


@both_versions
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_gets_all_of_its_node(
    slurm: MiniSlurm, tmp_path: Path, report: str, case: Case
) -> None:
    options, env, cpus, gpus, threads = case
    output = tmp_path / "out"
    words = ["--partition=wide", "--nodes=2", *options.split(), "slurm/train.sh"]
    env = env | {"PYTHON": report, "OMP_NUM_THREADS": ""}
    slurm.wait(slurm.submit(output, *words, **env), "COMPLETED")
    for node in ("w1", "w2"):
        got = f"{node}: {cpus} cpus, gpus <{gpus}>, {REPO}, 2 tasks on 2 nodes, {threads} threads"
        assert got in output.read_text()


@both_versions
def test_gpus_that_differ_from_node_to_node_are_refused(slurm: MiniSlurm, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["--nodes=2", "--gpus=3", "slurm/train.sh"]
    slurm.wait(slurm.submit(output, *words), "FAILED")
    assert "the nodes have different numbers of GPUs for this job (1, 2)" in output.read_text()


@both_versions
def test_an_srun_that_refuses_is_no_lost_node(slurm: MiniSlurm, tmp_path: Path) -> None:
    """A requeue would not help: the job ends, with srun's error and one line."""
    output = tmp_path / "out"
    job = slurm.submit(output, "--nodes=2", "slurm/train.sh", SLURM_MPI_TYPE="nonsense")
    found = slurm.wait(job, "FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0")
    assert "nonsense" in output.read_text()
    assert output.read_text().count("srun refuses what it is asked for") == 1
    assert "requeue at" not in output.read_text()


def test_gpus_that_slurm_does_not_count(
    slurm: MiniSlurm, tmp_path: Path, report: str, program: Program, path: str
) -> None:
    """Such a node trains on its CPU only when told."""
    program("nvidia-smi", 'echo "GPU 0: A (UUID: a)"; echo "GPU 1: A (UUID: b)"')
    env = {"PATH": path, "PYTHON": report, "ACCELERATE_USE_CPU": ""}
    for script in ("train", "evaluate", "preflight"):
        output = tmp_path / script
        job = slurm.submit(output, "--nodes=2", f"slurm/{script}.sh", **env)
        assert slurm.wait(job, "FAILED")["ExitCode"] == "2:0"
        (line,) = output.read_text().splitlines()
        assert "n1 has 2 GPU(s), but Slurm gave this job none: ask for them with" in line
    for told in ({"GPUS_PER_NODE": "0"}, {"ACCELERATE_USE_CPU": "true"}):
        output = tmp_path / "told"
        job = slurm.submit(output, "--nodes=1", "slurm/train.sh", **(env | told))
        slurm.wait(job, "COMPLETED")
    given = slurm.submit(output, "--gpus-per-node=1", "slurm/train.sh", **env)
    slurm.wait(given, "COMPLETED")


def test_site_setup_is_sourced_on_each_node(slurm: MiniSlurm, tmp_path: Path, report: str) -> None:
    """Also a file that fails, prints, and changes the shell's options and arguments."""
    site, output = tmp_path / "site.sh", tmp_path / "out"
    site.write_text(
        "module() { export SITE_$1=$SLURMD_NODENAME; }\nwords=(LOADED); module ${words[0]}\n"
        "echo loading; set -u -- a b\nexport TORCH_NCCL_TRACE_BUFFER_SIZE=7\n[ -n '' ]\n"
    )
    env = {"PYTHON": report, "SITE_SETUP": str(site)}
    slurm.wait(slurm.submit(output, "--nodes=2", "slurm/train.sh", **env), "COMPLETED")
    said = output.read_text()
    assert "SITE_LOADED=n1" in said
    assert "SITE_LOADED=n2" in said
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE=7" in said
    assert f"TORCH_NCCL_DEBUG_INFO_TEMP_FILE={REPO}/slurm/logs/nccl-" in said
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT=1" in said


@pytest.mark.parametrize(
    ("text", "fault"), [(None, "not a file that can be read"), ("if true\n", "not a bash script")]
)
def test_a_site_setup_that_cannot_be_sourced(
    slurm: MiniSlurm, tmp_path: Path, text: str | None, fault: str
) -> None:
    site, output = tmp_path / "site.sh", tmp_path / "out"
    if text is not None:
        site.write_text(text)
    job = slurm.submit(output, "slurm/train.sh", SITE_SETUP=str(site))
    assert slurm.wait(job, "FAILED")["ExitCode"] == "2:0"
    assert f"SITE_SETUP ({site}): {fault}" in output.read_text()
