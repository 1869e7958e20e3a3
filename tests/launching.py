"""Starting the real training command from tests, killing it, and reading what it left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[1]
TIMEOUT = 240
STATE = {"run_id": "a", "precision": "fp32", "micro_batch": 4, "images_seen": 0, "stream": {}}
"""What state.json of a checkpoint must have, for tests that save one without a run."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(processes: int, config: Path, *overrides: str) -> list[str]:
    """One process: plain python. Several: accelerate's launcher, gloo on the CPU."""
    train = [str(REPO / "pipeline" / "train.py"), "--config", str(config), *overrides]
    if processes == 1:
        return [sys.executable, *train]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--quiet"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    return [*launcher, *settings, *port, *train]


def environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_"))}
    return kept | quiet


@contextmanager
def started(*args: object, cwd: Path | None = None, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A training run in a process group of its own, gone when the block ends."""
    words = command(args[0], args[1], *args[2:])  # type: ignore[arg-type]
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def start(words: list[str], **env: str) -> subprocess.Popen[str]:
    """Start a command of the checkout in a process group of its own."""
    return subprocess.Popen(
        words,
        cwd=REPO,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; ``what`` names it in the failure."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to launcher, ranks (each in a session of its own) and data workers alike."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for victim in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def rank_process(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The training process of one rank under a launcher."""
    ranks = psutil.Process(process.pid).children()
    return next(child for child in ranks if child.environ().get("RANK") == str(rank))


def run(*args: object, cwd: Path | None = None, **env: str) -> tuple[int, str]:
    """(exit code, output) of a training run left to end by itself."""
    with started(*args, cwd=cwd, **env) as process:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output


def train(*args: object, **env: str) -> str:
    """The output of a run that must succeed."""
    code, output = run(*args, **env)
    assert code == 0, output
    return output


def ids_by_step(run_dir: Path) -> dict[int, list[int]]:
    """Global batches as recorded: every rank's rows in order; replayed steps must agree."""
    steps: dict[int, dict[int, list[int]]] = {}
    for path in sorted((run_dir / "ids").glob("rank_*.jsonl")):
        rank = int(path.stem.removeprefix("rank_"))
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line a SIGKILL cut short
                continue
            key = (row["step"], row["world_size"])
            before = steps.setdefault(key, {}).setdefault(rank, row["ids"])  # type: ignore[arg-type]
            assert before == row["ids"], f"step {row['step']} was replayed with other samples"
    batches: dict[int, list[int]] = {}
    for (step, world_size), ranks in sorted(steps.items()):  # type: ignore[misc]
        if len(ranks) == world_size:
            batch = [i for rank in sorted(ranks) for i in ranks[rank]]
            assert batches.setdefault(step, batch) == batch, f"step {step} differs between runs"
    return batches


def kill_at_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """SIGKILL as soon as the run has begun optimizer step ``step``."""
    deadline = time.monotonic() + TIMEOUT
    log = run_dir / "ids" / "rank_0.jsonl"
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        if log.exists() and f'"step": {step},' in log.read_text():
            return kill(process)
        assert not ended, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def state_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name: three networks and both optimizers."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    tensors = {
        f"{name}.{key}": value.clone()  # load_file maps the file, which a test may damage
        for name in ("G", "D", "G_ema")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }
    optimizers = torch.load(folder / "optimizers.pt", weights_only=True)
    for name, optimizer in optimizers.items():
        for index, moments in optimizer["state"].items():
            for key, value in moments.items():
                tensors[f"opt_{name}.{index}.{key}"] = value
    return tensors


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, differing


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
