"""The image works as user 1000, as docker/README.md describes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from .conftest import DEMO, QUIET, Folders, steps, wait_for_step

pytestmark = pytest.mark.container


def test_the_image_holds_only_what_runs_need_and_its_code_is_read_only(folders: Folders) -> None:
    assert folders.run("id", "-u").stdout.strip() == "1000"
    assert folders.run("sh", "-c", "touch /workspace/x || touch /opt/venv/x").returncode != 0
    held = folders.run("ls", "-A", "/workspace").stdout.split()
    expected = {"LICENSE", "README.md", "configs", "docker", "pipeline"}
    expected |= {"pyproject.toml", "requirements.txt"}
    assert {name for name in held if not name.endswith(".egg-info")} == expected
    # Users of an image cannot install libraries for shards from http, s3 or gs.
    assert folders.run("python", "-c", "import gcsfs, s3fs").returncode == 0
    usage = folders.run()
    assert usage.returncode == 0
    assert "train --config" in usage.stdout
    assert folders.run("train", NNODES=2).returncode == 2


# With --init the engine's own small program is the first process, as in docker/README.md; without,
# as on Kubernetes, Python or the launcher is.
@pytest.mark.parametrize(
    ("processes", "code", "options"), [(1, 75, ["--init"]), (2, 1, ["--init"]), (2, 1, [])]
)
def test_docker_stop_saves_and_the_same_command_goes_on(
    folders: Folders, data: Path, processes: int, code: int, options: list[str]
) -> None:
    run = folders.runs / f"on-{processes}-{len(options)}"
    words = [*DEMO, *QUIET, f"run.dir=/runs/{run.name}"]
    options = [*options, f"--cpuset-cpus=0-{processes - 1}"]
    total = "train.total_steps=100000"
    with folders.started(
        "stopped", *words, total, options=options, NPROC_PER_NODE=processes
    ) as one:
        wait_for_step(run, one)
        asked = time.monotonic()
        folders.docker.docker("stop", "--time", 120, one.name)
        took, found, log = time.monotonic() - asked, one.wait(), one.log()
    print(f"{processes} processes, {options}: exit {found} {took:.1f} s after docker stop\n{log}")
    assert found == code, log
    stopped = int((run / "PREEMPTED").read_text().split()[0])
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{stopped:08d}"]

    total = f"train.total_steps={stopped + 10}"
    done = folders.run(*words, total, options=options, NPROC_PER_NODE=processes)
    assert done.returncode == 0, done.stdout
    assert (run / "FINISHED").exists()
    assert not (run / "PREEMPTED").exists()
    assert steps(run)[-1] == stopped + 10
    assert (run / "FINISHED").stat().st_uid == 1000


def test_a_checkpoint_is_evaluated_in_the_image(folders: Folders, data: Path) -> None:
    done = folders.run(*DEMO, *QUIET, "run.dir=/runs/e", "train.total_steps=10")
    assert done.returncode == 0, done.stdout
    done = folders.run("evaluate", "--run", "/runs/e", "tracking.wandb=disabled")
    assert done.returncode == 0, done.stdout
    rows = (folders.runs / "e" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 10
