"""The real command, in real processes: resume, elasticity, signals. No part of it is replaced."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import CountingServer
from launching import (
    REPO,
    assert_bitwise_equal,
    environment,
    ids_by_step,
    kill,
    kill_at_step,
    largest_difference,
    rank_process,
    run,
    started,
    state_of,
    train,
)
from PIL import Image

from pipeline.data.shards import Index
from pipeline.runs.step_folders import committed, step_of

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_config: Path, training_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """A run of STEPS steps that nothing disturbed, on one and on two processes."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp("whole") / f"on_{processes}"
        train(processes, tiny_config, *training_settings, f"run.dir={folders[processes]}")
    return folders


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_steps_ends_bitwise_equal(
    processes: int,
    uninterrupted: dict[int, Path],
    tiny_config: Path,
    training_settings: list[str],
    tmp_path: Path,
) -> None:
    """N steps = k steps + SIGKILL + the same command again, for weights and both optimizers."""
    run_dir = tmp_path / "run"
    arguments = (processes, tiny_config, *training_settings, f"run.dir={run_dir}")
    for step in sorted(random.sample(range(2, STEPS), 2)):
        with started(*arguments) as process:
            kill_at_step(process, run_dir, step)
    train(*arguments)
    whole = uninterrupted[processes]
    assert_bitwise_equal(state_of(run_dir, STEPS), state_of(whole, STEPS))
    batches = ids_by_step(run_dir)
    assert batches == ids_by_step(whole)
    assert list(batches) == list(range(1, STEPS + 1))
    grids = [Path(d, "samples", f"step_{STEPS:07d}.png").read_bytes() for d in (run_dir, whole)]
    assert grids[0] == grids[1]
    for rows in (metrics(run_dir), metrics(whole)):
        assert [row["step"] for row in rows] == list(range(4, STEPS + 1, 4))


def test_another_number_of_processes_goes_on_with_the_same_batches(
    uninterrupted: dict[int, Path], tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """2 -> kill -> 1 -> kill -> 2 processes: the same ids, weights up to summation order.

    Adam divides by the root of its second moment, so where a gradient is almost zero the order of
    a sum can turn the sign of a step; one step is about the learning rate (1e-3 here) at most. From
    1e-9 after one step the difference grows to 1e-2. ``test_exact_sum`` shows equal bits.
    """
    run_dir = tmp_path / "run"
    for processes, step in ((2, 7), (1, 13)):
        with started(processes, tiny_config, *training_settings, f"run.dir={run_dir}") as process:
            kill_at_step(process, run_dir, step)
    train(2, tiny_config, *training_settings, f"run.dir={run_dir}")
    assert ids_by_step(run_dir) == ids_by_step(uninterrupted[1]) == ids_by_step(uninterrupted[2])
    for whole in uninterrupted.values():
        mine, theirs = weights_of(run_dir), weights_of(whole)
        difference = largest_difference(mine, theirs)
        print(f"largest difference of a weight: {difference:.2e}")
        assert difference < STEPS * 1e-3
    assert largest_difference(*map(weights_of, uninterrupted.values())) < STEPS * 1e-3


def weights_of(run_dir: Path) -> dict:  # type: ignore[type-arg]
    return {k: v for k, v in state_of(run_dir, STEPS).items() if not k.startswith("opt")}


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR2", marks=pytest.mark.faults)])
def test_a_signal_saves_and_leaves_and_the_same_command_finishes(
    name: str,
    uninterrupted: dict[int, Path],
    tiny_config: Path,
    training_settings: list[str],
    tmp_path: Path,
) -> None:
    """A stop signal to one of two ranks: all ranks save the same step, exit 0; then bitwise."""
    run_dir = tmp_path / "run"
    arguments = (
        2,
        tiny_config,
        *training_settings,
        f"run.dir={run_dir}",
        "train.checkpoint_every=0",
    )
    with started(*arguments, ENDLESS) as process:
        wait_for(run_dir / "ids" / "rank_1.jsonl", '"step": 3,')
        rank_process(process, 1).send_signal(signal.Signals[name])
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    stopped_at = int((run_dir / "PREEMPTED").read_text())
    assert int((run_dir / "progress").read_text()) == stopped_at
    assert f"stopped by another rank's signal at step {stopped_at}" in output
    end, whole = beyond(stopped_at, arguments, uninterrupted[2], tmp_path)
    train(*arguments, f"train.total_steps={end}")
    assert not (run_dir / "PREEMPTED").exists()
    assert int((run_dir / "FINISHED").read_text()) == end
    assert_bitwise_equal(state_of(run_dir, end), state_of(whole, end))


ENDLESS = "train.total_steps=1000000"
"""For a run that must not end before its signal comes."""


def beyond(step: int, arguments: Sequence[object], whole: Path, tmp_path: Path) -> tuple[int, Path]:
    """(a later step, an uninterrupted run to it): ``whole`` but where the signal came too late."""
    if step < STEPS:
        return STEPS, whole
    end, longer = step + 1, tmp_path / "longer"
    train(*arguments, f"run.dir={longer}", f"train.total_steps={end}")
    return end, longer


def wait_for(path: Path, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text} never appeared in {path}"
        time.sleep(0.02)


def test_a_signal_during_the_imports_is_not_lost(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """SIGTERM right after the start: the run saves after its first step and exits 0."""
    run_dir = tmp_path / "run"
    with started(1, tiny_config, *training_settings, f"run.dir={run_dir}") as process:
        while not catches_sigterm(process.pid):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (run_dir / "PREEMPTED").exists()


def catches_sigterm(pid: int) -> bool:
    caught = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_scheduler_may_ask_for_another_exit_code_of_a_stopped_run(
    processes: int,
    uninterrupted: dict[int, Path],
    tiny_config: Path,
    training_settings: list[str],
    tmp_path: Path,
) -> None:
    """Kubernetes would count 0 as completed. Behind a launcher any code but 0 becomes 1."""
    run_dir = tmp_path / "run"
    arguments = (processes, tiny_config, *training_settings, f"run.dir={run_dir}")
    with started(*arguments, ENDLESS, STOPPED_EXIT_CODE="75") as process:
        wait_for(run_dir / "ids" / "rank_0.jsonl", '"step": 3,')
        stopped = process if processes == 1 else rank_process(process, 1)
        stopped.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == (75 if processes == 1 else 1), output
    assert output.count("  warning: train.total_steps (1000000): ") == 1, output  # on rank 0 alone
    step = int((run_dir / "PREEMPTED").read_text())
    assert state_of(run_dir, step)
    end, whole = beyond(step, arguments, uninterrupted[processes], tmp_path)
    train(*arguments, f"train.total_steps={end}", STOPPED_EXIT_CODE="75")
    assert_bitwise_equal(state_of(run_dir, end), state_of(whole, end))


def test_a_finished_run_is_left_as_it_is(
    uninterrupted: dict[int, Path], tiny_config: Path, training_settings: list[str]
) -> None:
    """The same command after the end trains nothing and exits 0; more steps extend the run."""
    run_dir = uninterrupted[1]
    before = state_of(run_dir, STEPS)
    train(1, tiny_config, *training_settings, f"run.dir={run_dir}")
    assert_bitwise_equal(before, state_of(run_dir, STEPS))
    assert (run_dir / "FINISHED").exists()


def test_a_run_that_cannot_start_stays_finished(
    uninterrupted: dict[int, Path], tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Evaluations that follow it would wait for ever; a run that does start is finished no more."""
    run_dir = Path(shutil.copytree(uninterrupted[1], tmp_path / "run"))
    code, output = run(1, tiny_config, "data.shards=nowhere", f"run.dir={run_dir}")
    assert (code, output.count("no such folder")) == (2, 1), output
    assert (run_dir / "FINISHED").exists()
    with started(1, tiny_config, *training_settings, f"run.dir={run_dir}", ENDLESS) as process:
        wait_for(run_dir / "ids" / "rank_0.jsonl", f'"step": {STEPS + 1},')
        assert not (run_dir / "FINISHED").exists()
        kill(process)


def test_the_loss_falls_and_the_grid_is_a_picture(uninterrupted: dict[int, Path]) -> None:
    """D learns to tell the squares from noise within a few steps; the grid is 8 x 8 images."""
    rows = metrics(uninterrupted[1])
    assert rows[-1]["loss/D"] < rows[0]["loss/D"]
    with Image.open(uninterrupted[1] / "samples" / f"step_{STEPS:07d}.png") as grid:
        assert grid.size == (256, 256)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_the_clock_alone_writes_checkpoints(
    processes: int, tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """With checkpoint_every=0 and a time that any step exceeds, each step is a checkpoint.

    Two ranks learn one step later that the time is up: each second step is one.
    """
    run_dir = tmp_path / "run"
    clock = ("train.checkpoint_every=0", "train.checkpoint_minutes=1e-9", "train.keep=50")
    settings = (*training_settings, f"run.dir={run_dir}", "train.total_steps=8")
    train(processes, tiny_config, *settings, *clock)
    assert [step_of(path) for path in committed(run_dir)] == [*range(processes, 9, processes)]


def test_old_checkpoints_go_but_chosen_ones_stay(uninterrupted: dict[int, Path]) -> None:
    """keep=3 (the default) of checkpoints 5, 10, 15, 20, 24; snapshots are all kept."""
    names = sorted(p.name for p in (uninterrupted[1] / "checkpoints").iterdir())
    assert names == ["step_00000015", "step_00000020", "step_00000024"]
    names = sorted(p.name for p in (uninterrupted[1] / "snapshots").iterdir())
    assert names == [f"step_{k:08d}" for k in (5, 10, 15, 20, 24)]


def test_the_fixed_command_works_from_another_folder(
    training_shards: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """`accelerate launch pipeline/train.py`, word for word, from a folder that is not ours."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(REPO / "pipeline/train.py")]
    options = [f"data.shards={training_shards}", "train.total_steps=2", "run.dir=here"]
    done = subprocess.run(
        [*launch, "--config", str(tiny_config), *options],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "FINISHED").exists()


def test_a_launch_that_lost_processes_is_noticed(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process: the run says so."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    script = [str(REPO / "pipeline/train.py"), "--config", str(tiny_config), *training_settings]
    done = subprocess.run(
        [*launch, *script, f"run.dir={tmp_path / 'run'}", "train.total_steps=1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "this run has 1 process" in done.stderr
    assert "accelerate launch --multi_gpu --num_processes 2" in done.stderr


def test_bf16_trains_and_resumes_bitwise(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """The default arithmetic of capable hardware obeys the same contract as fp32."""
    states = []
    for name, stops in (("whole", []), ("parts", [9])):
        arguments = (
            1,
            tiny_config,
            *training_settings,
            f"run.dir={tmp_path / name}",
            "train.precision=bf16",
        )
        for step in stops:
            with started(*arguments) as process:
                kill_at_step(process, tmp_path / name, step)
        train(*arguments)
        states.append(state_of(tmp_path / name, STEPS))
    assert_bitwise_equal(*states)


def test_help_and_mistakes_answer_without_torch(tiny_config: Path) -> None:
    """--help and a mistyped key never import torch."""
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--config', sys.argv[1], 'data.batchsize=1']\n"
        "try: runpy.run_path('pipeline/train.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_config)], cwd=REPO, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2 False", done.stderr
    assert "did you mean data.batch_size?" in done.stderr


@pytest.mark.faults
def test_sigkill_leaves_no_lock(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """A killed run can be restarted at once; a living one refuses a second."""
    run_dir = tmp_path / "run"
    arguments = (
        1,
        tiny_config,
        *training_settings,
        f"run.dir={run_dir}",
        "train.total_steps=100000",
    )
    with started(*arguments) as first:
        wait_for(run_dir / "ids" / "rank_0.jsonl", '"step": 2,')
        code, output = run(*arguments)
        assert code == 2, output
        assert f"in use by process {first.pid}" in output
        assert "Traceback" not in output
    train(1, tiny_config, *training_settings, f"run.dir={run_dir}")


@pytest.mark.faults
def test_a_signal_while_shards_are_fetched_stops_at_once(
    tiny_config: Path,
    make_shards: Callable[..., Index],
    serve: Callable[[Path], CountingServer],
    tmp_path: Path,
) -> None:
    """Nothing is trained, the rest is not fetched, the marker says so; then the run goes on."""
    make_shards(tmp_path / "shards", [9] * 40, (32, 32, 1))
    server, run_dir = serve(tmp_path / "shards"), tmp_path / "run"
    server.hold.clear()
    settings = [f"data.shards={server.url}", f"data.cache_dir={tmp_path / 'cache'}"]
    arguments = (1, tiny_config, *settings, f"run.dir={run_dir}", "train.total_steps=2")
    with started(*arguments, STOPPED_EXIT_CODE="75") as process:
        deadline = time.monotonic() + 60
        while not any(name.endswith(".tar") for name in list(server.gets)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR2)
        time.sleep(6)  # it looks for signals once a second
        server.hold.set()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped by SIGUSR2 at step 0; run the same command again to go on" in output
    assert int((run_dir / "PREEMPTED").read_text()) == 0
    assert sum(name.endswith(".tar") for name in server.gets) < 40
    train(*arguments)
    assert int((run_dir / "FINISHED").read_text()) == 2
