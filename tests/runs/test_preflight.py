"""The doctor's table on real processes: everything fine, and each thing that is not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from launching import REPO, environment
from ranks import on_ranks

from pipeline.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.runs import preflight
from pipeline.runs.disk_use import checkpoint_bytes
from pipeline.runs.preflight import Finding, examine, table
from pipeline.runtime import launch

pytestmark = pytest.mark.slow
MODEL = ModelConfig(image_size=32, channels=1, ngf=8, ndf=8)


def doctor(*words: str, **env: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "pipeline.doctor", *words]
    done = subprocess.run(
        command, cwd=REPO, env=environment() | env, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_one_process_is_ready_and_leaves_nothing(
    tiny_config: Path, training_shards: Path, tmp_path: Path
) -> None:
    settings = [f"data.shards={training_shards}", f"run.dir={tmp_path / 'a' / 'b'}"]
    code, said, complaints = doctor("--config", str(tiny_config), *settings)
    assert (code, complaints) == (0, "")
    assert said.splitlines()[-1] == "READY"
    checks = [line.split("  ")[0] for line in said.splitlines()[:-1]]
    assert checks == [
        *("software", "devices", "batch", "all-reduce", "stop requests", "clocks", "run folder"),
        *("shards", "disk", "W&B"),
    ]
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_named_and_the_exit_code_says_so(
    tiny_config: Path, tmp_path: Path
) -> None:
    """A run folder below a file, on a file system without room; no shards."""
    settings = [f"data.shards={tmp_path / 'none'}", "run.dir=/proc/version/run"]
    code, said, complaints = doctor("--config", str(tiny_config), *settings)
    assert (code, complaints) == (1, "")
    assert "run.dir (/proc/version/run)" in said
    assert f"{tmp_path / 'none'}" in said
    assert said.splitlines()[-1] == "NOT READY: run folder, shards, disk"


def test_a_mistake_in_the_command_is_one_message(tiny_config: Path) -> None:
    code, said, complaints = doctor("--config", str(tiny_config), "train.total_stepz=1")
    assert (code, said) == (2, "")
    assert "did you mean train.total_steps?" in complaints


@pytest.mark.faults
def test_gpus_that_were_allocated_and_are_not_seen_are_named(tiny_config: Path) -> None:
    """With the reason that PyTorch has; not a table of a CPU that is fit for training."""
    code, said, complaints = doctor("--config", str(tiny_config), GPUS_PER_NODE="8")
    assert (code, complaints) == (1, "")
    assert "devices  FAILED  GPUS_PER_NODE (8): PyTorch" in said
    assert f"sees 0 on {socket.gethostname()} (" in said
    assert said.splitlines()[-1] == "NOT READY: devices"


def two_ranks_look(folder: str, shards: str) -> None:
    """Rank 1 calls itself another node, sees another run folder and another set of shards; its
    host name leads to an interface that it does not have, and its precision is another one.
    """
    preflight.VISIBLE_SECONDS = 1.0
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    accelerator = launch.make_accelerator("fp32")
    for name, runs, data in (
        ("fine", f"{folder}/runs", shards),
        ("apart", f"{folder}/runs-{rank}", f"{folder}/shards-{rank}"),
    ):
        config = Config(
            run=RunConfig(dir=runs),
            model=MODEL,
            data=DataConfig(shards=data, batch_size=33 if name == "apart" else 32),
        )
        precision = "fp32"
        if name == "apart":
            preflight.GLOO_SECONDS = 2.0  # how long rank 0 waits in vain
        if name == "apart" and rank == 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "absent"
            precision = "bf16"
        found = examine(config, accelerator, precision)
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(found))


def test_two_nodes_that_do_not_share_what_they_should(
    training_shards: Path, make_shards, tmp_path: Path
) -> None:
    make_shards(tmp_path / "shards-0", [4, 4], (32, 32, 1))
    make_shards(tmp_path / "shards-1", [5, 4], (32, 32, 1))
    on_ranks(2, two_ranks_look, str(tmp_path), str(training_shards))

    def found(name: str) -> dict[str, Finding]:
        rows = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]], "ranks disagree"
        return {row[0]: Finding(*row) for row in rows[0]}

    fine, apart = found("fine"), found("apart")
    assert {f.verdict for f in fine.values()} <= {"ok", "note"}, fine
    assert "the same on 2 nodes" in fine["software"].detail
    assert "gloo: 64 MiB in" in fine["all-reduce"].detail
    assert "gloo: agreed in" in fine["stop requests"].detail
    assert "seen by all processes" in fine["run folder"].detail
    assert not (tmp_path / "runs").exists()

    assert apart["run folder"].verdict == "FAILED"
    assert "n0: files from n1 are not seen: not a shared folder" in apart["run folder"].detail
    assert apart["shards"].verdict == "FAILED"
    assert "differs between nodes" in apart["shards"].detail
    assert apart["batch"].verdict == "FAILED"
    assert "data.batch_size (33) must be divisible" in apart["batch"].detail
    assert apart["devices"].verdict == "FAILED"
    assert "train.precision (auto) differs" in apart["devices"].detail
    assert apart["stop requests"].verdict == "FAILED"
    assert "n1: " in apart["stop requests"].detail
    assert "set GLOO_SOCKET_IFNAME" in apart["stop requests"].detail


def test_the_room_that_checkpoints_need() -> None:
    """Of real files: three networks and four moments; a kept one each time, one G a snapshot."""
    config = Config(model=MODEL, train=TrainConfig(total_steps=100, checkpoint_every=10, keep=2))
    total, one = checkpoint_bytes(config)
    g = 100 * 32 * 16 + 32 * 16 * 16 + 16 * 8 * 16 + 8 * 16 + 2 * (32 + 16 + 8)
    d = 8 * 16 + 8 * 16 * 16 + 16 * 32 * 16 + 32 * 16 + 2 * (16 + 32)
    assert one == 4 * (2 * g + d) + 8 * (g + d)
    assert total == 2 * one + 10 * 4 * g


def test_a_run_that_goes_on_needs_room_for_the_rest_only(
    training_shards: Path, tmp_path: Path
) -> None:
    """A run twice as large as the disk, of which all is written but one checkpoint."""
    free = shutil.disk_usage(tmp_path).free
    steps = 2 * free // checkpoint_bytes(Config(model=MODEL, train=TrainConfig(total_steps=0)))[1]
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        model=MODEL,
        data=DataConfig(shards=str(training_shards)),
        train=TrainConfig(total_steps=steps, checkpoint_every=0, keep_every=1),
    )
    whole, one = checkpoint_bytes(config)
    verdicts = []
    for written in (0, whole - one):
        held = tmp_path / "run" / "checkpoints" / "step_1" / "G.safetensors"
        held.parent.mkdir(parents=True, exist_ok=True)
        with held.open("w") as file:
            file.truncate(written)  # a hole: takes no room
        (disk,) = preflight._disk_space(Accelerator(cpu=True), config, None)
        verdicts.append(disk.verdict)
    assert verdicts == ["FAILED", "ok"]


def test_the_table_ends_with_the_verdict() -> None:
    rows = [Finding("disk", "ok", "much"), Finding("shards", "FAILED", "gone\nfor good")]
    assert table(rows) == (
        "disk    ok      much\nshards  FAILED  gone\n                for good\nNOT READY: shards"
    )
