"""slurm/train.sh, unchanged, on two nodes of a real Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from launching import REPO, assert_bitwise_equal, ids_by_step, state_of

from .conftest import STEPS, Program, Submit
from .mini_slurm import KILL_WAIT, MiniSlurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.both_versions
def test_two_nodes_train_the_same_weights_as_one_machine(
    submit: Submit, uninterrupted: Path
) -> None:
    job = submit()
    job.wait("COMPLETED")
    assert "2 process(es) on n[1-2]" in job.log()
    assert_bitwise_equal(state_of(job.run_dir, STEPS), state_of(uninterrupted, STEPS))
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)


def test_the_time_limit_requeues_and_the_run_ends_bitwise_equal(
    submit: Submit, uninterrupted: Path
) -> None:
    """USR2 from Slurm, save, requeue, resume, finish, without periodic checkpoints.

    The ranks are suspended until they have the signal, so that no machine is too fast for the test.
    """
    job = submit("train.checkpoint_every=0", flags=("--time=2", "--signal=USR2@30"))
    job.reach(5)
    with frozen(job.ranks()) as ranks:
        job.slurm.wait_until(lambda: all(map(has_been_signalled, ranks)), "USR2", every=0.01)
    began = time.monotonic()
    job.slurm.wait_until((job.run_dir / "progress").exists, "checkpoint", every=0.01)
    print(f"signal -> checkpoint committed: {time.monotonic() - began:.1f} s")
    assert not (job.run_dir / "FINISHED").exists()
    job.slurm.wait_until(lambda: "requeue at step" in job.log(), "end of the step", every=0.05)
    print(f"signal -> end of the step: {time.monotonic() - began:.1f} s")
    stopped_at = int(re.findall(r"requeue at step (\d+)", job.log())[0])
    job.slurm.wait_until(lambda: job.slurm.restarts(job.id) == 1, "requeue")
    requeued = time.monotonic()
    print(f"signal -> requeued: {requeued - began:.1f} s")
    print(job.slurm.ask("squeue"), job.slurm.ask("scontrol", "show", "job", job.id))
    job.slurm.wait_until(lambda: "restart 1" in job.log(), "second life", every=0.05)
    print(f"requeued -> running again: {time.monotonic() - requeued:.1f} s")
    job.reach(stopped_at + 1)
    print(f"requeued -> first resumed step: {time.monotonic() - requeued:.1f} s")
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
    """Say whether a suspended process has a pending signal, or Slurm has woken it up."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    pending = int(re.findall(r"ShdPnd:\s*(\w+)", status)[0], 16)
    return pending != 0 or "State:\tT" not in status


def test_a_killed_rank_is_replaced_in_the_same_allocation(
    submit: Submit, uninterrupted: Path, tmp_path: Path
) -> None:
    """Also with a bash before 5, which has no EPOCHSECONDS."""
    old_bash = tmp_path / "old_bash"
    old_bash.write_text("unset EPOCHSECONDS\n")
    job = submit("train.checkpoint_every=20", flags=("--time=30",), BASH_ENV=str(old_bash))
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


@pytest.mark.both_versions
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


@pytest.mark.parametrize(("limit", "requeues"), [("--time=30", "0"), ("--time=5", "1")])
def test_a_job_that_fails_twice_without_progress_ends(
    submit: Submit, limit: str, requeues: str
) -> None:
    """Also over requeues: with less than MIN_SECONDS left each failure requeues the job."""
    job = submit("data.shards=nowhere", flags=("--nodes=1", limit))
    found = job.wait("FAILED")
    assert found["Restarts"] == requeues
    assert job.log().count("srun ended with") == 2
    assert "two failures without progress at step 0: giving up" in job.log()


def test_a_mistake_in_the_configuration_ends_the_job_at_once(submit: Submit) -> None:
    job = submit("train.total_stepz=5", flags=("--nodes=1",))
    job.wait("FAILED")
    assert "unknown key; did you mean train.total_steps?" in job.log()
    assert "Traceback" not in job.log()
    assert "srun ended with" not in job.log()


def test_outside_slurm_the_message_names_sbatch() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", "slurm/train.sh"], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "not in a Slurm job: submit this script with sbatch" in done.stdout
    assert done.stderr == ""


def test_what_users_export_and_ask_for_does_no_harm(
    submit: Submit, program: Program, path: str, tmp_path: Path
) -> None:
    """Several tasks a node, --gpus, --export, RUN_DIR and a default_config.yaml of accelerate."""
    # The node resolves its own name to 127.0.1.1, as on Debian; other nodes do not reach that.
    program("getent", f'[ "$1" != hosts ] || {{ echo "127.0.1.1 $2"; exit; }}\n{real("getent")}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "FINISHED").write_text("5\n")
    accelerate = tmp_path / "hf" / "accelerate"
    accelerate.mkdir(parents=True)
    (accelerate / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\ngpu_ids: '7'\n"
    )
    env = {"PATH": path, "RUN_DIR": str(other), "HF_HOME": str(tmp_path / "hf")}
    env |= {"ACCELERATE_USE_CPU": "true"}
    passed = [*env, "SLURM_CONF", "PYTHON", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
    flags = ("--ntasks=4", "--overcommit", "--gpus=2", f"--export={','.join(passed)}")
    job = submit(flags=flags, steps=10**6, **env)
    job.reach(5)
    for rank in job.ranks():
        seen = rank.environ()
        assert seen.get("CUDA_VISIBLE_DEVICES") != "7"
        assert seen["GPUS_PER_NODE"] == "1"
        assert seen["SLURM_CPUS_PER_TASK"] == "1"  # the job's CPUs on the node, not srun's default
        assert not shutil.which("ip") or seen["GLOO_SOCKET_IFNAME"] == "lo"
    assert len(list((job.run_dir / "ids").iterdir())) == 2
    assert "2 process(es) on n[1-2], rendezvous 127.0.0.1, run" in job.log()
    assert (other / "FINISHED").exists()


def real(name: str) -> str:
    """Return the last line of a wrapper: call the real program."""
    return f'exec {shutil.which(name)} "$@"'


def test_sigterm_and_a_controller_that_does_not_answer_in_the_set_up(
    submit: Submit, program: Program, path: str, tmp_path: Path
) -> None:
    """Preempted before the trainer runs; the first requeue is refused and tried again."""
    mark, go = tmp_path / "refused", tmp_path / "go"
    program("held", f'[ -e {go} ] || exec sleep 300\nexec {sys.executable} "$@"')
    refuse = f'[ "$1" != requeue ] || [ -e {mark} ] || {{ touch {mark}; exit 1; }}'
    program("scontrol", f"{refuse}\n{real('scontrol')}")
    held = str(tmp_path / "bin" / "held")
    job = submit(flags=("--nodes=1",), steps=2, PATH=path, PYTHON=held)

    def reader() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job.id:
                    found += [process] if process.cmdline() == ["sleep", "300"] else []
        return found

    job.slurm.wait_until(lambda: len(reader()) > 0, "reader of the configuration")
    go.touch()
    for process in reader():
        process.terminate()
    found = job.wait("COMPLETED")
    assert found["Restarts"] == "1"
    assert job.log().count("requeue at the set-up: ended by SIGTERM") == 2


@pytest.mark.parametrize(
    ("container", "gpus"),
    [("pyxis", "nvidia"), ("apptainer", "nvidia"), ("singularity", "rocm"), ("podman", "rocm")],
)
def test_a_step_starts_in_the_container(
    submit: Submit, program: Program, path: str, tmp_path: Path, container: str, gpus: str
) -> None:
    """None is installed: programs in their place record the arguments and start the command."""
    note, image = tmp_path / "words", "/images/dc gan.sqsh"
    record = f'printf "%s\n" "$@" >>{note}'
    program(container, f'{record}\nwhile [ "$1" != "{image}" ]; do shift; done; shift\nexec "$@"')
    strip = (
        'for w in "$@"; do case $w in --*container*) ;; *) set -- "$@" "$w" ;; esac; shift; done'
    )
    program("srun", f"{record}\n{strip}\n{real('srun')}")
    seen_outside = tmp_path / "outside"
    seen_outside.symlink_to(tmp_path / "a run")
    env = {"CONTAINER": container, "IMAGE": image, "MOUNTS": "/a:/b,/c:/d", "WORKDIR": str(REPO)}
    env |= {"CONTAINER_GPUS": gpus, "PATH": path, "RUN_DIR": str(seen_outside)}
    job = submit(flags=("--nodes=1", "--gpus-per-node=1"), steps=2, **env)
    job.wait("COMPLETED")
    words = note.read_text().splitlines()
    if container == "pyxis":
        expected = [f"--container-image={image}", "--container-mounts=/a:/b,/c:/d"]
        expected += [f"--container-workdir={REPO}", "--no-container-mount-home"]
    elif container == "podman":
        assert {"SLURM*", "MASTER_*", "NNODES", "WANDB_*"} <= set(words)
        where = words.index("run")
        expected = ["run", "--rm", "--network=host", "--ipc=host", "--cgroups=disabled"]
        expected += ["--device", "/dev/kfd", "--device", "/dev/dri", "--group-add", "keep-groups"]
        assert words[where : where + len(expected)] == expected
        expected = ["--volume", "/a:/b", "--volume", "/c:/d", "--workdir", str(REPO), image]
    else:
        flag = {"nvidia": "--nv", "rocm": "--rocm"}[gpus]
        expected = ["exec", flag, "--bind", "/a:/b,/c:/d", "--pwd", str(REPO), image]
    starts = [k for k in range(len(words)) if words[k : k + len(expected)] == expected]
    # Once to read the configuration, once to train; srun records the container's arguments too.
    assert len(starts) == (2 if container == "pyxis" else 4), words
    assert f"run {seen_outside} at step 0" in job.log()


def test_no_more_requeues_than_allowed(submit: Submit) -> None:
    job = submit("train.checkpoint_every=0", steps=10**6, MAX_REQUEUE="0")
    job.reach(5)
    job.ranks()[1].send_signal(signal.SIGUSR2)
    job.wait("FAILED")
    assert "requeued 0 times, MAX_REQUEUE is 0: giving up at step" in job.log()


@pytest.fixture
def node_back(slurm: MiniSlurm) -> Iterator[Callable[[str], None]]:
    """Return a function that brings a lost node back. At the end all nodes come back."""
    yield slurm.start_node
    for node in list(slurm.lost):
        slurm.start_node(node)
    slurm.wait_until(lambda: slurm.idle_nodes() == {"n1", "n2"}, "two idle nodes", 60)


def test_a_job_that_loses_its_batch_host_is_requeued_and_resumes(
    submit: Submit, uninterrupted: Path, node_back: Callable[[str], None]
) -> None:
    """n1 runs the batch script and rank 0. Slurm requeues the job, which waits for two nodes."""
    job = submit("train.checkpoint_every=20")
    job.reach(30)
    job.slurm.lose_node("n1", job.id)
    began = time.monotonic()
    job.slurm.wait_until(lambda: job.slurm.restarts(job.id) > 0, "requeue")
    print(f"loss of n1 -> requeued: {time.monotonic() - began:.1f} s, SlurmdTimeout 15 s")
    node_back("n1")
    found = job.wait("COMPLETED")
    assert int(found["Restarts"]) >= 1
    assert re.search(r"restart [1-9]\d* of job .* 2 process\(es\) on n\[1-2\]", job.log())
    assert_bitwise_equal(state_of(job.run_dir, STEPS), state_of(uninterrupted, STEPS))
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)


@pytest.mark.both_versions
def test_a_job_that_loses_a_node_resumes_on_the_other(
    slurm: MiniSlurm, submit: Submit, uninterrupted: Path, node_back: Callable[[str], None]
) -> None:
    """Submitted with --nodes=1-2, the job resumes on the node that is left.

    After a rank died, n2 starts no fresh step. The script notices it before Slurm does.
    """
    with slurm.patient():
        job = submit("train.checkpoint_every=20", flags=("--nodes=1-2",))
        job.reach(30)
        assert "2 process(es) on n[1-2]" in job.log()
        rank = job.ranks()[1]
        slurm.lose_slurmd("n2")
        rank.kill()
        job.slurm.wait_until(lambda: "not all nodes answer" in job.log(), "probe")
        slurm.wait_until(lambda: slurm.show(job.id)["JobState"] == "COMPLETING", "requeue")
        # Slurm does this by itself after SlurmdTimeout, long after the end of the script. (In the
        # same second, 22.05 starts the job with a credential that it has just revoked.)
        time.sleep(5)
        slurm.ask("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
        slurm.wait_until(lambda: "restart 1" in job.log(), "second life")
        job.wait("COMPLETED")
    assert re.search(r"1 process\(es\) on n1, .* at step [1-9]", job.log())
    assert ids_by_step(job.run_dir) == ids_by_step(uninterrupted)
    # One process sums in another order than two, so after 160 more steps the weights differ. A
    # test without Slurm compares them after a few steps.
    assert state_of(job.run_dir, STEPS)


def test_one_process_per_gpu(submit: Submit) -> None:
    """Slurm allocates two fake GPUs, so two processes start on the node."""
    job = submit(flags=("--nodes=1", "--gpus-per-node=2"), steps=8, ACCELERATE_USE_CPU="true")
    job.wait("COMPLETED")
    assert "2 process(es) on n1" in job.log()
    assert len(list((job.run_dir / "ids").iterdir())) == 2
