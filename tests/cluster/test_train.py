"""slurm/train.sh as shipped, on two real Slurm nodes."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from launching import assert_bitwise_equal, ids_by_step, state_of, train

from .conftest import KILL_WAIT, MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
STEPS = 96
Submit = Callable[..., "Job"]


@dataclass
class Job:
    """A training submitted through slurm/train.sh."""

    slurm: MiniSlurm
    id: str
    run_dir: Path
    output: Path

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, state: str) -> dict[str, str]:
        try:
            return self.slurm.wait(self.id, state)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def reach(self, step: int) -> None:
        """Wait until rank 0 has begun this optimizer step."""
        log = self.run_dir / "ids" / "rank_0.jsonl"

        def there() -> bool:
            if log.exists():
                return f'"step": {step},' in log.read_text()
            time.sleep(0.5)
            found = self.slurm.show(self.id).get("JobState")
            assert found in ("PENDING", "RUNNING"), f"{found}\n{self.log()}"
            return False

        self.slurm.wait_until(there, f"step {step}", every=0.01)

    def ranks(self) -> list[psutil.Process]:
        return [self.slurm.rank(self.id, rank) for rank in (0, 1)]


@pytest.fixture
def submit(
    slurm: MiniSlurm, tiny_config: Path, training_shards: Path, tmp_path: Path
) -> Iterator[Submit]:
    jobs: list[Job] = []

    def submitted(*words: str, steps: int = STEPS, flags: tuple[str, ...] = (), **env: str) -> Job:
        run_dir, output = tmp_path / "run", tmp_path / f"job-{len(jobs)}.out"
        settings = [f"data.shards={training_shards}", f"run.dir={run_dir}"]
        settings += [f"train.total_steps={steps}", *words]
        script = ["slurm/train.sh", "--config", str(tiny_config), *settings]
        job = slurm.submit(output, "--nodes=2", *flags, *script, **env)
        jobs.append(Job(slurm, job, run_dir, output))
        return jobs[-1]

    yield submitted
    for job in jobs:
        slurm.ask("scancel", job.id)
        slurm.wait_until(
            lambda job=job: slurm.show(job.id).get("JobState") not in ("RUNNING", "COMPLETING"),  # type: ignore[misc]
            "end",
        )
        print(job.log())


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_config: Path, training_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same training on two processes that accelerate launch started, without Slurm."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    settings = [f"data.shards={training_shards}", f"train.total_steps={STEPS}"]
    train(2, tiny_config, *settings, f"run.dir={run_dir}")
    return run_dir


def test_two_nodes_train_what_one_machine_does(submit: Submit, uninterrupted: Path) -> None:
    job = submit()
    job.wait("COMPLETED")
    assert "2 process(es) on n[1-2]" in job.log()
    assert_bitwise_equal(state_of(job.run_dir, STEPS), state_of(uninterrupted, STEPS))
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)


def test_the_time_limit_requeues_and_the_run_ends_bitwise_equal(
    submit: Submit, uninterrupted: Path
) -> None:
    """USR2 from Slurm -> save -> requeue -> resume -> finish; no periodic checkpoint helps.

    The ranks are frozen until the signal is there, so that no machine is too fast for the test.
    """
    job = submit("train.checkpoint_every=0", flags=("--time=2", "--signal=USR2@30"))
    job.reach(5)
    with frozen(job.ranks()) as ranks:
        job.slurm.wait_until(lambda: all(map(has_been_signalled, ranks)), "USR2", every=0.01)
    began = time.monotonic()
    job.slurm.wait_until((job.run_dir / "PREEMPTED").exists, "checkpoint", every=0.01)
    print(f"signal -> checkpoint committed: {time.monotonic() - began:.1f} s")
    assert not (job.run_dir / "FINISHED").exists()
    stopped_at = int((job.run_dir / "PREEMPTED").read_text())
    job.slurm.wait_until(lambda: job.slurm.show(job.id)["JobState"] == "PENDING", "requeue")
    print(f"signal -> requeued: {time.monotonic() - began:.1f} s")
    print(job.slurm.ask("squeue"), job.slurm.ask("scontrol", "show", "job", job.id))
    job.reach(stopped_at + 2)
    print(f"signal -> first resumed step: {time.monotonic() - began:.1f} s")
    found = job.wait("COMPLETED")
    assert found["Restarts"] == "1"
    assert f"requeue at step {stopped_at}" in job.log()
    assert re.search(rf"restart 1 of job .* at step {stopped_at}$", job.log(), re.M)
    assert_bitwise_equal(state_of(job.run_dir, STEPS), state_of(uninterrupted, STEPS))
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)


@contextmanager
def frozen(ranks: list[psutil.Process]) -> Iterator[list[psutil.Process]]:
    for rank in ranks:
        rank.suspend()
    while any(rank.status() != psutil.STATUS_STOPPED for rank in ranks):
        time.sleep(0.01)
    yield ranks
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def has_been_signalled(process: psutil.Process) -> bool:
    """A frozen process that a stop signal waits for, or that Slurm woke up for it."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    pending = int(re.findall(r"ShdPnd:\s*(\w+)", status)[0], 16)
    return pending != 0 or "State:\tT" not in status


def test_a_killed_rank_is_replaced_in_the_same_allocation(
    submit: Submit, uninterrupted: Path
) -> None:
    job = submit("train.checkpoint_every=20")
    job.reach(3)
    rank = job.ranks()[1]
    job.reach(21)
    job.slurm.wait_until((job.run_dir / "progress").exists, "checkpoint", every=0.01)
    rank.kill()
    found = job.wait("COMPLETED")
    assert found["Restarts"] == "0"
    assert re.search(r"job RUNNING, step 0 -> \d*[02468]0$", job.log(), re.M)
    assert "fresh step in the same allocation" in job.log()
    assert_bitwise_equal(state_of(job.run_dir, STEPS), state_of(uninterrupted, STEPS))
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)


def test_scancel_saves_and_the_job_stays_cancelled(submit: Submit) -> None:
    job = submit("train.checkpoint_every=0", steps=10**6)
    job.reach(5)
    job.slurm.ask("scancel", job.id)
    saved = job.slurm.wait_until((job.run_dir / "PREEMPTED").exists, "checkpoint", KILL_WAIT)
    print(f"scancel -> checkpoint committed: {saved:.1f} s, KillWait {KILL_WAIT} s")
    job.wait("CANCELLED")
    time.sleep(15)  # a requeue would take 6 s
    found = job.slurm.show(job.id)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    step = int((job.run_dir / "progress").read_text())
    assert state_of(job.run_dir, step)


def test_a_higher_partition_preempts_and_gives_back(submit: Submit, uninterrupted: Path) -> None:
    job = submit("train.checkpoint_every=0")
    job.reach(5)
    flags = ("--partition=high", "--nodes=2", "--wrap=sleep 1")
    with frozen(job.ranks()) as ranks:
        urgent = job.slurm.submit(job.output.with_name("urgent.out"), *flags)
        job.slurm.wait_until(lambda: all(map(has_been_signalled, ranks)), "SIGTERM", every=0.01)
    job.slurm.wait(urgent, "COMPLETED")
    found = job.wait("COMPLETED")
    assert int(found["Restarts"]) >= 1
    assert_bitwise_equal(state_of(job.run_dir, STEPS), state_of(uninterrupted, STEPS))
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)


def test_a_job_that_fails_twice_without_progress_ends(submit: Submit) -> None:
    job = submit("data.shards=nowhere", flags=("--nodes=1",))
    found = job.wait("FAILED")
    assert found["Restarts"] == "0"
    assert job.log().count("srun ended with") == 2
    assert "two failures without progress at step 0: giving up" in job.log()


def test_a_mistake_in_the_configuration_ends_the_job_at_once(submit: Submit) -> None:
    job = submit("train.total_stepz=5", flags=("--nodes=1",))
    job.wait("FAILED")
    assert "unknown key; did you mean train.total_steps?" in job.log()
    assert "Traceback" not in job.log()
    assert "srun ended with" not in job.log()


def test_no_more_requeues_than_allowed(submit: Submit) -> None:
    job = submit("train.checkpoint_every=0", steps=10**6, MAX_REQUEUE="0")
    job.reach(5)
    for rank in job.ranks():
        rank.send_signal(signal.SIGUSR2)
    job.wait("FAILED")
    assert "requeued 0 times, MAX_REQUEUE is 0: giving up at step" in job.log()
