"""Read CIFAR-10 and CIFAR-100: pickles of Python, parsed without running what they say."""

from __future__ import annotations

import hashlib
import pickletools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.data.pictures import Pixels, reason
from pipeline.data.source import Choice, Source
from pipeline.runtime.errors import DataError

PIXELS = 3 * 32 * 32
FILES = {  # of the python and the binary version
    "train": re.compile(r"(data_batch_\d(\.bin)?|train(\.bin)?)"),
    "test": re.compile(r"(test_batch(\.bin)?|test(\.bin)?)"),
}
CIFAR_FILES = {
    *(f"data_batch_{k}{end}" for k in range(1, 6) for end in ("", ".bin")),
    *(f"{name}{end}" for name in ("test_batch", "train", "test") for end in ("", ".bin")),
    *("batches.meta", "meta"),
}
FOLDERS = (
    *("cifar-10-batches-py", "cifar-100-python"),
    *("cifar-10-batches-bin", "cifar-100-binary"),
)
LARGEST_BATCH = 512 << 20
INTEGERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1")
LABELS = ("fine_labels", "labels")


def cifar_folder(path: Path) -> Path | None:
    """Return the folder with the files of CIFAR: the one that is given, or one in it."""
    folders = [path] if path.name in FOLDERS else [path / name for name in FOLDERS]
    return next((one for one in folders if one.is_dir() and _files(one, "train")), None)


def _files(folder: Path, split: str) -> list[Path]:
    names = FILES.get(split) or re.compile("|".join(one.pattern for one in FILES.values()))
    return sorted(path for path in folder.iterdir() if names.fullmatch(path.name))


def cifar(folder: Path, choice: Choice, read: Callable[[Path, int], bytes]) -> Source:
    """List the images of a folder of CIFAR's files; ``train`` unless ``--split`` says otherwise.

    Args:
        folder: ``cifar-10-batches-py``, ``cifar-100-python`` or their binary versions.
        choice: which split to take: ``train``, ``test`` or ``all``.
        read: returns the bytes of a file, up to a limit.

    Raises:
        DataError: a file is damaged.
    """
    split = choice.split or "train"
    if split not in (*FILES, "all"):
        raise DataError(f"--split ({split}): must be train, test or all.")
    batches: list[tuple[Pixels, list[int]]] = []
    for path in _files(folder, split):
        try:
            content = read(path, LARGEST_BATCH)
            is_binary = path.suffix == ".bin"
            batches.append(_binary(content, path) if is_binary else _pickled(content))
        except (ValueError, EOFError, IndexError) as error:
            raise DataError(f"{path}: damaged: {reason(error)}. Get the file again.") from None
    if not batches:
        raise DataError(f"SOURCE ({folder}): has no files of the split {split}.")
    pixels = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([np.array(one, np.int32) for _, one in batches])
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return Source(
        kind="cifar",
        location=str(folder),
        names=[f"{split}[{row}]" for row in range(len(pixels))],
        labels=labels,
        digest=digest,
        opener=lambda: lambda row: np.ascontiguousarray(pixels[row].transpose(1, 2, 0)),
        classes=_names(folder, read),
    )


def _binary(content: bytes, path: Path) -> tuple[Pixels, list[int]]:
    """Return (images, labels) of rows of one label (CIFAR-10) or two (the second is finer)."""
    heads = 2 if "100" in path.parent.name else 1
    rows = np.frombuffer(content, np.uint8).reshape(-1, heads + PIXELS)
    return rows[:, heads:].reshape(-1, 3, 32, 32), rows[:, heads - 1].tolist()


def _pickled(content: bytes) -> tuple[Pixels, list[int]]:
    """Return (images, labels) of a pickled dictionary, from the list of its instructions."""
    data, labels, key = b"", dict[str, list[int]](), ""
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, (str, bytes)):
            raw = argument if isinstance(argument, bytes) else argument.encode("latin-1", "replace")
            if len(raw) >= PIXELS and len(raw) % PIXELS == 0 and len(raw) > len(data):
                data = raw
            key = raw.decode("latin-1") if len(raw) < 20 else ""
        elif opcode.name in INTEGERS and key in LABELS and argument is not None:
            labels.setdefault(key, []).append(int(argument))
    images = np.frombuffer(data, np.uint8).reshape(-1, 3, 32, 32)
    found = next((labels[name] for name in LABELS if name in labels), [])
    if not len(images) or len(found) != len(images):
        raise ValueError(f"{len(images)} images and {len(found)} labels")
    return images, found


def _names(folder: Path, read: Callable[[Path, int], bytes]) -> tuple[str, ...]:
    """Return the names of the classes, empty where their file is not there."""
    for name, field in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        path, names, key = folder / name, list[str](), ""
        if path.is_file():
            for _, argument, _ in pickletools.genops(read(path, 1 << 20)):
                if isinstance(argument, (str, bytes)):
                    text = argument if isinstance(argument, str) else argument.decode("latin-1")
                    if text in ("label_names", "fine_label_names", "coarse_label_names"):
                        key = text
                    elif key == field and text.replace("_", "").isalnum():
                        names.append(text)
            return tuple(name for name in names if name not in ("num_cases_per_batch", "num_vis"))
    return ()
