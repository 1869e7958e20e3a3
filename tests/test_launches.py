"""Launchers, their deaths, signals and leftovers of the environment: the real command each time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import (
    TIMEOUT,
    assert_bitwise_equal,
    free_port,
    kill,
    run,
    start,
    state_of,
    train,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.faults]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
ENDLESS = "train.total_steps=1000000"
"""For a run that must not end before it is stopped."""
Words = tuple[str, ...]
Settings = Callable[..., list[str]]


@pytest.fixture
def settings(tiny_config: Path, training_settings: list[str], tmp_path: Path) -> Settings:
    """Arguments of a training in ``tmp_path/run``."""

    def words(*more: str, name: str = "run") -> list[str]:
        folder = f"run.dir={tmp_path / name}"
        return ["--config", str(tiny_config), *training_settings, folder, *more]

    return words


def launcher(processes: int) -> list[str]:
    several = ["--multi_gpu", "--num_processes", str(processes)]
    port = ["--main_process_port", str(free_port())]
    return [*LAUNCH, *(several if processes > 1 else ["--num_processes", "1"]), *port]


def begun(folder: Path, step: int = 3) -> bool:
    log = folder / "ids" / "rank_0.jsonl"
    return log.exists() and f'"step": {step},' in log.read_text()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose command line names the run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(
                str(folder) in word for word in process.cmdline()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


# -- stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGKILL), (2, signal.SIGTERM), (2, signal.SIGKILL)],
    ids=["TERM, one", "KILL, one", "TERM, two", "KILL, two"],
)
def test_a_launcher_that_dies_stops_the_run_with_a_checkpoint(
    processes: int, number: signal.Signals, settings: Settings, tmp_path: Path
) -> None:
    """All ranks save the same step and leave; none is left over, and the run ends bitwise equal."""
    folder = tmp_path / "run"
    words = [*launcher(processes), "pipeline/train.py", *settings(ENDLESS)]
    process = start(words)
    try:
        wait_for(lambda: begun(folder), "third step")
        os.kill(process.pid, number)
        process.wait(TIMEOUT)
        wait_for(lambda: not processes_of(folder), "end of the ranks")
    finally:
        for orphan in processes_of(folder):
            orphan.kill()
        kill(process)
    stopped_at = int((folder / "PREEMPTED").read_text())
    assert stopped_at >= 3
    assert (folder / "progress").read_text() == str(stopped_at)
    steps = f"train.total_steps={stopped_at + 3}"
    for name in ("run", "whole"):
        train(processes, *_split(settings(steps, name=name)))
    end = stopped_at + 3
    assert_bitwise_equal(state_of(folder, end), state_of(tmp_path / "whole", end))


@pytest.mark.parametrize("launched", [False, True], ids=["python", "accelerate launch"])
def test_ctrl_c_stops_the_run_with_a_checkpoint(
    launched: bool, settings: Settings, tmp_path: Path
) -> None:
    """SIGINT to the whole process group, as a terminal sends it. Python alone prints one line; the
    launcher prints a traceback of its own and may leave before the run has saved.
    """
    folder = tmp_path / "run"
    before = launcher(1) if launched else [sys.executable]
    process = start([*before, "pipeline/train.py", *settings(ENDLESS)])
    try:
        wait_for(lambda: begun(folder), "third step")
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT)
        wait_for(lambda: not processes_of(folder), "end of the run")
    finally:
        for orphan in processes_of(folder):
            orphan.kill()
        kill(process)
    stopped_at = (folder / "PREEMPTED").read_text()
    assert (folder / "progress").read_text() == stopped_at
    assert f"at step {stopped_at}; run the same command again to go on" in output
    if not launched:
        assert process.returncode == 0
        assert "Traceback" not in output


def test_a_closed_session_stops_the_run_and_nohup_keeps_it(
    settings: Settings, tmp_path: Path
) -> None:
    """SIGHUP is a stop request like SIGTERM; ignored from the start, it stays ignored."""
    for name, before in (("run", []), ("kept", ["nohup"])):
        folder = tmp_path / name
        steps = [] if before else [ENDLESS]
        words = [*before, sys.executable, "pipeline/train.py", *settings(*steps, name=name)]
        process = start(words)
        try:
            wait_for(lambda folder=folder: begun(folder), "third step")
            process.send_signal(signal.SIGHUP)
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            kill(process)
        assert process.returncode == 0, output
        assert (folder / ("FINISHED" if before else "PREEMPTED")).exists(), output


# -- what other tools leave in the environment --------------------------------------------------


RENDEZVOUS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "error: RANK (1): set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Unset"),
        ({"WORLD_SIZE": "2"}, "error: WORLD_SIZE (2): set without RANK, MASTER_ADDR, MASTER_PORT."),
        ({"LOCAL_RANK": "3"}, "error: LOCAL_RANK (3): set without"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "error: OMPI_COMM_WORLD_SIZE (2): mpirun started 2 tasks, but",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            "error: SLURM_STEP_NUM_TASKS (2): srun started 2 tasks, but",
        ),
        ({"WORLD_SIZE": "two"}, "error: WORLD_SIZE (two): must be a whole number. Launchers set"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "error: LOCAL_WORLD_SIZE (-1): must be a whole number."),
        ({"RANK": "\x1b[1m"}, r"error: RANK (\x1b[1m): must be a whole number."),
        (RENDEZVOUS | {"RANK": "2"}, "error: RANK (2): must be below WORLD_SIZE (2). Launchers"),
        (RENDEZVOUS | {"MASTER_PORT": "65536"}, "error: MASTER_PORT (65536): must be below 65536."),
    ],
    ids=[
        *("a rank", "a world size", "a local rank", "mpirun", "srun", "a word", "a sign"),
        *("an escape code", "a rank too high", "a port too high"),
    ],
)
def test_half_a_launch_is_refused(
    env: dict[str, str], message: str, settings: Settings, tmp_path: Path
) -> None:
    """By one message that is never silent, before anything is written; without a traceback."""
    code, output = run(1, *_split(settings()), **env)
    assert code == 2, output
    assert message in output
    assert "torchrun --nproc_per_node N" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_told_whatever_rank_a_leftover_names(settings: Settings) -> None:
    """RANK=1 of another tool does not silence the message of a process that is no rank."""
    code, output = run(1, *_split(settings("optim.g_lr=fast")), RANK="1", LOCAL_RANK="1")
    assert code == 2
    assert "optim.g_lr (fast): must be a finite number" in output


def test_variables_that_say_a_process_is_alone_are_no_launch(
    settings: Settings, tmp_path: Path
) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    train(1, *_split(settings("train.total_steps=1")), **alone)
    assert (tmp_path / "run" / "FINISHED").exists()


def test_settings_of_accelerate_do_not_change_a_run_in_silence(
    settings: Settings, tmp_path: Path
) -> None:
    """Weights are those of the plain command, and each setting that is dropped has its line."""
    few = "train.total_steps=4"
    train(1, *_split(settings(few, name="plain")))
    options = ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "4"]
    options += ["--dynamo_backend", "inductor", "--num_processes", "1"]
    env = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    process = start([*LAUNCH, *options, "pipeline/train.py", *settings(few)], **env)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    for line in (
        "ACCELERATE_MIXED_PRECISION (bf16) is ignored: train.precision decides",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS (4) is ignored: train.micro_batch decides",
        "ACCELERATE_DYNAMO_BACKEND (INDUCTOR) is ignored: train.compile decides",
        "ACCELERATE_USE_FSDP (true) is ignored: the ranks train with DDP",
    ):
        assert line in output, output
    assert_bitwise_equal(state_of(tmp_path / "run", 4), state_of(tmp_path / "plain", 4))


@pytest.mark.parametrize("how", ["equals sign", "file"])
def test_processes_that_accelerate_did_not_start_are_missed(
    how: str, settings: Settings, tmp_path: Path
) -> None:
    """``--cpu --num_processes=2``, or MULTI_CPU in its file, starts one process: a line says so."""
    if how == "file":
        file = tmp_path / "accelerate.yaml"
        file.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
            "num_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\n"
        )
        options = ["--config_file", str(file)]
    else:
        options = ["--cpu", "--num_processes=2"]
    words = [*LAUNCH, *options, "pipeline/train.py", *settings("train.total_steps=1")]
    process = start(words)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert "--num_processes (2): this run has 1 process" in output


def test_torchrun_restarts_a_killed_rank(settings: Settings, tmp_path: Path) -> None:
    """With --standalone and a store apart from the rendezvous, else the new ranks find the old
    ranks' addresses in it and never meet.
    """
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words += ["--standalone", "--max-restarts", "2", "pipeline/train.py"]
    steps = "train.total_steps=120"  # enough for the kill to come before the end
    process = start([*words, *settings(steps)], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    try:
        wait_for(lambda: begun(folder, 12), "twelfth step")
        for child in psutil.Process(process.pid).children():
            if child.environ().get("RANK") == "1":
                child.kill()
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        kill(process)
    assert process.returncode == 0, output
    assert (folder / "FINISHED").exists()
    train(2, *_split(settings(steps, name="whole")))
    assert_bitwise_equal(state_of(folder, 120), state_of(tmp_path / "whole", 120))


def _split(words: list[str]) -> tuple[Path, Words]:
    """(configuration, overrides) as ``launching.train`` takes them."""
    return Path(words[1]), *words[2:]  # type: ignore[return-value]
