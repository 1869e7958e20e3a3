"""List the images of a folder, zip archive, IDX file or set of tars, and read them as squares.

A ``Source`` is a listing in a fixed order, made without decoding an image. ``reader`` reads the
images in a worker process; ``to_square`` crops and resizes them, for every kind of source.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.codecs import DecodeError, Pixels, flatten, open_pillow, read_npy, reason
from pipeline.data.shards import NO_LABEL, scan
from pipeline.runtime.errors import DataError

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
DOWNLOAD_FOLDER = "~/.cache/dcgan-pipeline/fashion-mnist"
IDX_PREFIX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Source:
    """A listing of N images.

    Args:
        kind: ``folder``, ``zip``, ``idx`` or ``tars``.
        location: the path, or ``fashion-mnist``.
        names: unique names in a fixed order; sorted for folders and zip archives.
        labels: int32 (N,), ``NO_LABEL`` where unknown.
        digest: hex sha256 that changes when an image is added, removed or renamed, or replaced by
            one of another size.
        classes: names of the classes, by label; empty if unknown.
        ignored: number of files that are no images, by extension.
        pixels: all images, uint8 (N, H, W), of an IDX file; None for other kinds.
        spans: (tar, offset, length, extension) of each image, for tars.
    """

    kind: str
    location: str
    names: Sequence[str]
    labels: NDArray[np.int32]
    digest: str
    classes: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    pixels: Pixels | None = None
    spans: Sequence[tuple[str, int, int, str]] = ()


def find(name: str, *, split: str, idx: str | None, download: bool) -> Source:
    """List the source that a user names: ``fashion-mnist``, a folder or a zip archive.

    Args:
        name: the source.
        split: ``train`` or ``test``; which IDX files to read.
        idx: folder of the IDX files of fashion-mnist; None = the usual places.
        download: whether fashion-mnist may be downloaded.

    Raises:
        DataError: the source does not exist, holds no images, or is damaged.
    """
    if name == "fashion-mnist":
        return _idx(_fashion_mnist(split, idx, download), split, name)
    path = Path(name).expanduser()
    if path.is_file() and zipfile.is_zipfile(path):
        return _zip(path)
    if not path.is_dir():
        found = "is not a zip archive" if path.exists() else "no such folder or file"
        raise DataError(
            f"SOURCE ({name}): {found}. Give a folder of images, of IDX files or of tars, a zip "
            "archive of images, or the word fashion-mnist."
        )
    if _idx_file(path, split, "images"):
        return _idx(path, split, name)
    tars = sorted(path.glob("*.tar"))
    return _tars(path, tars) if tars else _folder(path)


# -- the kinds ----------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
    names, sizes, ignored = [], [], Counter[str]()

    def walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = folder.stat()
        if (inode := (status.st_dev, status.st_ino)) in above:
            return  # a link to a folder that contains the link
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(folder / entry.name, f"{prefix}{entry.name}/", above | {inode})
            elif (suffix := PurePosixPath(entry.name).suffix.lower()) in SUFFIXES:
                names.append(f"{prefix}{entry.name}")
                sizes.append(entry.stat().st_size if entry.is_file() else -1)  # -1: dangling link
            else:
                ignored[suffix or "no extension"] += 1

    try:
        walk(root, "", frozenset())
    except OSError as error:
        raise DataError(f"SOURCE ({root}): cannot be listed: {error}.") from None
    return _listed("folder", root, names, sizes, ignored)


def _zip(path: Path) -> Source:
    names, sizes, ignored = [], [], Counter[str]()
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                parts = PurePosixPath(entry.filename).parts
                hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
                if entry.is_dir() or hidden:
                    continue
                if entry.flag_bits & 1:
                    raise DataError(f"SOURCE ({path}): encrypted; unpack it into a folder first.")
                if (suffix := PurePosixPath(entry.filename).suffix.lower()) in SUFFIXES:
                    names.append(entry.filename)
                    sizes.append(entry.CRC)
                else:
                    ignored[suffix or "no extension"] += 1
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"SOURCE ({path}): not a readable zip archive: {error}.") from None
    return _listed("zip", path, names, sizes, ignored)


def _listed(
    kind: str, path: Path, names: list[str], sizes: list[int], ignored: Counter[str]
) -> Source:
    """Sort the names, and label them by their top folders as torchvision's ImageFolder does."""
    if not names:
        types = ", ".join(f"{n} {suffix}" for suffix, n in ignored.most_common(5)) or "no files"
        raise DataError(
            f"SOURCE ({path}): holds no images (found: {types}). Known types are "
            f"{' '.join(SUFFIXES)}."
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    parts = [PurePosixPath(name).parts for name in names]
    # If all of an archive is in one folder, the name of this folder is no class.
    if kind == "zip" and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    classes = sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number.get(p[0], NO_LABEL) for p in parts], np.int32)
    digest = hashlib.sha256()
    for name, i in zip(names, order, strict=True):
        digest.update(f"{name}\0{sizes[i]}\0".encode("utf-8", "surrogateescape"))
    return Source(kind, str(path), names, labels, digest.hexdigest(), tuple(classes), dict(ignored))


def _tars(folder: Path, paths: list[Path]) -> Source:
    spans: list[tuple[str, int, int, str]] = []
    names, labels, digest = [], [], hashlib.sha256()
    for path in paths:
        shard, rows, extension = scan(path)
        digest.update(f"{shard.nsamples} {shard.sha256}\n".encode())
        for row, (offset, length, label) in enumerate(rows.tolist()):
            spans.append((path.name, offset, length, extension))
            names.append(f"{path.name}#{row}")
            labels.append(label)
    if not spans:
        raise DataError(f"SOURCE ({folder}): its {len(paths)} tars hold no images.")
    numbers = np.array(labels, np.int32)
    return Source("tars", str(folder), names, numbers, digest.hexdigest(), spans=spans)


def _idx(folder: Path, split: str, location: str) -> Source:
    pixels = _read_idx(folder, split, "images", 3)
    labels = _read_idx(folder, split, "labels", 1)
    if len(pixels) != len(labels) or not pixels.size:
        raise DataError(
            f"{folder}: the {split} split has {len(pixels)} images and {len(labels)} labels. There "
            "must be as many labels as images, and at least one. Get both files again."
        )
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    names = [f"{split}[{i}]" for i in range(len(pixels))]
    return Source("idx", location, names, labels.astype(np.int32), digest, pixels=pixels)


def _idx_file(folder: Path, split: str, what: str) -> Path | None:
    kind = {"images": "idx3-ubyte", "labels": "idx1-ubyte"}[what]
    stems = [f"{IDX_PREFIX[split]}-{what}{dot}{kind}" for dot in "-."]
    files = [folder / f"{stem}{end}" for stem in stems for end in ("", ".gz")]
    return next((file for file in files if file.is_file()), None)


def _read_idx(folder: Path, split: str, what: str, dimensions: int) -> Pixels:
    """Return the uint8 array of an IDX file, whose length must be exactly that of its header."""
    path = _idx_file(folder, split, what)
    if path is None:
        raise DataError(
            f"{folder}: has no file {IDX_PREFIX[split]}-{what}-idx{dimensions}-ubyte[.gz]."
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Get the file again.") from None
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(raw[4:head], ">u4").tolist()) if len(raw) >= head else ()
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) - head != int(np.prod(shape)):
        raise DataError(
            f"{path}: {len(raw)} bytes do not fit an IDX header of uint8 with {dimensions} "
            f"dimensions {shape}: damaged or another file. Get it again."
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _fashion_mnist(split: str, idx: str | None, download: bool) -> Path:
    """Return the folder of Fashion-MNIST's IDX files; download them if no folder has them."""
    if idx is not None:
        if _idx_file(Path(idx).expanduser(), split, "images") is None:
            raise DataError(
                f"--idx ({idx}): must be a folder with {IDX_PREFIX[split]}-images-idx3-ubyte[.gz] "
                f"and {IDX_PREFIX[split]}-labels-idx1-ubyte[.gz]."
            )
        return Path(idx).expanduser()
    package = Path(os.environ.get("FASHION_MNIST_FOLDER", DEBIAN_FOLDER))
    cache = Path(os.environ.get("FASHION_MNIST_CACHE", DOWNLOAD_FOLDER)).expanduser()
    raw = cache / "FashionMNIST" / "raw"  # torchvision's own layout
    for folder in (package, raw):
        if _idx_file(folder, split, "images") and _idx_file(folder, split, "labels"):
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


# -- one image ----------------------------------------------------------------------------------


def reader(
    source: Source, size: int, channels: int, background: tuple[int, int, int]
) -> Callable[[int], tuple[Pixels, bool]]:
    """Return a function that reads the image of a row and returns ``to_square`` of it.

    Each process makes its own. The function raises ``DecodeError`` if one image cannot be read, and
    ``DataError`` if the source cannot: if a file system goes away, its images are not damaged.
    """
    if (pixels := source.pixels) is not None:
        return lambda row: to_square(Image.fromarray(pixels[row]), size, channels, background)
    folder = Path(source.location).expanduser()
    if source.kind == "zip":
        archive = zipfile.ZipFile(folder)

    def read(row: int) -> bytes:
        if source.kind == "zip":
            return archive.read(source.names[row])
        if not source.spans:
            return (folder / source.names[row]).read_bytes()
        name, offset, length, _ = source.spans[row]
        with (folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def pixels_of(row: int) -> tuple[Pixels, bool]:
        try:
            raw = read(row)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise DecodeError(reason(error)) from None
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError) and folder.exists():
                raise DecodeError(str(error.strerror)) from None
            raise DataError(
                f"{source.names[row]}: cannot be read from {source.location}: {error}. When it can "
                "be read again, the same command continues."
            ) from None
        if source.spans and source.spans[row][3] == "npy":
            array = read_npy(memoryview(raw))
            array = array[:, :, 0] if array.shape[2:] == (1,) else array
            return to_square(Image.fromarray(array), size, channels, background)
        with open_pillow(memoryview(raw)) as image:
            return to_square(image, size, channels, background)

    return pixels_of


def to_square(
    image: Image.Image, size: int, channels: int, background: tuple[int, int, int]
) -> tuple[Pixels, bool]:
    """Return ((size, size, channels) uint8 pixels, whether they were enlarged) of a Pillow image.

    The image is turned upright by EXIF, composited on the background, cropped to the central square
    and resized with an antialiased Lanczos filter. Of an animation the first frame is used.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged metadata: viewers show the image as stored
        ImageOps.exif_transpose(image, in_place=True)
    # Composite before the filter, which would mix in the colours of transparent pixels.
    image = flatten(image, channels, background)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels), side < size
