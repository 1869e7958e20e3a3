"""mosaicml-streaming: a shuffled StreamingDataset. All ranks load rank 0's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streaming
import torch
from PIL import Image
from streaming.base.util import clean_stale_shared_memory
from torch import Tensor
from torchvision import transforms

from peers import Place

PACKAGES = ("mosaicml-streaming",)
FORMATS = ("jpg", "npy")
SEED = 0
TO_FLOAT = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def pack(files: Sequence[Path], folder: Path, per_shard: int) -> None:
    raw = files[0].suffix == ".npy"
    size = sum(file.stat().st_size for file in files) * per_shard // len(files)
    columns = {"image": "ndarray" if raw else "jpeg", "id": "int"}
    with streaming.MDSWriter(
        out=str(folder), columns=columns, hashes=["sha1"], size_limit=size
    ) as writer:
        for number, file in enumerate(files):
            image = np.load(file) if raw else Image.open(file)  # stored with the file's own bytes
            writer.write({"image": image, "id": number})


class Images(streaming.StreamingDataset):  # type: ignore[misc]
    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return TO_FLOAT(sample["image"]), sample["id"]


class Feed:
    def __init__(self, folder: Path, place: Place) -> None:
        clean_stale_shared_memory()  # its documented remedy after a kill
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        shards: dict[str, Any] = {"local": str(folder)}
        if place.checked:  # they are compared with SHA-1 when they are fetched
            shards = {"remote": str(folder), "local": str(folder / "cache")}
            shards["validate_hash"] = "sha1"
        dataset = Images(
            **shards,
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=place.rows,
        )
        self.loader: Any = streaming.StreamingDataLoader(
            dataset, batch_size=place.rows, num_workers=place.workers, drop_last=True
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, states: Sequence[Any]) -> None:
        self.loader.load_state_dict(states[0])


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    return Feed(folder, place)
