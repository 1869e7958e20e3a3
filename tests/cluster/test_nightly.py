"""slurm/nightly.sh: the chain outlives nights that fail, and scores each checkpoint once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluating import add_snapshot, make_config, make_run

from .mini_slurm import MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
NAME = "dcgan-fid-nightly"
TESTS = Path(__file__).resolve().parents[1]


def test_a_chain_of_nights_some_of_which_fail(slurm: MiniSlurm, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "nights.out"
    # As a user exports them: the next nights take their options from SBATCH_*.
    env = {"NIGHTLY_AT": "now+4", "SBATCH_OUTPUT": str(output), "PYTHONPATH": str(TESTS)}

    def nights() -> list[str]:
        text = output.read_text() if output.exists() else ""
        return [line for line in text.splitlines() if "slurm: srun ended with" in line]

    def after(count: int) -> None:
        slurm.wait_until(lambda: len(nights()) >= count, f"{count} nights", every=0.05)

    def scored() -> list[int]:
        path = run / "evaluations.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    try:
        slurm.submit(output, "slurm/nightly.sh", "--run", str(run), **env)
        after(2)
        assert not any(night.endswith("with 0") for night in nights()), output.read_text()
        make_run(tmp_path)
        slurm.wait_until(lambda: any(n.endswith("with 0") for n in nights()), "a good night")
        assert scored() == [10, 20]
        add_snapshot(run, make_config(tmp_path), 30)
        slurm.wait_until(lambda: 30 in scored(), "the new checkpoint's score")
        after(len(nights()) + 1)
        assert scored() == [10, 20, 30]
        slurm.wait_until(lambda: queued(slurm) == 1, "successor")
    finally:
        slurm.ask("scancel", "-n", NAME)
        print(output.read_text())
    slurm.wait_until(lambda: not slurm.ask("squeue", "-h", "-n", NAME), "end of the chain")
    count = len(nights())
    assert count >= 4


def queued(slurm: MiniSlurm) -> int:
    pending = slurm.ask("squeue", "-h", "-n", NAME, "-t", "PENDING", "-o", "%A").split()
    assert len(pending) <= 1, pending
    return len(pending)
