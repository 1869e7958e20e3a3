"""Find and read the IDX files of Fashion-MNIST, and of other data sets in its format."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from pipeline.data.pictures import Pixels, reason
from pipeline.runtime.documents import DamagedFile, open_regular
from pipeline.runtime.errors import DataError

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
DOWNLOAD_FOLDER = "~/.cache/dcgan-pipeline/fashion-mnist"
IDX_PREFIX = {"train": "train", "test": "t10k"}
LARGEST_IDX = 2 << 30
"""Bytes of the largest IDX file, unpacked: it is held in memory. EMNIST's largest has 0.6 GB."""


def idx_folder(path: Path, name: str | None) -> tuple[Path, str] | None:
    """Return (folder of IDX files, prefix of their names) below a folder; None if there are none.

    Args:
        path: the folder of the files, or torchvision's root with MNIST/raw in it.
        name: which of several sets, as EMNIST has them: ``letters``, ``balanced``, ...

    Raises:
        DataError: there are several sets, and none or another was named.
    """
    ends = [
        f"{part}-images{dot}idx3-ubyte{gz}"
        for part in ("train", "t10k", "test")
        for dot in "-."
        for gz in ("", ".gz")
    ]
    folders = [
        path,
        *(
            path / one
            for one in (
                "raw",
                "MNIST/raw",
                "EMNIST/raw",
                "FashionMNIST/raw",
                "KMNIST/raw",
                "QMNIST/raw",
                "gzip",
            )
        ),
    ]
    found = {}
    for folder in folders:
        for file in sorted(folder.glob("*-images*ubyte*")):
            for end in ends:
                if file.name.endswith(end):
                    found[file.name.removesuffix(end)] = folder
    chosen = [prefix for prefix in found if name is None or f"-{name}-" in f"-{prefix}"]
    if len(chosen) == 1:
        return found[chosen[0]], chosen[0]
    if found and (name is not None or len(found) > 1):
        sets = ", ".join(sorted(prefix.strip("-").removeprefix("emnist-") for prefix in found))
        raise DataError(
            f"SOURCE ({path}): holds several sets of IDX files. Give --image-field with one of "
            f"{sets or 'no name'}."
        )
    return None


def idx_file(folder: Path, split: str, what: str, prefix: str = "") -> Path | None:
    """Return the IDX file of the ``images`` or ``labels`` of a split, None if there is none."""
    kind = {"images": "idx3-ubyte", "labels": "idx1-ubyte"}[what]
    parts = ("t10k", "test") if split == "test" else ("train",)
    stems = [f"{prefix}{part}-{what}{dot}{kind}" for part in parts for dot in "-."]
    files = [folder / f"{stem}{end}" for stem in stems for end in ("", ".gz")]
    return next((file for file in files if file.is_file()), None)


def read_idx(folder: Path, split: str, what: str, dimensions: int, prefix: str = "") -> Pixels:
    """Return the uint8 array of an IDX file, whose length must be exactly that of its header.

    Raises:
        DataError: there is no such file, it is damaged, or larger than ``LARGEST_IDX``.
        OSError: it cannot be read, which is no damage.
    """
    path = idx_file(folder, split, what, prefix)
    if path is None:
        raise DataError(
            f"{folder}: has no file {IDX_PREFIX[split]}-{what}-idx{dimensions}-ubyte[.gz]."
        )
    try:
        with open_regular(path) as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return _array(cast(IO[bytes], unpacked), path, dimensions)
            return _array(file, path, dimensions)
    except (gzip.BadGzipFile, EOFError, zlib.error, DamagedFile) as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}. Get the file again.") from None


def _array(file: IO[bytes], path: Path, dimensions: int) -> Pixels:
    """Read the header and as many bytes as it says; an archive may unpack to more than memory."""
    head = 4 + 4 * dimensions
    raw = file.read(head)
    shape = tuple(np.frombuffer(raw[4:], ">u4").tolist()) if len(raw) == head else ()
    size = math.prod(shape)
    if size > LARGEST_IDX:
        raise DataError(
            f"{path}: its header says {shape}, {size} bytes; at most {LARGEST_IDX} are read. Put "
            "the images into a folder or a zip archive."
        )
    values = file.read(size + 1)
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(values) != size:
        found = f"{head + size} bytes or more" if len(values) > size else len(raw) + len(values)
        raise DataError(
            f"{path}: {found} bytes do not fit an IDX header of uint8 with {dimensions} "
            f"dimensions {shape}: damaged or another file. Get it again."
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def fashion_mnist(split: str, idx: str | None, download: bool) -> Path:
    """Return the folder of Fashion-MNIST's IDX files; download them if no folder has them."""
    if idx is not None:
        if idx_file(Path(idx).expanduser(), split, "images") is None:
            raise DataError(
                f"--idx ({idx}): must be a folder with {IDX_PREFIX[split]}-images-idx3-ubyte[.gz] "
                f"and {IDX_PREFIX[split]}-labels-idx1-ubyte[.gz]."
            )
        return Path(idx).expanduser()
    package = Path(os.environ.get("FASHION_MNIST_FOLDER", DEBIAN_FOLDER))
    cache = Path(os.environ.get("FASHION_MNIST_CACHE", DOWNLOAD_FOLDER)).expanduser()
    raw = cache / "FashionMNIST" / "raw"  # torchvision's own layout
    for folder in (package, raw):
        if idx_file(folder, split, "images") and idx_file(folder, split, "labels"):
            return folder
    refused = "not tried: --no-download"
    if download:
        try:
            from torchvision.datasets import FashionMNIST  # imports torch: seconds

            FashionMNIST(str(cache), train=split == "train", download=True)  # checks the md5 sums
            return raw
        except (ImportError, OSError, RuntimeError) as error:
            refused = f"failed: {reason(error)}"
    raise DataError(
        f"fashion-mnist: not found in {package} or {raw}. One of these gives it: "
        "(1) --idx FOLDER, a folder with the four original IDX files, gzipped or not; "
        "(2) the Debian package: apt-get install dataset-fashion-mnist; "
        f"(3) torchvision's checksummed download, on a machine with network ({refused})."
    )
