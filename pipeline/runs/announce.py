"""Say what a training run is when it starts, and what it made when it ends."""

from __future__ import annotations

import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import torch

from pipeline.config.schema import Config
from pipeline.data.shards import Index
from pipeline.runs.identity import Identity
from pipeline.runs.step_folders import CHECKPOINTS, SNAPSHOTS, committed
from pipeline.runtime import signals
from pipeline.runtime.console import say
from pipeline.runtime.log_file import write_line

MOST_EPOCHS = 1000
CPU_WIDTH = 32
"""Largest model.ngf with which a CPU trains 64x64 within hours (configs/photos_64.yaml)."""


def record_start(ranks: int) -> None:
    """Write to log.txt: the command line, the versions, the commit, the host and its ranks."""
    names = ("torch", "accelerate", "numpy", "webdataset")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    write_line(f"command: {shlex.join(sys.argv)}")
    write_line(f"commit {_commit()}, Python {platform.python_version()}, {versions}")
    write_line(f"host {socket.gethostname()}, {ranks} rank(s)")


def say_start(
    config: Config,
    identity: Identity,
    index: Index,
    step: int,
    *,
    device: torch.device,
    precision: str,
    ranks: int,
    micro_batch: int,
    schedule: str,
) -> None:
    """Say whether the run is new, and on what and with which data it trains.

    Args:
        config: the configuration.
        identity: the run.
        index: the data set.
        step: steps done; 0 for a new run.
        device: the device of rank 0.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        ranks: number of ranks.
        micro_batch: images per forward pass on one rank.
        schedule: one line on the values that vary; "" if none does.
    """
    total, run = config.train.total_steps, f"run {identity.id} in {config.run.dir}"
    if step >= total:
        say(f"already finished: {run}, step {step}; train.total_steps above {step} trains it on")
        return _say_next(config)
    say(f"resuming {run} at step {step} of {total}" if step else f"new {run}: {total} steps")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    batch, height = config.data.batch_size, config.model.image_size
    accumulation = batch // (ranks * micro_batch)
    say(
        f"  {name}, {precision}; batch of {batch} = {ranks} rank(s) x {accumulation} "
        f"micro-batch(es) x {micro_batch} images"
    )
    epochs = total * config.images_per_step / index.num_samples
    say(
        f"  data {config.data.shards}: {index.num_samples} images of {height}x{height}x"
        f"{config.model.channels} in {len(index.shards)} shard(s); {total} steps are "
        f"{epochs:.1f} epochs"
    )
    if schedule:
        say(f"  schedule: {schedule}")
    lines = cautions(config) + data_cautions(config, index.num_samples)
    if ranks == 1 and config.train.grad_dtype != "fp32":
        lines.append("train.grad_dtype (bf16): no effect, one process sends no gradients")
    for line in lines + device_cautions(config, device):
        say(f"  warning: {line}")


def warn_of_groups(before: int, now: int, ranks: int) -> None:
    """Say that the images per BatchNorm group, ``before`` the resume, are others now."""
    say(
        f"micro-batch was {before}, is {now} on {ranks} process(es): BatchNorm groups change from "
        f"here on. Set train.micro_batch={before} to keep the computation the same."
    )


def cautions(config: Config) -> list[str]:
    """Return a line for every combination of values that is allowed but rarely meant."""
    stability, batch = config.stability, config.data.batch_size
    penalised = stability.r1_gamma or stability.r2_gamma
    lines = []
    if penalised and stability.r1_every > 1 and config.model.loss == "relativistic":
        lines.append(
            f"stability.r1_every ({stability.r1_every}): model.loss=relativistic relies on R1 and "
            "R2 to converge; 1 applies them in every update"
        )
    if penalised and stability.penalty == "random" and batch < 1024:
        lines.append(
            f"stability.penalty (random): noisy with data.batch_size ({batch}) below 1024; tangent "
            "is exact"
        )
    end, total = config.schedule.end, config.train.total_steps
    if end > total:
        lines.append(f"schedule.end ({end}): beyond train.total_steps ({total})")
    return lines


def say_stopped(step: int) -> None:
    """Say that a signal ended a run after a step, and how to go on."""
    by = signals.received() or "another rank's signal"
    say(f"stopped by {by} at step {step}; run the same command again to go on")


def data_cautions(config: Config, images: int) -> list[str]:
    """Return a line for a batch or a length of a run that does not suit the number of images."""
    batch, lines = config.data.batch_size, []
    if batch > images:
        lines.append(
            f"data.batch_size ({batch}): more than the {images} images of data.shards; each batch "
            f"has some twice. Use {max(2, images // 2)} or less, or more images"
        )
    epochs = config.train.total_steps * config.images_per_step / images
    most_steps = MOST_EPOCHS * images // config.images_per_step
    remedy = "" if config.stability.augment else ", or set stability.augment"
    if epochs > MOST_EPOCHS:
        lines.append(
            f"train.total_steps ({config.train.total_steps}): {epochs:.0f} epochs of {images} "
            f"images; D learns so few by heart. Lower it to {most_steps}{remedy}"
        )
    return lines


def device_cautions(config: Config, device: torch.device) -> list[str]:
    """Return a line for a network that takes hours to the first grid on a CPU."""
    model = config.model
    width = max(model.ngf, model.ndf)
    if device.type != "cpu" or model.image_size < 64 or width <= CPU_WIDTH:
        return []
    return [
        f"model.ngf, model.ndf ({width}): on a CPU the first grid of {model.image_size}x"
        f"{model.image_size} takes hours, and the run days; --dry-run says how many. Train on a "
        "GPU, or take the small networks of configs/photos_64.yaml"
    ]


def say_end(config: Config, step: int) -> None:
    """Say which files a finished run made, and which commands come next."""
    run = Path(config.run.dir).expanduser()
    say(f"finished at step {step}:")
    samples = sorted((run / "samples").glob("step_*.png"))
    made = [*committed(run, CHECKPOINTS)[-1:], *committed(run, SNAPSHOTS)[-1:], *samples[-1:]]
    for path in made:
        say(f"  {path}")
    _say_next(config)


def _say_next(config: Config) -> None:
    run = shlex.quote(config.run.dir)
    say(f"  score it:  python -m pipeline.evaluate --run {run} --pending")
    say(f"  images:    python -m pipeline.generate grid --run {run} --out grid.png")


def _commit() -> str:
    """Return the git commit of the checkout, with ``-dirty`` if files differ; else "unknown"."""
    root = Path(__file__).resolve().parents[2]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        return "unknown"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def project_address() -> str:
    """Return where this project is: of its package, else of the checkout's origin; "" = unknown."""
    for entry in metadata("dcgan-pipeline").get_all("Project-URL") or []:
        return str(entry).rpartition(", ")[2]
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return public_address(done.stdout.strip())


def public_address(remote: str) -> str:
    """Return the https address of a git remote, without a login; "" if it is a path."""
    found = re.fullmatch(r"(?:https?://(?:[^@/]*@)?|git@)([^:/]+)[:/](.+?)(?:\.git)?", remote)
    return f"https://{found[1]}/{found[2]}" if found else ""
