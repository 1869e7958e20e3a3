"""What the updates are given: images, z and classes of the right rows, on any number of ranks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config, DataConfig, ModelConfig, RunConfig
from pipeline.data.loader import Loader, make_order, normalise
from pipeline.data.shards import read_index
from pipeline.models.noise import BY_BATCH, append_classes, draw_z, rng, training_z
from pipeline.training.inputs import InputReader, Inputs, ToDevice
from pipeline.training.meter import Meter

CPU = torch.device("cpu")


def config_of(shards: Path, classes: int = 0) -> Config:
    return Config(
        run=RunConfig(seed=3),
        model=ModelConfig(image_size=32, channels=1, z_dim=5, num_classes=classes),
        data=DataConfig(shards=str(shards), batch_size=8, workers=0),
    )


def read(
    config: Config, count: int, *, rank: int = 0, ranks: int = 1, start: int = 0, **options: Any
) -> list[Any]:
    """Inputs of ``count`` updates as one of several ranks, in micro-batches of two."""
    index = read_index(config.data.shards)
    place: Any = SimpleNamespace(process_index=rank, num_processes=ranks, device=CPU)
    reader = InputReader(
        *(config, index, make_order(config, index), place),
        micro_batch=2,
        meter=Meter(Accelerator(cpu=True), 8),
        start=start,
        **options,
    )
    with closing(reader):
        return [next(reader) for _ in range(count)]


def joined(parts: list[Inputs], name: str) -> Tensor:
    return torch.cat([tensor for inputs in parts for tensor in getattr(inputs, name)])


@pytest.mark.parametrize("classes", [0, 10])
def test_an_update_gets_the_images_and_the_noise_of_its_number(
    training_shards: Path, classes: int
) -> None:
    """Update 5 takes batch 5 of the loader and rows 40 to 47 of z, however one arrives there."""
    config = config_of(training_shards, classes)
    index = read_index(config.data.shards)
    with closing(Loader(config, index, make_order(config, index)).batches(5)) as batches:
        batch = next(batches)
    labels = torch.from_numpy(batch.labels)
    z = append_classes(config.model, training_z(config.model, 3, 40, 8, 8), labels)
    for inputs in (read(config, 6)[-1], read(config, 1, start=5)[0]):
        assert [len(part) for part in inputs.real] == [2, 2, 2, 2]
        assert torch.equal(joined([inputs], "real"), normalise(batch.images, CPU))
        assert torch.equal(joined([inputs], "z"), z)
        if classes:
            assert torch.equal(joined([inputs], "y"), labels)
        else:
            assert inputs.y is None


def test_ranks_share_the_inputs_of_one(training_shards: Path) -> None:
    """The rows of two ranks, one after the other, are those of a single process."""
    config = config_of(training_shards, 10)
    for alone, *parts in zip(
        read(config, 3), *(read(config, 3, rank=rank, ranks=2) for rank in range(2)), strict=True
    ):
        for name in Inputs._fields:
            assert torch.equal(joined(parts, name), joined([alone], name))


def test_a_run_from_before_goes_on_with_its_z(training_shards: Path) -> None:
    """By the rule ``batch`` update 5 takes the z of ("z", 5)."""
    (inputs,) = read(config_of(training_shards), 1, rank=1, ranks=2, start=5, noise=BY_BATCH)
    z = draw_z(config_of(training_shards).model, 8, rng(3, "z", 5))
    assert torch.equal(joined([inputs], "z"), z[4:])


def test_mirrored_images_depend_on_seed_and_place_alone(training_shards: Path) -> None:
    """About half of the images, others in each update; equal on two ranks and from the middle."""
    plain = config_of(training_shards, 10)
    config = replace(plain, train=replace(plain.train, mirror=True))
    original, mirrored = read(plain, 40), read(config, 40)
    flipped = []
    for before, after in zip(original, mirrored, strict=True):
        x, found = joined([before], "real"), joined([after], "real")
        chosen = rng(3, "mirror", len(flipped))
        flips = torch.rand(8, generator=chosen) < 0.5
        assert torch.equal(found, torch.where(flips[:, None, None, None], x.flip(3), x))
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(joined([before], "z"), joined([after], "z"))
        flipped.append(flips)
    assert 120 < int(torch.stack(flipped).sum()) < 200  # of 320
    assert len({tuple(flips.tolist()) for flips in flipped}) > 30
    parts = [read(config, 3, rank=rank, ranks=2, start=7) for rank in range(2)]
    for whole, *shares in zip(mirrored[7:10], *parts, strict=True):
        assert torch.equal(joined(shares, "real"), joined([whole], "real"))


def test_what_is_sent_to_the_device_arrives() -> None:
    """Values, types and order of several tensors, none of them changed."""
    given = [torch.arange(12, dtype=torch.uint8).view(3, 4), torch.randn(5), torch.tensor([7])]
    moved = ToDevice(CPU)(*given)
    assert [tensor.dtype for tensor in moved] == [torch.uint8, torch.float32, torch.int64]
    assert all(torch.equal(a, b) for a, b in zip(given, moved, strict=True))
