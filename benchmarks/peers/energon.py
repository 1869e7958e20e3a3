"""NVIDIA's megatron-energon: a train dataset in a savable loader; each rank stores its own state.

By its documentation another number of ranks gives the same global batches if ranks x workers and
the micro-batch stay the same. Its command `energon checkpoint redist` converts the states. The
micro-batch here is 8; a rank loads as many as make its rows. Damaged samples are skipped with a
line by default.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.task_encoder import DefaultTaskEncoder
from torch import Tensor

from peers import Place, stock_webdataset

PACKAGES = ("megatron-energon",)
FORMATS = ("jpg", "npy")
MICRO_BATCH = 8
COMMAND = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()"]


def pack(files: Sequence[Path], folder: Path, per_shard: int) -> None:
    """Write tars with webdataset; `energon prepare` makes indexes and metadata."""
    stock_webdataset.pack(files, folder, per_shard)
    fields = f'{{"image": "{files[0].suffix[1:]}", "label": "cls"}}'
    words = ["prepare", str(folder), "--non-interactive", "--split-parts", "train:.*"]
    words += ["--sample-type", "ImageClassificationSample", "--field-map", fields]
    subprocess.run([*COMMAND, *words, "--num-workers", "2"], check=True, capture_output=True)


class Feed:
    def __init__(self, folder: Path, suffix: str, place: Place) -> None:
        self.raw, self.place = suffix == "npy", place
        self.micro = place.rows // MICRO_BATCH
        dataset: Any = get_train_dataset(
            str(folder),
            worker_config=WorkerConfig(
                rank=place.rank, world_size=place.ranks, num_workers=place.workers
            ),
            batch_size=MICRO_BATCH,
            shuffle_buffer_size=100,
            max_samples_per_sequence=100,
            task_encoder=DefaultTaskEncoder(),
            repeat=False,
        )
        self.loader: Any = get_savable_loader(dataset)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        found = iter(self.loader)
        while micro := list(islice(found, self.micro)):
            images = torch.cat([torch.from_numpy(np.asarray(batch.image)) for batch in micro])
            if self.raw:
                images = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
            yield images.mul(2).sub(1), torch.cat([torch.as_tensor(b.label) for b in micro])

    def state(self) -> Any:
        return self.loader.save_state_rank()

    def load(self, states: Sequence[Any]) -> None:
        if len(states) != self.place.ranks:
            states = redistribute(states, self.place.ranks)
        self.loader.restore_state_rank(states[self.place.rank])


def redistribute(states: Sequence[Any], ranks: int) -> list[Any]:
    """Convert the states of all ranks to those of another number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"state_{rank}.pt") for rank in range(len(states))]
        for file, state in zip(files, states, strict=True):
            torch.save(state, file)
        out = Path(folder, "new")
        out.mkdir()
        words = ["checkpoint", "redist", "--new-world-size", str(ranks), *map(str, files), str(out)]
        subprocess.run([*COMMAND, *words], check=True, capture_output=True)
        return [torch.load(out / f"state_{k}.pt", weights_only=False) for k in range(ranks)]


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    return Feed(folder, suffix, place)
