"""What ranks tell each other before a run: real processes over gloo."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import environment, run, train
from ranks import on_ranks
from torch import nn

from pipeline.config.schema import Config, RunConfig
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime import launch, ranks, signals
from pipeline.runtime.errors import DataError, LaunchError, RunFolderError

pytestmark = pytest.mark.slow
TIME_LIMIT = 5.0


def outcome(attempt: Callable[[], object]) -> str:
    try:
        return str(attempt())
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def two_ranks_wait(folder: str) -> None:
    """Rank 0 works, longer than a collective may take; then fails; then is stopped by rank 1. At
    the end they compare their precisions: the same, and another on rank 1. Then each reads a file
    of its own, first damaged for rank 1.
    """
    signals.install()
    ranks.POLL_SECONDS = 0.1  # the waiting rank is in a collective that long each time
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIME_LIMIT))
    accelerator = launch.make_accelerator("fp32")
    rank, done = accelerator.process_index, Path(folder) / "done"

    def takes_long(stop: Callable[[], bool]) -> None:
        time.sleep(1.5 * TIME_LIMIT)
        done.touch()

    def fails(stop: Callable[[], bool]) -> None:
        raise DataError("damaged")

    def never_ends(stop: Callable[[], bool]) -> None:
        while not stop():
            time.sleep(0.02)
        raise signals.Stopped

    found = []
    for work in (takes_long, fails, never_ends):
        if work is never_ends and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        wait = partial(ranks.run_on_selected_ranks, accelerator, rank == 0, work)
        found.append(outcome(wait))
        found.append(str(done.exists()))
    lengthy = partial(ranks.on_rank_zero, accelerator, lengthy=True)
    found.append(outcome(partial(lengthy, lambda: time.sleep(1.5 * TIME_LIMIT))))  # though stopped
    found.append(str(lengthy(lambda: 7)))
    found.append(outcome(partial(lengthy, partial(fails, signals.never_stop))))
    refuse = partial(launch.require_equal_precision, accelerator)
    for precision in ("fp32", "bf16" if rank else "fp32"):
        found.append(outcome(partial(refuse, precision)))

    def read() -> int:
        if rank == 1 and len(found) == 11:
            raise DataError("damaged")
        return rank

    for _ in range(2):
        found.append(outcome(partial(ranks.on_every_rank, accelerator, read)))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def test_ranks_wait_for_work_that_takes_long_fails_or_is_stopped(tmp_path: Path) -> None:
    """Longer than the group's time limit; a fault ends all ranks and is told by one; a signal to a
    rank that only waits stops the one that works. A result that all wait for comes to all.
    """
    on_ranks(2, two_ranks_wait, str(tmp_path))
    works, waits = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert works[:6:2] == ["None", "DataError: damaged", "Stopped: "]
    assert waits[:6:2] == ["None", "SystemExit: 2", "Stopped: "]
    assert waits[1] == "True"

    for found in (works, waits):
        assert found[6:9] == ["None", "7", "DataError: damaged"]
        assert found[9] == "None"
        assert "bf16 on " in found[10], "unequal nodes would mix precisions"
        assert "; fp32 on " in found[10]
        assert re.fullmatch(r"DataError: \S+: damaged", found[11]), "met by one, raised by both"
    assert (works[12], waits[12]) == ("0", "1")


def two_ranks_compare(folder: str) -> None:
    """Both ranks make the same network and optimizer; then rank 1 changes one thing at a time."""
    accelerator = launch.make_accelerator("fp32")
    rank, found = accelerator.process_index, {}
    for change in ("nothing", "permuted weight", "negated zero", "buffer", "Adam moment", "scale"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        network(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        scale = 2.0 if rank == 1 and change == "scale" else 1.0
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        if rank == 1:
            with torch.no_grad():
                weight = network[0].weight
                moments = optimizer.state[weight]
                if change == "permuted weight":
                    weight.copy_(weight.flip(0))
                elif change == "buffer":
                    network[1].running_mean[0] += 1
                elif change == "Adam moment":
                    moments["exp_avg_sq"][0, 0] *= 2
        if change == "negated zero":
            with torch.no_grad():
                network[0].bias[0] = -0.0 if rank else 0.0
        state = {"D": network}, {"D": optimizer, "scaler": scaler}
        found[change] = ranks.same_on_all_ranks(accelerator, *state)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def test_every_difference_between_the_states_of_two_ranks_is_noticed(tmp_path: Path) -> None:
    """Parameters (in place and sign), buffers, optimizer moments and the scaler are compared."""
    on_ranks(2, two_ranks_compare, str(tmp_path))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.pop("nothing") is True
        assert len(found) == 5
        assert not any(found.values()), found


def test_processes_that_would_share_a_gpu_are_refused() -> None:
    """By a message before NCCL's traceback."""
    launch._refuse_shared_gpus(processes=8, gpus=8)
    with pytest.raises(LaunchError, match=r"^2 processes on \S+, which has 1 GPU\(s\) for them"):
        launch._refuse_shared_gpus(processes=2, gpus=1)


@pytest.mark.faults
def test_gpus_that_were_allocated_must_be_seen_by_training_too(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """One message a node and exit code 2, instead of a training on the CPU; unless it is wanted."""
    words = (2, tiny_config, *training_settings, f"run.dir={tmp_path}", "train.total_steps=1")
    code, output = run(*words, GPUS_PER_NODE="2")
    assert code == 1, output  # the launcher's
    assert output.count("error: GPUS_PER_NODE (2): ") == 1, output
    assert "set ACCELERATE_USE_CPU=true to compute without GPUs" in output
    train(*words, GPUS_PER_NODE="2", ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_as_such(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write permission, asked for before, would not have helped."""

    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(RunFolderError, match=r"files cannot be locked there .* mount the file sys"):
        RunFolder(Config(run=RunConfig(dir=str(tmp_path))))


FAULTS = """
import resource, torch
from pipeline.runtime import launch
launch.make_accelerator("fp32")
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has what is asked")
@pytest.mark.parametrize("chosen", ["", "glibc.malloc.arena_max=8"])
def test_freed_memory_is_taken_again(chosen: str) -> None:
    """A tensor of 16,384 pages needs no new ones the second time; unless the user tunes glibc."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if chosen and huge.is_file() and "[always]" in huge.read_text():
        pytest.skip("pages of 2 MiB everywhere: no difference to be seen")
    env = {k: v for k, v in environment().items() if k != "GLIBC_TUNABLES"}
    env |= {"GLIBC_TUNABLES": chosen} if chosen else {}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) > 10_000) == bool(chosen)
