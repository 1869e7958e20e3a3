"""litdata: a shuffled StreamingDataset in a StreamingDataLoader. All ranks load rank 0's state.

The documentation names `torch.save(dataloader.state_dict(), ...)` and `load_state_dict`. Another
number of ranks or workers is its "elastic" resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
import torchvision  # noqa: F401  else each worker imports it, for seconds
from PIL import Image
from torch import Tensor

from peers import Place

PACKAGES = ("litdata",)
FORMATS = ("jpg", "npy")


def read(numbered: tuple[int, str]) -> dict[str, Any]:
    number, path = numbered
    if path.endswith(".npy"):
        return {"image": np.load(path), "id": number}
    return {"image": Image.open(path), "id": number}  # a JPEG file is stored with its own bytes


def pack(files: Sequence[Path], folder: Path, per_shard: int) -> None:
    litdata.optimize(
        fn=read,
        inputs=[(number, str(file)) for number, file in enumerate(files)],
        output_dir=str(folder),
        chunk_size=per_shard,
        num_workers=1,
        verbose=False,
    )


def from_jpeg(sample: dict[str, Any]) -> tuple[Tensor, int]:
    return sample["image"].to(torch.float32).div_(127.5).sub_(1.0), sample["id"]


def from_array(sample: dict[str, Any]) -> tuple[Tensor, int]:
    image = torch.as_tensor(sample["image"]).permute(2, 0, 1)
    return image.to(torch.float32).div_(127.5).sub_(1.0), sample["id"]


class Feed:
    def __init__(self, folder: Path, transform: Callable[..., Any], place: Place) -> None:
        dataset = litdata.StreamingDataset(
            str(folder), shuffle=True, drop_last=True, transform=transform
        )
        self.loader: Any = litdata.StreamingDataLoader(
            dataset, batch_size=place.rows, num_workers=place.workers
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, states: Sequence[Any]) -> None:
        self.loader.load_state_dict(states[0])


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    return Feed(folder, from_array if suffix == "npy" else from_jpeg, place)
