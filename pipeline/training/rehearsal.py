"""Rehearse a run: ``train --dry-run`` reads the data, takes some steps and writes no file."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.config.schema import Config, flatten
from pipeline.config.sizes import gib
from pipeline.config.values import show, written
from pipeline.config.yaml_file import Plain
from pipeline.data.loader import open_data
from pipeline.runs.announce import cautions, data_cautions
from pipeline.runs.disk_use import checkpoint_bytes
from pipeline.runs.run_folder import saved_noise
from pipeline.runs.step_folders import CHECKPOINTS, committed, step_of
from pipeline.runtime import signals
from pipeline.runtime.files import nearest_existing
from pipeline.runtime.host import peak_memory
from pipeline.training.gan import GAN
from pipeline.training.inputs import InputReader
from pipeline.training.meter import Meter
from pipeline.training.order_choice import order_of_run

STEPS = 3
LONG_WAIT = 600.0
"""Seconds to the first picture from which a CPU is too slow for a configuration."""


def rehearse(
    config: Config,
    origins: Mapping[str, str],
    accelerator: Accelerator,
    precision: str,
    micro_batch: int,
    accumulation: int,
) -> bool:
    """Check data and networks, time three steps, and print on rank 0 what the run would take.

    Args:
        config: of the run.
        origins: where each value comes from, by ``section.key``.
        accelerator: the ranks of this launch.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        micro_batch: images per forward pass.
        accumulation: micro-batches per optimizer step on each rank.

    Returns:
        False if a stop signal ended it.

    Raises:
        UserError: what would end the run at its start, too.
    """
    tell = print if accelerator.is_main_process else _stay_silent
    for key, value in flatten(config).items():
        tell(f"{key} = {show(Plain(written(value)))}  [{origins[key]}]")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, record_ids=False))
    done = [step_of(path) for path in committed(Path(config.run.dir).expanduser(), CHECKPOINTS)]
    start = max(done, default=0)
    try:
        index = open_data(config, accelerator)
    except signals.Stopped:
        return False
    gan, meter = GAN(config, accelerator, accumulation), Meter(accelerator, config.images_per_step)
    inputs = InputReader(
        *(config, index, order_of_run(config, index, accelerator), accelerator),
        micro_batch=micro_batch,
        meter=meter,
        start=start * config.optim.d_steps,
        noise=saved_noise(config),
    )
    with closing(inputs):
        seconds = _time_steps(config, gan, inputs, start)
    ranks, folder = accelerator.num_processes, Path(config.run.dir).expanduser()
    device, size, total = accelerator.device, config.model.image_size, config.train.total_steps
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tell(
        f"\ndevice      {name}, {precision}; batch of {config.data.batch_size} = "
        f"{ranks} rank(s) x {accumulation} micro-batch(es) x {micro_batch} images"
    )
    epochs = total * config.images_per_step / index.num_samples
    tell(
        f"data        {index.num_samples} images of {size}x{size}x{config.model.channels}; "
        f"{total} steps are {epochs:.1f} epochs"
    )
    if schedule := gan.schedules.describe():
        tell(f"schedule    {schedule}")
    rate = config.images_per_step / seconds
    tell(f"speed       {seconds:.3g} s a step (mean of {STEPS}), {rate:.0f} images/s")
    every = min(config.train.sample_every or total, total)
    first = (start // every + 1) * every - start
    if start:
        tell(f"resume      at step {start} of {total}")
    tell(f"first grid  in {_duration(first * seconds)}, at step {start + first}")
    tell(f"end         in {_duration(max(0, total - start) * seconds)}, at step {total}")
    tell(f"memory      {gib(peak_memory())} of a process{_gpu_memory(device)}")
    needed, free = checkpoint_bytes(config)[0], shutil.disk_usage(nearest_existing(folder)).free
    tell(f"disk        {gib(needed)} for checkpoints and snapshots, {gib(free)} free in {folder}")
    notes = cautions(config) + data_cautions(config, index.num_samples)
    if needed > free:
        notes.append("run.dir: the disk is too small; lower train.keep or raise checkpoint_every")
    if device.type == "cpu" and first * seconds > LONG_WAIT:
        small = "photos_64" if size > 32 and config.model.ngf > 32 else "photos_32"
        notes.append(
            f"the CPU needs {_duration(first * seconds)} to the first grid; end other programs, "
            f"train on a GPU, or take the small networks of configs/{small}.yaml"
        )
    for note in notes:
        tell(f"warning     {note}")
    tell("nothing was written; the same command without --dry-run trains", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return signals.received() is None


def _time_steps(config: Config, gan: GAN, inputs: InputReader, start: int) -> float:
    """Take one step and then ``STEPS`` more; return the mean seconds of the latter."""
    began = 0.0
    for step in range(start + 1, start + STEPS + 2):
        for turn in range(config.optim.d_steps):
            real, z, y = next(inputs)
            gan.update_D(real, z, step, y, turn)
        loss = gan.update_G(z, step, y, real)
        gan.update_average(step)
        if step == start + 1:
            loss.item()  # waits for the device
            began = time.perf_counter()
    loss.item()
    gan.guard.raise_if_tripped()
    return (time.perf_counter() - began) / STEPS


def _gpu_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", {gib(torch.cuda.max_memory_allocated(device))} of the GPU"


def _duration(seconds: float) -> str:
    """Return seconds in words: ``40 s``, ``3 min 20 s``, ``2 h 5 min``, ``6 d 3 h``."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                      (60, "min", 1, "s")):  # fmt: skip
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"


def _stay_silent(*_: object, **__: object) -> None:
    return
