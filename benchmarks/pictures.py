"""The same images in every format: as shards and as files, for the benchmarks."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.cache import Cache
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, read_index
from pipeline.data.source import Choice
from pipeline.data.sources import find

FORMATS = ("npy", "jpg", "png")


def prepare(source: list[str], out: Path, size: int, kind: str, channels: int = 3) -> Index:
    command = [sys.executable, "-m", "pipeline.prepare", *source, "--out", str(out)]
    shape = ["--size", str(size), "--channels", str(channels)]
    subprocess.run(
        [*command, *shape, "--format", kind, "--shard-mib", "8"], check=True, capture_output=True
    )
    return read_index(str(out))


def fashion_mnist(images: int, folder: Path) -> list[str]:
    """Write the first images as IDX files; return the arguments of ``pipeline.prepare``."""
    source = find("fashion-mnist", Choice())
    read = source.opener()
    pixels = np.stack([np.asarray(read(row)) for row in range(min(images, len(source.names)))])
    return _as_idx(pixels, source.labels[:images].astype(np.uint8), folder)


def synthetic(images: int, folder: Path) -> list[str]:
    """Write smooth random images of 28x28 as IDX files, where Fashion-MNIST is not at hand."""
    coarse = np.random.default_rng(0).integers(0, 256, (images, 7, 7), np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(one).resize((28, 28))) for one in coarse])
    return _as_idx(pixels, (np.arange(images) % 10).astype(np.uint8), folder)


def _as_idx(pixels: NDArray[np.uint8], labels: NDArray[np.uint8], folder: Path) -> list[str]:
    folder.mkdir()
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(head + array.tobytes())
    return ["fashion-mnist", "--idx", str(folder)]


def payloads(index: Index) -> Iterator[tuple[int, bytes]]:
    """Yield (label, stored bytes) of every sample in the order of the index."""
    starts = index.starts
    for number, shard in enumerate(index.shards):
        content = (Path(index.location) / shard.url).read_bytes()
        for row in index.table[starts[number] : starts[number + 1]]:
            offset, length, label = (int(row[name]) for name in ("offset", "length", "label"))
            yield label, content[offset : offset + length]


def as_files(index: Index, root: Path) -> Path:
    """Write the stored bytes as a file per image in a folder per class, for ImageFolder."""
    for k, (label, payload) in enumerate(payloads(index)):
        folder = root / f"{max(label, 0):03d}"
        if k < 1000:
            folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:06d}.{index.field}").write_bytes(payload)
    return root


def check_same_pixels(index: Index) -> None:
    """Check that our decoder gives the same pixels as Pillow, the baselines' decoder."""
    out = np.empty((32, *index.shape), np.uint8)
    Reader(index, Cache(index, "")).read(np.arange(32), out)
    for ours, (_, payload) in zip(out, payloads(index), strict=False):
        assert np.array_equal(ours, np.asarray(Image.open(io.BytesIO(payload))))
