"""Our loader: the state is the number of the next batch, the same on all ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers import Place, stock_webdataset
from pipeline.config.schema import Config, DataConfig, ModelConfig
from pipeline.data.loader import Loader, make_order, normalise, open_data
from pipeline.data.shards import read_index
from pipeline.runtime.launch import make_accelerator

PACKAGES = ("dcgan-pipeline",)
FORMATS = ("jpg", "png", "npy")


def pack(files: Sequence[Path], folder: Path, per_shard: int) -> None:
    """Write tars with webdataset and index them where they are."""
    stock_webdataset.pack(files, folder, per_shard)
    command = [sys.executable, "-m", "pipeline.prepare", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


class Feed:
    def __init__(self, folder: Path, place: Place) -> None:
        index = read_index(str(folder))
        size, _, channels = index.shape
        config = Config(
            model=ModelConfig(image_size=size, channels=channels),
            data=DataConfig(
                shards=str(folder),
                batch_size=place.rows * place.ranks,
                workers=place.workers,
                verify="auto" if place.checked else "size",
            ),
        )
        index = open_data(config, make_accelerator("fp32"))
        self.loader = Loader(config, index, make_order(config, index), place.rank, place.ranks)
        self.per_epoch = index.num_samples // config.data.batch_size
        self.next = 0

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        with closing(self.loader.batches(self.next)) as batches:
            for batch in batches:
                self.next += 1
                yield normalise(batch.images, torch.device("cpu")), torch.from_numpy(batch.labels)
                if self.next == (number + 1) * self.per_epoch:
                    return

    def state(self) -> Any:
        # As before a checkpoint: what was read until here is compared with its checksum.
        self.loader.finish_check(self.next, lambda: False)
        return self.next

    def load(self, states: Sequence[Any]) -> None:
        self.next = states[0]


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    """Open the shards; the index knows how they are stored."""
    return Feed(folder, place)
