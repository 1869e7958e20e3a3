"""List the images of array files: .npy, .npz and HDF5."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.labels import KEYS, NO_LABEL, numbered, parse
from pipeline.data.pictures import DecodeError, Pixels, reason
from pipeline.data.source import Choice, Source, Stored, package, version_of
from pipeline.runtime.console import printable
from pipeline.runtime.errors import DataError

LARGEST_ARRAY = 16 << 30
"""Bytes of the largest array in an .npz file, which is unpacked in memory."""
IMAGE_KEYS = ("images", "image", "x", "data", "arr_0")
LABEL_KEYS = (*KEYS, "y")
CHANNELS = (1, 3, 4)
CHANNELS_FIRST = "the arrays are stored channels first, (N, C, H, W): turned to (N, H, W, C)"
BROKEN = (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, NotImplementedError)


def array_file(path: Path, choice: Choice) -> Source:
    """List the images of an .npy or .npz file: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W).

    An .npy file is mapped, not read. Of an .npz the arrays ``images``, ``x``, ``data`` or
    ``arr_0`` are used, or the only one that holds images; of ``x_train`` and ``x_test`` that of
    the split. Its labels are in ``labels``, ``y``, ...

    Raises:
        DataError: the file is damaged, or holds no such array.
    """
    if path.suffix == ".npy":
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except BROKEN as error:
            raise _damaged(path, error) from None
        return _source("npy", path, images, None, "", lambda: lambda: np.load(path, mmap_mode="r"))
    arrays = _Npz(path)
    key, label_key = _keys(arrays.shapes(), choice, path)
    labels = arrays.read(label_key) if label_key else None
    images = arrays.read(key)
    return _source("npz", path, images, labels, key, lambda: lambda: images)


def hdf5_file(path: Path, choice: Choice) -> Source:
    """List the images of an HDF5 file, by the same rules as an .npz file.

    Raises:
        DataError: the file is damaged or leads to other files, or holds no such array.
    """
    h5py = package("h5py", "h5py", path)
    try:
        with h5py.File(path, "r") as file:
            found: dict[str, Any] = {}
            _datasets(h5py, file, "", found, path)
            shapes = {name: (one.shape, one.dtype) for name, one in found.items()}
            key, label_key = _keys(shapes, choice, path)
            labels = found[label_key][()] if label_key else None
            images = found[key]
            probe = np.lib.stride_tricks.as_strided(
                np.zeros((), images.dtype), images.shape, [0] * images.ndim
            )
    except BROKEN as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, error) from None

    def opener() -> Callable[[], Any]:
        file = cache(lambda: h5py.File(path, "r"))  # by each worker for itself
        return lambda: file()[key]

    return _source("hdf5", path, probe, labels, key, opener)


def _datasets(h5py: Any, group: Any, prefix: str, found: dict[str, Any], path: Path) -> None:
    """Collect the arrays of a group; what leads to another file is refused."""
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise DataError(
                f"SOURCE ({path}): {printable(prefix + name)} is a link, which may lead to another "
                "file. Copy what it leads to: h5repack"
            )
        child = group[name]
        if isinstance(child, h5py.Group):
            if prefix.count("/") < 8:
                _datasets(h5py, child, f"{prefix}{name}/", found, path)
        elif isinstance(child, h5py.Dataset):
            if child.is_virtual or child.external:
                raise DataError(
                    f"SOURCE ({path}): {printable(prefix + name)} is kept in other files. Copy "
                    "them into one: h5repack"
                )
            found[prefix + name] = child


class _Npz:
    """The arrays of an .npz file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return (shape, dtype) of each array, from its header."""
        found = {}
        try:
            with zipfile.ZipFile(self._path) as archive:
                for entry in archive.infolist():
                    with archive.open(entry) as member:
                        version = np.lib.format.read_magic(member)
                        read = {
                            (1, 0): np.lib.format.read_array_header_1_0,
                            (2, 0): np.lib.format.read_array_header_2_0,
                        }[version]
                        shape, _, dtype = read(member, max_header_size=10_000)
                        found[entry.filename.removesuffix(".npy")] = shape, dtype
        except BROKEN as error:
            raise _damaged(self._path, error) from None
        return found

    def read(self, key: str) -> NDArray[Any]:
        """Return an array of at most ``LARGEST_ARRAY`` bytes; nothing is unpickled."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                entry = archive.getinfo(f"{key}.npy")
                if entry.file_size > LARGEST_ARRAY:
                    raise DataError(
                        f"SOURCE ({self._path}): {printable(key)} has {entry.file_size} bytes; at "
                        f"most {LARGEST_ARRAY} are read. Save it as an .npy file, which is mapped."
                    )
                with archive.open(entry) as member:
                    array: NDArray[Any] = np.lib.format.read_array(
                        member, allow_pickle=False, max_header_size=10_000
                    )
                    return array
        except BROKEN as error:
            if isinstance(error, DataError):
                raise
            raise _damaged(self._path, error) from None


def _keys(
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], choice: Choice, path: Path
) -> tuple[str, str | None]:
    """Return the names of the arrays of images and of labels."""
    split = f"_{choice.split}" if choice.split else ""
    images = [k for k, (shape, dtype) in shapes.items() if len(shape) >= 3 and dtype == np.uint8]
    wanted = [choice.image_field] if choice.image_field else [f"{k}{split}" for k in IMAGE_KEYS]
    key = next((k for k in wanted if k in images), None)
    if key is None and len(images) == 1 and not choice.image_field:
        key = images[0]
    if key is None:
        listed = ", ".join(
            f"{printable(k[:40])} {shape} {dtype}" for k, (shape, dtype) in list(shapes.items())[:9]
        )
        raise DataError(
            f"SOURCE ({path}): holds {listed or 'no arrays'}; images are uint8 (N, H, W), (N, H, "
            "W, C) or (N, C, H, W). Give --image-field NAME, or --split train for x_train."
        )
    count = shapes[key][0][0]
    labels = [k for k, (shape, _) in shapes.items() if shape[:1] == (count,) and len(shape) <= 2]
    names = [f"{k}{split}" for k in LABEL_KEYS]
    if choice.label_field:
        if choice.label_field not in labels:
            raise DataError(
                f"--label-field ({choice.label_field}): SOURCE ({path}) has no such array of "
                f"{count} labels; it has {', '.join(map(printable, labels)) or 'none'}."
            )
        return key, choice.label_field
    return key, next((k for k in names if k in labels), None)


def _source(
    kind: str,
    path: Path,
    images: NDArray[Any],
    labels: NDArray[Any] | None,
    key: str,
    opener: Callable[[], Callable[[], Any]],
) -> Source:
    """Make a source of an array; ``opener()()`` gives the array in a worker."""
    shape, said = images.shape, list[str]()
    first = len(shape) == 4 and shape[3] not in CHANNELS and shape[1] in CHANNELS
    if first:
        said.append(CHANNELS_FIRST)
    channels = shape[1] if first else shape[3] if len(shape) == 4 else 1
    if images.dtype != np.uint8 or len(shape) not in (3, 4) or channels not in CHANNELS:
        raise DataError(
            f"SOURCE ({path}): {printable(key)} has shape {shape} and dtype {images.dtype}; images "
            "are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1, 3 or 4. Convert it."
        )
    if not min(shape):
        raise DataError(f"SOURCE ({path}): holds no images: {shape}.")
    numbers, classes = np.full(shape[0], NO_LABEL, np.int32), tuple[str, ...]()
    if labels is not None:
        numbers, classes, bad = _labels(labels)
        if bad:
            said.append(f"{bad} labels are no number, name or one-hot row: not used")
    digest = hashlib.sha256(f"{shape}{version_of(path)}{key}".encode() + numbers.tobytes())

    def open_rows() -> Callable[[int], Stored]:
        array = opener()

        def read(row: int) -> Pixels:
            try:
                one = np.asarray(array()[row])
            except BROKEN as error:
                raise DecodeError(reason(error)) from None
            one = one.transpose(1, 2, 0) if first else one
            return np.ascontiguousarray(one[..., 0] if one.shape[2:] == (1,) else one)

        return read

    names = [f"{path.name}[{row}]" for row in range(shape[0])]
    return Source(
        kind, str(path), names, numbers, digest.hexdigest(), open_rows, classes, said=said
    )


def _labels(labels: NDArray[Any]) -> tuple[NDArray[np.int32], tuple[str, ...], int]:
    found, bad = [], 0
    for value in labels.tolist():
        try:
            found.append(parse(value))
        except (ValueError, OverflowError):
            found.append(None)
            bad += 1
    numbers, classes, unused = numbered(found)
    return numbers, classes, bad + unused


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"SOURCE ({path}): cannot be read: {reason(error)}. Get the file again.")
