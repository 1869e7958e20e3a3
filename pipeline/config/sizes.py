"""How large the parts of a run are: micro-batches, and the memory that a node needs at least."""

from __future__ import annotations

import math

from pipeline.config.schema import Config, ModelConfig, flatten
from pipeline.runtime.errors import ConfigError, LaunchError

FLOAT = 4  # bytes of a number in fp32


def micro_batching(config: Config, world_size: int) -> tuple[int, int]:
    """Return (micro_batch, accumulation): batch_size = world_size * accumulation * micro_batch.

    Raises:
        ConfigError: the batch cannot be divided evenly among the ranks.
    """
    batch, micro = config.data.batch_size, config.train.micro_batch
    unit = world_size * (micro or 1)
    if batch % unit:
        lower, upper = batch // unit * unit, (batch // unit + 1) * unit
        choice = f"{lower} or {upper}" if lower else f"{upper}"
        parts = f"world_size ({world_size})"
        if micro:
            parts += f" x train.micro_batch ({micro}) = {unit}"
        raise ConfigError(
            f"data.batch_size ({batch}) must be divisible by {parts}: use {choice}, "
            "or another number of processes."
        )
    micro = micro or batch // world_size
    if micro == 1:
        raise ConfigError(
            f"data.batch_size ({batch}): 1 image per rank, but BatchNorm needs at least 2; use "
            f"{2 * world_size} or more, or fewer processes."
        )
    return micro, batch // (world_size * micro)


def micro_batch_advice(config: Config, world_size: int) -> str:
    """Return the advice for a training that is out of memory: a smaller ``train.micro_batch``."""
    batch, micro = config.data.batch_size, config.train.micro_batch
    micro = micro or batch // world_size
    smaller = [m for m in range(2, micro) if batch % (m * world_size) == 0]
    lower = f"model.ngf ({config.model.ngf}) and model.ndf ({config.model.ndf})"
    if not smaller:
        return f"train.micro_batch ({micro}) cannot be smaller; lower {lower}."
    return (
        f"train.micro_batch ({micro}) images pass through the networks at once; set "
        f"train.micro_batch={smaller[-1]} or a smaller divisor of data.batch_size ({batch}): the "
        f"same batch in more accumulation steps. If that is not enough, lower {lower}."
    )


def require_memory(config: Config, world_size: int, local_processes: int, memory: int) -> None:
    """Raise if the processes of a node cannot hold the networks and the prefetched batches.

    Called before anything is allocated: Linux grants more than there is, and kills later.

    Args:
        config: of the run.
        world_size: number of all ranks.
        local_processes: number of ranks on this node.
        memory: bytes of this node.

    Raises:
        LaunchError: naming the keys to lower.
    """
    data, model = config.data, config.model
    queues, slots = max(1, data.workers), data.prefetch + 2
    image = math.prod(model.image_shape) + 16  # with label and id
    ring = queues * slots * -(-data.batch_size // world_size) * image
    weights = FLOAT * (2 * generator_size(model) + discriminator_size(model))
    for needed, keys, use in (
        (weights, ("model.ngf", "model.ndf", "model.z_dim"), "G, its average and D"),
        (
            ring,
            ("data.prefetch", "data.workers", "data.batch_size"),
            "the batches that are decoded ahead",
        ),
    ):
        if needed * local_processes > memory:
            values = flatten(config)
            named = ", ".join(f"{key} ({values[key]})" for key in keys)
            raise LaunchError(
                f"{named}: {use} need {gib(needed)} in each of {local_processes} "
                f"process(es), more than the {gib(memory)} of memory of this machine or job. "
                "Lower one of them."
            )


def generator_size(model: ModelConfig) -> int:
    """Return the number of G's weights, without those that are one per unit."""
    inputs, pixels = model.z_dim + model.num_classes, math.prod(model.image_shape)
    if model.architecture == "mlp":
        return model.ngf * (inputs + model.ngf + pixels)
    widths = _widths(model, model.ngf)
    maps = sum(a * b for a, b in zip(widths, [model.channels, *widths], strict=False))
    return 16 * inputs * widths[-1] + maps * model.kernel_size**2


def discriminator_size(model: ModelConfig) -> int:
    """Return the number of D's weights, without those that are one per unit."""
    pixels = math.prod(model.image_shape)
    if model.architecture == "mlp":
        return model.ndf * max(1, model.maxout) * (pixels + model.num_classes + model.ndf)
    widths = _widths(model, model.ndf)
    maps = sum(a * b for a, b in zip(widths, [model.channels, *widths], strict=False))
    return 16 * (1 + model.num_classes) * widths[-1] + maps * model.kernel_size**2


def _widths(model: ModelConfig, first: int) -> list[int]:
    """Return the channels of a DCGAN's maps, from the image's side to the 4x4 map."""
    return [first * 2**k for k in range((model.image_size // 4).bit_length() - 1)]


def gib(size: int) -> str:
    """Return a number of bytes as ``1.5 GiB``."""
    return f"{size / 2**30:.1f} GiB"
