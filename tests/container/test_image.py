"""The image works as user 1000, as docker/README.md describes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import IMAGE, Container, buildah, first_process

pytestmark = pytest.mark.container
DEMO = ["--config", "configs/demo.yaml", "data.shards=/data/fashion-mnist-32"]
QUIET = ["train.checkpoint_every=0", "train.log_every=10", "tracking.wandb=offline"]


@pytest.fixture(scope="module")
def data(container: Container) -> Path:
    done = container.pipeline(
        "prepare", "fashion-mnist", "--out", "/data/fashion-mnist-32", "--size", 32, "--channels", 1
    )
    if "/usr/share/datasets" in done.stdout and done.returncode:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout
    return container.data / "fashion-mnist-32"


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_image_holds_only_what_runs_need_and_its_code_is_read_only(
    container: Container,
) -> None:
    assert container.run("id", "-u").stdout.strip() == "1000"
    assert container.run("sh", "-c", "touch /workspace/x || touch /opt/venv/x").returncode != 0
    held = container.run("ls", "-A", "/workspace").stdout.split()
    expected = {"LICENSE", "README.md", "configs", "docker", "pipeline"}
    expected |= {"pyproject.toml", "requirements.txt"}
    assert {name for name in held if not name.endswith(".egg-info")} == expected
    print("image:", buildah("images", "--format", "{{.Size}}", IMAGE))
    # Users of an image cannot install libraries for shards from http, s3 or gs.
    assert container.run("python", "-c", "import gcsfs, s3fs").returncode == 0
    usage = container.pipeline()
    assert usage.returncode == 0
    assert "train --config" in usage.stdout
    assert container.pipeline("train", NNODES=2).returncode == 2


@pytest.mark.parametrize(("processes", "code"), [(1, 75), (2, 1)])
def test_sigterm_to_the_first_process_saves_and_the_same_command_goes_on(
    container: Container, data: Path, processes: int, code: int
) -> None:
    run = container.work / f"on-{processes}"
    words = ["/workspace/docker/entrypoint.sh", "train", *DEMO, *QUIET, f"run.dir=/runs/{run.name}"]
    many = container.words(*words, "train.total_steps=100000", NPROC_PER_NODE=processes)
    started = subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or not steps(run):
            assert started.poll() is None, started.communicate()[0]
            assert time.monotonic() < deadline, "no step within 300 s"
            time.sleep(0.2)
        asked = time.monotonic()
        first_process(started).send_signal(signal.SIGTERM)
        output, _ = started.communicate(timeout=120)
    finally:
        started.kill()
    print(
        f"{processes} processes: exit {started.returncode} {time.monotonic() - asked:.1f} s later"
    )
    print(output)
    assert started.returncode == code, output
    stopped = int((run / "PREEMPTED").read_text().split()[0])
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{stopped:08d}"]

    total = f"train.total_steps={stopped + 10}"
    done = container.run(*words, total, NPROC_PER_NODE=processes)
    assert done.returncode == 0, done.stdout
    assert (run / "FINISHED").exists()
    assert not (run / "PREEMPTED").exists()
    assert steps(run)[-1] == stopped + 10
    assert (run / "FINISHED").stat().st_uid == 1000


def test_a_checkpoint_is_evaluated_in_the_image(container: Container, data: Path) -> None:
    done = container.pipeline("train", *DEMO, *QUIET, "run.dir=/runs/e", "train.total_steps=10")
    assert done.returncode == 0, done.stdout
    done = container.pipeline("evaluate", "--run", "/runs/e", "tracking.wandb=disabled")
    assert done.returncode == 0, done.stdout
    rows = (container.work / "e" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 10
