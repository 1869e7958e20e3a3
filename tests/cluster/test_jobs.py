"""The other Slurm jobs, unchanged: preflight, a grid of runs, a source packed by an array."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from evaluating import TINY, make_run
from launching import REPO, environment

from .conftest import Program, Submit
from .mini_slurm import TIMEOUT, MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_preflight_finds_two_nodes_ready(
    slurm: MiniSlurm, tiny_config: Path, training_shards: Path, program: Program, tmp_path: Path
) -> None:
    """Under salloc, also when NCCL or a wrapper prints more lines after the table."""
    program("chatty", f'{sys.executable} "$@"; status=$?; echo "INFO destroyed"; exit $status')
    settings = [f"data.shards={training_shards}", f"run.dir={tmp_path / 'runs' / 'a'}"]
    words = ["salloc", "--nodes=2", "bash", "slurm/preflight.sh", "--config", str(tiny_config)]
    env = slurm.env | {"PYTHON": str(tmp_path / "bin" / "chatty")}
    done = subprocess.run(
        [*words, *settings], env=env, cwd=REPO, timeout=TIMEOUT, stdout=subprocess.PIPE, text=True
    )
    said = done.stdout
    print(said)
    assert done.returncode == 0
    assert said.index("\nREADY\n") < said.rindex("INFO destroyed")
    assert "the same on 2 nodes" in said
    assert "gloo: 64 MiB in" in said
    assert "331 samples in 3 shards" in said
    assert not (tmp_path / "runs").exists()


def test_preflight_knows_a_mistake_from_a_cluster_that_is_not_ready(
    slurm: MiniSlurm, tiny_config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ["slurm/preflight.sh", "--config", str(tiny_config), "data.shardz=a"]
    found = slurm.wait(slurm.submit(output, *words), "FAILED")
    assert found["ExitCode"] == "2:0"
    assert "unknown key; did you mean data.shards?" in output.read_text()
    assert "READY" not in output.read_text()


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
    # The index of the third task is beyond the grid.
    job = slurm.submit(output, "--array=0-2", "slurm/sweep.sh", *grid, **env)
    slurm.wait_until(lambda: not slurm.ask("squeue", "-h", "-j", job), "end of the array")
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.out")}
    for seed in (0, 1):
        run = tmp_path / "sweep" / f"seed={seed}"
        assert (run / "FINISHED").exists(), said
        assert f"seed: {seed}" in (run / "config.yaml").read_text()
        assert "group: sweep" in (run / "config.yaml").read_text()
    assert "the grid has 2 combinations: sbatch --array=0-1" in said["2"]


def test_a_sweep_of_wandb(slurm: MiniSlurm, training_shards: Path, tmp_path: Path) -> None:
    """Each task is an agent. A package in place of wandb starts one run as wandb's agent does."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(AGENT)
    trial = [f"data.shards={training_shards}", "model.image_size=32", "model.channels=1"]
    trial += ["model.ngf=8", "model.ndf=8", "data.batch_size=32", "train.total_steps=2"]
    trial += ["train.precision=fp32", "tracking.wandb=disabled", "eval.metrics=[kid]"]
    trial += ["eval.extractor=efficientnet-lite0", "eval.num_images=20", "eval.reference_images=20"]
    trial += [f"eval.cache_dir={tmp_path / 'references'}"]
    env = {"SWEEP_ID": "me/dcgan/4f7c2a1b", "SWEEP_DIR": str(tmp_path / "sweep")}
    env |= {"PYTHONPATH": str(package.parent), "TRIAL": " ".join(trial)}
    job = slurm.submit(tmp_path / "%a.out", "--array=3-4", "slurm/sweep.sh", **env)
    slurm.wait_until(lambda: not slurm.ask("squeue", "-h", "-j", job), "end of the array")
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.out")}
    assert len(said) == 2
    for task, text in said.items():
        assert "agent of: agent --count 1 me/dcgan/4f7c2a1b" in text
        assert (tmp_path / "sweep" / f"run{task}" / "FINISHED").exists(), text
        assert (tmp_path / "sweep" / f"run{task}" / "evaluations.jsonl").exists(), text


AGENT = """
import os, subprocess, sys, yaml
print("agent of:", *sys.argv[1:], flush=True)
sweep = yaml.safe_load(open("configs/sweep.yaml"))
macros = {"env": ["/usr/bin/env"], "program": [sweep["program"]]}
macros["args_no_hyphens"] = os.environ["TRIAL"].split()
words = []
for word in sweep["command"]:
    macro = word.startswith("${") and word.endswith("}")
    words += macros[word[2:-1]] if macro else [word]
run_id = "run" + os.environ["SLURM_ARRAY_TASK_ID"]
env = os.environ | {"WANDB_RUN_ID": run_id, "WANDB_SWEEP_ID": "s"}
sys.exit(subprocess.call(words, env=env))
"""


def test_an_array_packs_one_set_though_tasks_are_stopped(slurm: MiniSlurm, tmp_path: Path) -> None:
    """One task is killed; the last, whose job id is the array's, gets SIGTERM as at its limit."""
    source, out, whole = tmp_path / "images", tmp_path / "shards", tmp_path / "whole"
    write_images(source, 3000)
    words = [str(source), "--size", "64", "--format", "png", "--shard-mib", "0.4"]
    prepare = [sys.executable, "-m", "pipeline.prepare", *words]
    subprocess.run([*prepare, "--out", str(whole)], cwd=REPO, env=environment(), check=True)

    script = ["slurm/prepare.sh", *words, "--out", str(out), "--workers", "1"]
    refused = slurm.submit(tmp_path / "list.out", "--array=0,2,3", *script)
    job = slurm.submit(tmp_path / "%a.out", "--array=0-2:2", *script)
    for task, part, stop in ((0, 0, signal.SIGKILL), (2, 1, signal.SIGTERM)):
        slurm.wait_until(lambda t=task: len(packing(t)) > 1, f"worker of task {task}", every=0.05)  # type: ignore[misc]
        victims = packing(task)
        slurm.wait_until(lambda p=part: len(packed_by(out, p)) > 0, "its shard", every=0.005)  # type: ignore[misc]
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(stop)
    assert not (out / "index.json").exists()
    slurm.wait_until((out / "index.json").exists, "index")
    slurm.wait_until(lambda: not slurm.ask("squeue", "-h", "-j", job), "end of the array")
    said = {task: (tmp_path / f"{task}.out").read_text() for task in (0, 2)}
    print(*said.values())
    assert "srun ended with 137, job RUNNING" in said[0]
    assert "srun ended with 143, job RUNNING" in said[2]
    for task, part in ((0, "0/2"), (2, "1/2")):
        assert f"part {part} of job {job}, restart 0" in said[task]
        assert f"part {part} of job {job}, restart 1" in said[task]
    assert contents(out) == contents(whole)
    assert "must be a range" in (tmp_path / "list.out").read_text()
    assert refused


def test_an_evaluation_that_follows_a_run_survives_its_time_limit(
    slurm: MiniSlurm, tmp_path: Path
) -> None:
    """On two processes with RUN_DIR. The command ``reference`` takes its own arguments."""
    run, output = make_run(tmp_path), tmp_path / "out"
    env = {"RUN_DIR": str(run), "NPROC_PER_NODE": "2", "PYTHONPATH": str(REPO / "tests")}
    ask = f"eval.extractor={TINY}"
    job = slurm.submit(output, "slurm/evaluate.sh", "--watch", "--every", "1", ask, **env)
    rows = run / "evaluations.jsonl"
    slurm.wait_until(lambda: rows.exists() and len(rows.read_text().splitlines()) == 2, "scores")
    slurm.ask("scancel", "--signal=USR2", job)  # to the ranks and their launcher, as at the limit
    slurm.wait_until(lambda: slurm.restarts(job) == 1, "requeue")
    (run / "FINISHED").write_text("20\n")
    found = slurm.wait(job, "COMPLETED")
    print(output.read_text())
    assert found["Restarts"] == "1"
    assert "2 process(es) on n" in output.read_text()
    assert len(rows.read_text().splitlines()) == 2

    words = ["reference", "--run", str(run), "--out", str(tmp_path / "reference.npz"), ask]
    slurm.wait(slurm.submit(output, "slurm/evaluate.sh", *words, **env), "COMPLETED")
    assert (tmp_path / "reference.npz").exists()


def test_ci_fails_without_slurm(tmp_path: Path) -> None:
    words = ["-m", "pytest", "-q", "-m", "cluster", "-k", "mistake_in", "-p", "no:cacheprovider"]
    env = environment() | {"PATH": str(tmp_path)}
    codes = {}
    for need in ("", "1"):
        done = subprocess.run(
            [sys.executable, *words, str(REPO / "tests/cluster/test_train.py")],
            cwd=REPO,
            env=env | {"NEED_SLURM": need},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert "Slurm is not installed" in done.stdout, done.stdout
        codes[need] = done.returncode
    assert codes == {"": 0, "1": 1}


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
