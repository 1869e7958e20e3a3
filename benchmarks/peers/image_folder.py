"""torchvision's ImageFolder in a DataLoader: an interrupted epoch begins anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from torchvision.datasets import DatasetFolder, ImageFolder

from peers import Place

PACKAGES = ("torchvision", "torch")
FORMATS = ("jpg", "png", "npy")
SEED = 0
TO_FLOAT = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def load_npy(path: str) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = np.load(path)
    return array


def pack(files: Sequence[Path], folder: Path, per_shard: int) -> None:
    """Link the files into folders of ``per_shard`` images; ImageFolder sorts them by name."""
    for number, file in enumerate(files):
        place = folder / f"{number // per_shard:06d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}{file.suffix}").write_bytes(file.read_bytes())


def open_files(folder: Path, suffix: str) -> Any:
    """Return the data set with the number of an image as its label."""
    if suffix == "npy":
        found: Any = DatasetFolder(str(folder), load_npy, (".npy",), transform=TO_FLOAT)
    else:
        found = ImageFolder(str(folder), TO_FLOAT)
    found.samples = [(path, number) for number, (path, _) in enumerate(found.samples)]
    return found


class Feed:
    def __init__(self, folder: Path, suffix: str, place: Place) -> None:
        files = open_files(folder, suffix)
        self.sampler: Any = DistributedSampler(files, place.ranks, place.rank, seed=SEED)
        self.loader = DataLoader(
            files,
            batch_size=place.rows,
            sampler=self.sampler,
            num_workers=place.workers,
            drop_last=True,
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(number)
        yield from self.loader

    def state(self) -> Any:
        return None

    def load(self, states: Sequence[Any]) -> None:
        """There is nothing to load."""


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    return Feed(folder, suffix, place)
