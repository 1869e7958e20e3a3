"""Data loaders of other packages, and ours, behind one interface.

    pip install -e '.[peers]'    # in an environment of its own: mosaicml-streaming needs numpy 2.1

Each module packs image files in the way that its package documents and loads them in the way that
it recommends for training. `benchmarks/resume_suite.py` compares what they do,
`benchmarks/loader.py` how fast. A peer that is not installed is a row "not installed".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MODULES = {
    "ours": "ours",
    "webdataset": "stock_webdataset",
    "webdataset, resampled": "resampled_webdataset",
    "litdata": "lit",
    "mosaicml-streaming": "mosaic",
    "megatron-energon": "energon",
    "ImageFolder": "image_folder",
    "ImageFolder, StatefulDataLoader": "stateful_image_folder",
}


@dataclass(frozen=True)
class Place:
    """Rank of ``ranks``, with ``workers`` processes, that loads ``rows`` images of each batch.

    ``checked``: with the package's own checks of shards, if it has some.
    """

    rank: int = 0
    ranks: int = 1
    workers: int = 2
    rows: int = 128
    checked: bool = False


class Feed(Protocol):
    """Batches of one rank."""

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (n, 3, H, W) float32 in [-1, 1] and ids (n,) of an epoch, or of its rest."""
        ...

    def state(self) -> Any:
        """Return the state after the last batch, to be stored; None: the package has none."""
        ...

    def load(self, states: Sequence[Any]) -> None:
        """Take the states of all ranks of the run that ended."""
        ...


class Peer(Protocol):
    """A module of this package. An image's id is its place in ``files``."""

    PACKAGES: tuple[str, ...]
    """Distributions; the first gives the peer its name."""
    FORMATS: tuple[str, ...]
    """Of jpg, png and npy."""

    def pack(self, files: Sequence[Path], folder: Path, per_shard: int) -> None:
        """Write the images into ``folder``, with the bytes of the files."""
        ...

    def open_feed(self, folder: Path, suffix: str, place: Place) -> Feed:
        """Open what ``pack`` has written."""
        ...


def find(name: str) -> Peer:
    """Import a peer.

    Raises:
        ImportError: a package is not installed.
    """
    return cast(Peer, importlib.import_module(f"peers.{MODULES[name]}"))


def versions(peer: Peer) -> str:
    """Return the packages of a peer with their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in peer.PACKAGES)


def pixels(stored: bytes, suffix: str) -> NDArray[np.uint8]:
    """Decode as the documentations of most packages do: Pillow, numpy for npy."""
    if suffix == "npy":
        array: NDArray[np.uint8] = np.load(io.BytesIO(stored))
        return array
    return np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
