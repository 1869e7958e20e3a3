"""List the images of a folder or a zip archive, and label them by folders or ``dataset.json``."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.labels import NO_LABEL, Label, numbered, parse
from pipeline.data.pictures import SUFFIXES
from pipeline.data.source_files import is_hidden, open_zip, parts_of, suffix_of
from pipeline.runtime.console import printable
from pipeline.runtime.documents import NOT_DAMAGE, DamagedFile, parse_json, read_bytes
from pipeline.runtime.errors import DataError

MOST_FOLDERS = 1_000_000
"""Folders that are listed; links between a dozen folders make more paths than this."""
LABEL_FILE = "dataset.json"
"""StyleGAN's: {"labels": [[name of an image, class], ...]}."""
LARGEST_LABEL_FILE = 1 << 30
SPLIT = re.compile(r"(train|val|valid|test)(ing|ation)?_?(\d{2,4}|[AB])?", re.IGNORECASE)
"""Names of folders that are parts of a data set, not classes: train, val2017, testA, ..."""
NO_IMAGES = {"Thumbs.db", "desktop.ini"}
"""Files that Windows puts into folders of images."""


class SeveralParts(DataError):
    """The folders of a source are parts of a data set; ``parts`` are their numbers of images."""

    def __init__(self, message: str, parts: Counter[str]) -> None:
        super().__init__(message)
        self.parts = parts


@dataclass
class Listing:
    """The files of a source, each of them accounted for.

    Args:
        names: the images, sorted.
        sizes: a number for each that changes with its content: bytes, or CRC-32.
        left_out: number of files that are no images of the source, by reason.
        said: lines for the user about files that are used.
        label_file: the bytes of ``dataset.json``, None without one.
        sets: tars and Parquet files, by their ending; they count as left out.
    """

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    label_file: bytes | None = None
    sets: dict[str, list[str]] = field(default_factory=lambda: {".tar": [], ".parquet": []})

    def add(self, name: str, size: int) -> None:
        """Add a file; what is no image is counted by its extension."""
        suffix = suffix_of(name).lower()
        if suffix in SUFFIXES or suffix == ".npy":
            self.names.append(name)
            self.sizes.append(size)
        else:
            self.left_out[suffix or "no extension"] += 1
            if suffix in self.sets:
                self.sets[suffix].append(name)

    def sort(self) -> None:
        """Sort the images by name."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        self.names = [self.names[i] for i in order]
        self.sizes = [self.sizes[i] for i in order]
        self.sets = {suffix: sorted(names) for suffix, names in self.sets.items()}

    @property
    def digest(self) -> str:
        """Hex sha256 of names and sizes."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def list_folder(root: Path) -> Listing:
    """List a folder and those in it; links are followed, hidden files are not listed.

    Raises:
        DataError: it has more than ``MOST_FOLDERS`` folders.
        OSError: a folder cannot be read.
    """
    found = Listing()
    # (folder, its name in the listing, the folders above it)
    left: list[tuple[Path, str, frozenset[tuple[int, int]]]] = [(root, "", frozenset())]
    visited = links = 0
    while left:
        folder, prefix, above = left.pop()
        status = folder.stat()
        if (inode := (status.st_dev, status.st_ino)) in above:
            found.left_out["link to a folder above it"] += 1
            continue
        if (visited := visited + 1) > MOST_FOLDERS:
            raise DataError(
                f"SOURCE ({root}): has more than {MOST_FOLDERS} folders; links may lead from one "
                f"to the next, e.g. {printable(prefix[-200:])}. Remove the links."
            )
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if entry.name.startswith(".") or entry.name in NO_IMAGES:
                    continue
                size = _size_of(entry)
                if size is None:
                    left.append((folder / entry.name, f"{name}/", above | {inode}))
                elif entry.name == LABEL_FILE and found.label_file is None:
                    found.label_file = _label_file(folder / entry.name)
                else:
                    found.add(name, size)
                    links += entry.is_symlink()
    if links:
        found.said.append(f"{links} files are symbolic links, which are followed")
    found.sort()
    return found


def _label_file(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST_LABEL_FILE)
    except DamagedFile as error:
        raise DataError(f"SOURCE: {error}. Restore it, or remove it.") from None


def _size_of(entry: os.DirEntry[str]) -> int | None:
    """Return the size of a file, -1 for what cannot be one, like a dangling link; None: a folder.

    Raises:
        OSError: it cannot be looked at, which says nothing about it.
    """
    try:
        if entry.is_dir():
            return None
        return entry.stat().st_size if entry.is_file() else -1
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise
        return -1  # a link to itself


def list_zip(path: Path) -> tuple[Listing, list[tuple[int, str]]]:
    """List a zip archive; returns (place in its directory, name there) of each image too.

    A name that occurs several times gets a number from its second time on: "a.png (2)".

    Raises:
        DataError: it is damaged or encrypted.
        OSError: it cannot be read.
    """
    found, places = Listing(), dict[str, tuple[int, str]]()
    seen: Counter[str] = Counter()
    try:
        archive = open_zip(path)
    except DamagedFile as error:
        raise DataError(f"SOURCE ({path}): {error}. Get it again.") from None
    with archive:
        for place, entry in enumerate(archive.infolist()):
            name = entry.filename.replace("\\", "/")  # as some tools of Windows write it
            if entry.is_dir() or name.endswith("/") or is_hidden(name):
                continue
            last = name.rpartition("/")[2]
            if last in NO_IMAGES:
                continue
            if entry.flag_bits & 1:
                raise DataError(f"SOURCE ({path}): encrypted; unpack it into a folder first.")
            if last == LABEL_FILE and found.label_file is None:
                found.label_file = _label_member(archive, entry, path)
                continue
            seen[name] += 1
            suffix, unique = suffix_of(name), name
            if seen[name] > 1:
                unique = f"{name.removesuffix(suffix)} ({seen[name]}){suffix}"
            found.add(unique, entry.CRC)
            places[unique] = place, entry.filename
    if repeated := sum(n - 1 for name, n in seen.items() if n > 1):
        found.said.append(
            f"{repeated} files have the name of another in the archive (duplicate names); each is "
            "used"
        )
    found.sort()
    return found, [places[name] for name in found.names]


def _label_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bytes:
    if entry.file_size > LARGEST_LABEL_FILE:
        raise DataError(f"SOURCE ({path}): {LABEL_FILE} has {entry.file_size} bytes.")
    try:
        with archive.open(entry) as member:
            return member.read(LARGEST_LABEL_FILE)
    except (zipfile.BadZipFile, zipfile.error, RuntimeError, NotImplementedError, EOFError) as bad:
        raise DataError(f"SOURCE ({path}): {LABEL_FILE} cannot be read: {bad}.") from None


# -- labels -------------------------------------------------------------------------------------


def choose_split(found: Listing, split: str | None, source: str) -> Listing:
    """Return the images of a split, if the folders at the top are parts of a data set.

    Args:
        found: all images.
        split: the folder to use, ``all``, or None if the user named none.
        source: the source, for messages.

    Raises:
        DataError: the source has several parts, and none or another was named.
    """
    depth = common_depth(found.names)
    tops = [parts_of(name)[depth] for name in found.names]
    parts = Counter(tops)
    if not parts or not all(map(SPLIT.fullmatch, parts)):
        return found
    if split is None and len(parts) > 1:
        listed = ", ".join(f"{top} ({n} images)" for top, n in sorted(parts.items()))
        raise SeveralParts(
            f"SOURCE ({source}): its folders are parts of a data set, not classes: {listed}. Give "
            f"--split {min(parts)}, another of them, or --split all.",
            parts,
        )
    if split in (None, "all"):
        return found
    chosen = [i for i, top in enumerate(tops) if top == split]
    if not chosen:
        raise DataError(f"--split ({split}): SOURCE ({source}) has {', '.join(sorted(parts))}.")
    for top, n in parts.items():
        if top != split:
            found.left_out[f"in {top}/"] += n
    found.names = [found.names[i] for i in chosen]
    found.sizes = [found.sizes[i] for i in chosen]
    return found


def common_depth(names: Sequence[str]) -> int:
    """Return the number of folders in which all images are, which are no classes."""
    parts = [parts_of(name) for name in names]
    depth = 0
    while parts and all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        if SPLIT.fullmatch(parts[0][depth]):
            return depth
        depth += 1
    return depth


def labels_of(found: Listing, source: str) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return (int32 (N,) labels, names of the classes) by ``dataset.json``, else by top folders.

    What is unlabelled among labelled images is counted in ``found.left_out`` and ``found.said``.
    """
    if found.label_file is not None:
        return _by_file(found, found.label_file, source)
    depth = common_depth(found.names)
    parts = [parts_of(name)[depth:] for name in found.names]
    if parts and all(SPLIT.fullmatch(p[0]) for p in parts):
        parts = [p[1:] for p in parts]
    tops: list[Label] = [p[0] if len(p) > 1 else None for p in parts]
    beside = tops.count(None)
    if len(set(tops) - {None}) < 2:
        return np.full(len(tops), NO_LABEL, np.int32), ()
    if 2 * beside > len(tops):
        found.said.append(
            f"{beside} of {len(tops)} images lie in no folder: the folders are not taken as classes"
        )
        return np.full(len(tops), NO_LABEL, np.int32), ()
    _say_unlabelled(found, beside, "beside the folders of the classes")
    labels, classes, _ = numbered(tops)
    return labels, classes


def _by_file(
    found: Listing, content: bytes, source: str
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Label by StyleGAN's file; its names are relative to the file's folder."""
    field = f"SOURCE ({source}): {LABEL_FILE}"
    none = np.full(len(found.names), NO_LABEL, np.int32)
    try:
        entries = parse_json(content, LABEL_FILE).get("labels")
        if entries is None:
            return none, ()
        by_name = {str(name).replace("\\", "/"): parse(label) for name, label in entries}
    except (DamagedFile, ValueError, TypeError) as error:
        raise DataError(
            f'{field} must be {{"labels": [[name, class], ...]}}: {printable(str(error)[:100])}. '
            "Repair it, or remove it: the images are unlabelled then."
        ) from None
    top = "/".join(parts_of(found.names[0])[: common_depth(found.names)])
    prefixes = ("", f"{top}/") if top else ("",)
    labels: list[Label] = []
    for name in found.names:
        names = [name.removeprefix(prefix) for prefix in prefixes]
        labels.append(next((by_name[n] for n in names if n in by_name), None))
    used = sum(label is not None for label in labels)
    if used == 0 and by_name:
        raise DataError(
            f"{field} labels {len(by_name)} images, none of which is here, e.g. "
            f"{printable(min(by_name)[:100])}. Give the folder that holds it and the images."
        )
    if len(by_name) > used:
        found.left_out[f"label in {LABEL_FILE} without its image"] += len(by_name) - used
    _say_unlabelled(found, len(labels) - used, f"not in {LABEL_FILE}")
    numbers, classes, unused = numbered(labels)
    _say_unlabelled(found, unused, f"with a name among the numbers of {LABEL_FILE}")
    return numbers, classes


def _say_unlabelled(found: Listing, count: int, why: str) -> None:
    if count:
        found.said.append(
            f"{count} images are unlabelled ({why}); a model with classes refuses such a set"
        )
