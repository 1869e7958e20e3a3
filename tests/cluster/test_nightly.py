"""slurm/nightly.sh: failed nights do not end the chain; each checkpoint is scored once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from evaluating import TINY, add_snapshot, make_config, make_run
from launching import REPO

from pipeline.runs.results import read_rows

from .conftest import Program
from .mini_slurm import MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
NAME = "dcgan-fid-nightly"
TESTS = Path(__file__).resolve().parents[1]


def test_a_chain_of_nights_some_of_which_fail(slurm: MiniSlurm, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "nights.out"
    env = {"NIGHTLY_AT": "now+4", "SBATCH_OUTPUT": str(output), "PYTHONPATH": str(TESTS)}
    env |= {"ACCELERATE_USE_CPU": "true", "SLURM_OF_TONIGHT": "1", "SBATCH_GPUS_PER_NODE": "1"}
    options = ("--time=7", "--cpus-per-task=1", "--mem=100")

    def nights() -> list[str]:
        text = output.read_text() if output.exists() else ""
        return [line for line in text.splitlines() if "slurm: srun ended with" in line]

    def after(count: int) -> None:
        slurm.wait_until(lambda: len(nights()) >= count, f"{count} nights", every=0.05)

    def scored() -> list[int]:
        return [row["step"] for row in read_rows(run)]

    def ended() -> bool:  # a night that has just begun may submit the next after scancel
        slurm.ask("scancel", "-n", NAME)
        return not slurm.ask("squeue", "-h", "-n", NAME)

    try:
        words = ("slurm/nightly.sh", "--run", str(run), f"eval.extractor={TINY}")
        slurm.submit(output, *options, *words, **env)
        after(2)
        assert not any(" with 0" in night for night in nights()), output.read_text()
        make_run(tmp_path)
        slurm.wait_until(lambda: any(" with 0" in n for n in nights()), "a good night")
        assert scored() == [10, 20]
        add_snapshot(run, make_config(tmp_path), 30)
        slurm.wait_until(lambda: 30 in scored(), "the new checkpoint's score")
        after(len(nights()) + 1)
        assert scored() == [10, 20, 30]
        successor = newest(slurm)
        # Every night has the options of the first, but not its SLURM_* variables.
        found = slurm.show(successor)
        assert found["TimeLimit"] == "00:07:00"
        assert found["TresPerNode"] == "gres:gpu:1"
        assert found["CPUs/Task"] == "1"
        assert found["MinMemoryNode"] == "100M"
        kept = environment_of(slurm, successor)
        assert "NIGHTLY_AT" in kept
        assert "SLURM_OF_TONIGHT" not in kept
    finally:
        slurm.wait_until(ended, "end of the chain")
        print(output.read_text())
    count = len(nights())
    assert count >= 4


def newest(slurm: MiniSlurm) -> str:
    """Return the job of the last night, which is pending or has just begun."""
    jobs = slurm.ask("squeue", "-h", "-n", NAME, "-o", "%A %T").splitlines()
    assert jobs, "the series has ended"
    assert sum("PENDING" in job for job in jobs) <= 1, jobs
    return max((job.split()[0] for job in jobs), key=int)


def environment_of(slurm: MiniSlurm, job: str) -> str:
    """Return the environment that the controller stores for a job."""
    folders = slurm.dir.glob(f"state/hash.*/job.{job}/environment")
    return "".join(path.read_bytes().decode() for path in folders)


def test_a_series_that_ends_says_so(program: Program, path: str) -> None:
    """If sbatch fails five times, the night still evaluates and the log says NO NEXT NIGHT."""
    for name, script in {"squeue": "", "sleep": "", "sbatch": "exit 1"}.items():
        program(name, script)
    env = {"PATH": path, "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": NAME, "SLURM_JOB_PARTITION": "a"}
    done = subprocess.run(
        ["bash", "slurm/nightly.sh"], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert "NO NEXT NIGHT: submit slurm/nightly.sh again" in done.stdout
    assert "not in a Slurm job" in done.stdout  # evaluate.sh, afterwards


def test_outside_a_job_no_night_is_submitted(program: Program, path: str) -> None:
    """The message comes at once: sbatch is not called, and called again after a pause."""
    program("sbatch", "echo submitted")
    done = subprocess.run(
        ["bash", "slurm/nightly.sh"], cwd=REPO, env={"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "not in a Slurm job" in done.stdout
    assert "submitted" not in done.stdout
