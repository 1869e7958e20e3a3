"""The other jobs as shipped: preflight, a grid of runs, a source packed by an array."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from launching import REPO, environment

from .conftest import Submit
from .mini_slurm import MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_preflight_finds_two_nodes_ready(
    slurm: MiniSlurm, tiny_config: Path, training_shards: Path, tmp_path: Path
) -> None:
    output, settings = tmp_path / "out", [f"data.shards={training_shards}"]
    settings += [f"run.dir={tmp_path / 'runs' / 'a'}"]
    words = ["--nodes=2", "slurm/preflight.sh", "--config", str(tiny_config), *settings]
    slurm.wait(slurm.submit(output, *words), "COMPLETED")
    said = output.read_text()
    print(said)
    assert said.endswith("READY\n")
    assert "the same on 2 nodes" in said
    assert "gloo: 64 MiB in" in said
    assert "331 samples in 3 shards" in said
    assert not (tmp_path / "runs").exists()


def test_preflight_stops_a_run_that_could_not_work(submit: Submit) -> None:
    job = submit("data.shards=nowhere", PREFLIGHT="1")
    job.wait("FAILED")
    assert job.log().rstrip().endswith("NOT READY: shards"), job.log()
    assert "no such folder" in job.log()
    assert "srun ended with" not in job.log()


def test_a_grid_of_runs(
    slurm: MiniSlurm, tiny_config: Path, training_shards: Path, tmp_path: Path
) -> None:
    grid = ["--config", str(tiny_config), f"data.shards={training_shards}", "train.total_steps=4"]
    grid += ["run.seed=0,1", "optim.g_lr=1e-3"]
    output = tmp_path / "%a.out"
    env = {"SWEEP_DIR": str(tmp_path / "sweep")}
    # The third task is beyond the grid and says so.
    job = slurm.submit(output, "--array=0-2", "slurm/sweep.sh", *grid, **env)
    slurm.wait_until(lambda: not slurm.ask("squeue", "-h", "-j", job), "end of the array")
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.out")}
    for seed in (0, 1):
        run = tmp_path / "sweep" / f"seed={seed}"
        assert (run / "FINISHED").exists(), said
        assert f"seed: {seed}" in (run / "config.yaml").read_text()
        assert "group: sweep" in (run / "config.yaml").read_text()
    assert "the grid has 2 combinations: sbatch --array=0-1" in said["2"]


def test_an_array_packs_one_set_though_a_task_is_killed(slurm: MiniSlurm, tmp_path: Path) -> None:
    source, out, whole = tmp_path / "images", tmp_path / "shards", tmp_path / "whole"
    write_images(source, 1500)
    words = [str(source), "--size", "64", "--format", "png", "--shard-mib", "0.4"]
    prepare = [sys.executable, "-m", "pipeline.prepare", *words]
    subprocess.run([*prepare, "--out", str(whole)], cwd=REPO, env=environment(), check=True)

    output = tmp_path / "%a.out"
    script = ["--array=0-1", "slurm/prepare.sh", *words, "--out", str(out), "--workers", "1"]
    job = slurm.submit(output, *script)
    slurm.wait_until(lambda: len(packing(task=0)) > 1, "worker of task 0", every=0.05)
    victims = packing(task=0)
    slurm.wait_until(lambda: len(packed_by(out, 0)) > 0, "shard of task 0", every=0.005)
    for process in victims:
        process.kill()
    assert not (out / "index.json").exists()
    slurm.wait_until((out / "index.json").exists, "index")
    slurm.wait_until(lambda: not slurm.ask("squeue", "-h", "-j", job), "end of the array")
    said = (tmp_path / "0.out").read_text()
    print(said)
    assert "srun ended with 137, job RUNNING" in said
    assert "part 0/2 of job" in said
    assert "restart 1" in said
    assert contents(out) == contents(whole)


def write_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(folder / f"{k:04d}.png")


def packed_by(out: Path, task: int) -> list[Path]:
    markers = (out / ".prepare").glob("shard-*.tar.json")
    return [path for path in markers if int(path.name[6:12]) % 2 == task]


def packing(task: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            env, words = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        if env.get("SLURM_ARRAY_TASK_ID") == str(task) and "pipeline.prepare" in words:
            found += [process] if "python" in process.name() else []
    return found
