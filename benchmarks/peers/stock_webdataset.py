"""webdataset's documented loader of a finite data set: shards split by node and worker.

It has no state. Its maintainer's advice for restarts is resampling (webdataset/webdataset issues
177 and 234): see `resampled_webdataset`. Here an interrupted epoch begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds
from torch import Tensor
from torchvision import transforms

from peers import Place

PACKAGES = ("webdataset",)
FORMATS = ("jpg", "png", "npy")
TO_FLOAT = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def pack(files: Sequence[Path], folder: Path, per_shard: int) -> None:
    folder.mkdir(parents=True)
    pattern = str(folder / "shard-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for number, file in enumerate(files):
            key, suffix = f"{number:08d}", file.suffix[1:]
            writer.write({"__key__": key, suffix: file.read_bytes(), "cls": str(number).encode()})


class Feed:
    def __init__(self, folder: Path, suffix: str, place: Place, *, resampled: bool = False) -> None:
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        dataset = (
            wds.WebDataset(
                urls,
                resampled=resampled,
                shardshuffle=not resampled and len(urls),
                nodesplitter=wds.split_by_node,
            )
            .shuffle(1000)
            .decode("pil")
            .to_tuple(suffix, "cls")
            .map_tuple(TO_FLOAT, int)
            .batched(place.rows, partial=False)
        )
        self.loader = wds.WebLoader(
            dataset, batch_size=None, shuffle=False, num_workers=place.workers
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.loader

    def state(self) -> Any:
        return None

    def load(self, states: Sequence[Any]) -> None:
        """There is nothing to load."""


def open_feed(folder: Path, suffix: str, place: Place) -> Feed:
    return Feed(folder, suffix, place)
