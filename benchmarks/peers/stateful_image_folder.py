"""ImageFolder in torchdata's StatefulDataLoader with its StatefulDistributedSampler.

Each rank stores its own state. The package "handles aggregation and distribution of state across
multiprocess workers (but not across ranks)": for another number of ranks no way is documented.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from peers import Place, image_folder

PACKAGES, FORMATS, pack = ("torchdata", "torchvision"), ("jpg", "npy"), image_folder.pack


class Feed:
    def __init__(self, folder: Path, suffix: str, place: Place) -> None:
        files = image_folder.open_files(folder, suffix)
        self.rank = place.rank
        self.sampler: Any = StatefulDistributedSampler(
            files, place.ranks, place.rank, seed=image_folder.SEED
        )
        self.loader: Any = StatefulDataLoader(
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
        return self.loader.state_dict()

    def load(self, states: Sequence[Any]) -> None:
        self.loader.load_state_dict(states[self.rank])


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    return Feed(folder, suffix, place)
