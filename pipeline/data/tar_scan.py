"""Find the images and labels of a tar from its headers.

webdataset takes what stands before the first dot of a file name as the key of a sample, so of
``a.left.jpg`` and ``a.right.jpg`` it makes one sample, and of "Shot at 10.27.01.jpg" a field
"27.01.jpg". Here each file that ends like an image is an image. Its label is in the ``.cls`` or
``.json`` file of the same name, else in that of webdataset's key.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import IMAGE_FIELDS, MIXED
from pipeline.data.labels import NO_LABEL, Label, numbered, parse, parse_json
from pipeline.data.shards import ROW, Shard
from pipeline.data.source_files import is_hidden
from pipeline.data.tars import Tar, open_tar
from pipeline.runtime.errors import DataError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.text import printable

LARGEST_IMAGE, LONGEST_LABEL = 1 << 30, 1 << 20
"""Bytes of the largest image and of the longest file with a label."""
LABEL_FIELDS = ("cls", "json")
NO_LABELS = "labels that are no number, name or one-hot list"


@dataclass
class Contents:
    """What a tar holds besides its images.

    Args:
        names: the name of each image.
        labels: the label of each image, as it is written.
        left_out: number of files that are neither images nor labels, by reason.
        repeated: number of images with the name of an earlier one.
        linked: number of images that are links to another one.
        shared: number of images whose webdataset key another image has.
    """

    names: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    linked: int = 0
    shared: int = 0


class Scan(NamedTuple):
    """What ``scan`` found: the shard, its rows of dtype ``ROW``, the format, and what else."""

    shard: Shard
    table: NDArray[np.void]
    field: str
    contents: Contents


def scan(path: Path, image_field: str | None = None, label_field: str | None = None) -> Scan:
    """Return the images of a tar, in its order. Named classes are not numbered yet.

    Args:
        path: the tar.
        image_field: what follows the first dot in the names of the images to use, e.g.
            ``left.jpg``; None: all that end like an image.
        label_field: the field of the labels in ``.json`` files; None: the first of ``KEYS``.

    Raises:
        DataError: the tar is compressed, truncated or holds no images.
        OSError: it cannot be read, which is no damage.
    """
    members = _Members(image_field, label_field)
    try:
        members.read(path)
        if members.names and members.tars:
            raise tarfile.ReadError(
                f"holds {len(members.names)} images beside {len(members.tars)} tars: unpack it"
            )
        for name, start, size in members.tars:
            members.read(path, start, size, name)
    except tarfile.ReadError as error:
        raise DataError(
            f"{path}: truncated, damaged or compressed: not readable as a plain tar ({error}). "
            "Copy it again. Samples are read by offset, so unpack a .tar.gz first."
        ) from None
    rows, contents = members.images()
    size = path.stat().st_size
    if not rows and size > 10240:
        types = ", ".join(f"{n} .{name}" for name, n in contents.left_out.most_common(10))
        raise DataError(
            f"{path}: holds no images (found: {types}); known extensions are "
            f"{', '.join(IMAGE_FIELDS[:-1])}."
        )
    fields = {name.rpartition(".")[2].lower() for name in contents.names}
    found = fields.pop() if len(fields) == 1 else MIXED if fields else ""
    shard = Shard(path.name, len(rows), size, sha256_of(path))
    return Scan(shard, np.array(rows, dtype=ROW), found, contents)


class _Members:
    """The members of a tar, as they come."""

    def __init__(self, image_field: str | None, label_field: str | None) -> None:
        self._image_field, self._label_field = image_field, label_field
        self._found = Contents()
        self._labels: defaultdict[str, list[Label]] = defaultdict(list)
        self._links: list[tuple[int, str]] = []
        self.spans: list[tuple[int, int] | None] = []
        self.names: list[str] = self._found.names
        self.tars: list[tuple[str, int, int]] = []

    def read(self, path: Path, start: int = 0, size: int | None = None, inner: str = "") -> None:
        """Read the headers of a tar, or of one in it, whose name is then the class."""
        with open_tar(path, start, size) as tar:
            for member in tar:
                self._add(member, tar, start, inner)
            tar.require_end()

    def _add(self, member: tarfile.TarInfo, tar: Tar, start: int, inner: str) -> None:
        name = f"{inner}/{member.name}" if inner else member.name
        if member.isdir() or is_hidden(name):
            return
        extension = name.rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""
        is_image = extension in IMAGE_FIELDS
        if member.islnk() or member.issym():
            if is_image and self._is_chosen(name):
                folder = posixpath.dirname(name) if member.issym() else ""
                target = posixpath.normpath(posixpath.join(folder, member.linkname))
                self._links.append((len(self.spans), target))
                self._found.names.append(name)
                self.spans.append(None)
        elif not member.isfile():
            self._found.left_out["no regular file"] += 1
        else:
            if member.issparse():
                raise tarfile.ReadError(f"{printable(name)} is stored sparse")
            if extension in LABEL_FIELDS:
                self._add_label(name, member, extension, tar)
            elif extension == "tar" and not inner:
                self.tars.append((name, member.offset_data, member.size))
            elif not is_image:
                self._found.left_out[extension[:20] or "no extension"] += 1
            elif not self._is_chosen(name):
                self._found.left_out[_split(name)[1][:20]] += 1
            else:
                if member.size > LARGEST_IMAGE:
                    raise tarfile.ReadError(f"{printable(name)} has {member.size} bytes")
                self._found.names.append(name)
                self.spans.append((start + member.offset_data, member.size))

    def _is_chosen(self, name: str) -> bool:
        return self._image_field in (None, _split(name)[1])

    def _add_label(self, name: str, member: tarfile.TarInfo, extension: str, tar: Tar) -> None:
        """Read a label; a ``.json`` counts only where there is no ``.cls``."""
        key = f"{extension}:{_stem(name)}"
        try:
            content = tar.content(member, LONGEST_LABEL)
            is_text = extension == "cls"
            label = parse(content) if is_text else parse_json(content, self._label_field)
        except (tarfile.ReadError, ValueError, OverflowError):
            if extension == "cls" or self._label_field:
                self._found.left_out[NO_LABELS] += 1
            label = None
        if extension == "json" and label is None:
            self._found.left_out["json"] += 1
        self._labels[key].append(label)

    def images(self) -> tuple[list[tuple[int, int, int]], Contents]:
        """Return (rows, contents); numbers are labels already, names are not."""
        found = self._found
        self._follow_links()
        number: Counter[str] = Counter()
        for name in found.names:
            found.labels.append(self._label(name, number[name]))
            number[name] += 1
        found.repeated = sum(n - 1 for n in number.values())
        keys = Counter(_split(name)[0] for name in number)
        found.shared = sum(n for n in keys.values() if n > 1)
        rows = [
            (*span, label if isinstance(label, int) else NO_LABEL)
            for span, label in zip(self.spans, found.labels, strict=True)
            if span is not None
        ]
        return rows, found

    def _follow_links(self) -> None:
        """Give each link the span of the image that it leads to; the others are left out."""
        by_name = dict(zip(self._found.names, self.spans, strict=True))
        for i, target in self._links:
            self.spans[i] = by_name.get(target)
        lost = [i for i, span in enumerate(self.spans) if span is None]
        self._found.linked = len(self._links) - len(lost)
        if lost:
            self._found.left_out["link to nothing in the tar"] += len(lost)
            for i in reversed(lost):
                del self.spans[i], self._found.names[i]

    def _label(self, name: str, occurrence: int) -> Label:
        for kind in LABEL_FIELDS:
            for key in (_stem(name), _split(name)[0]):
                if labels := self._labels.get(f"{kind}:{key}"):
                    return labels[min(occurrence, len(labels) - 1)]
        inner = name.partition(".tar/")  # ImageNet has a tar for each class
        return posixpath.basename(inner[0]) if self.tars and inner[1] else None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _split(name: str) -> tuple[str, str]:
    """Return webdataset's (key, field) of a name: it is cut at the first dot after the folder."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


# -- several tars -------------------------------------------------------------------------------


def number_classes(scans: Sequence[Scan]) -> tuple[list[Scan], tuple[str, ...], list[str]]:
    """Number the classes of a set.

    Returns:
        (the scans with all labels in their tables, names of the classes, lines for the user)
    """
    labels, classes, unused = numbered([label for one in scans for label in one.contents.labels])
    said, first, result = [], 0, []
    for one in scans:
        table = one.table.copy()
        table["label"] = labels[first : first + len(table)]
        first += len(table)
        result.append(one._replace(table=table))
    without = int((labels == NO_LABEL).sum())
    if unused:
        said.append(f"{unused} labels are names among numbers, or of too many kinds: not used")
    if 0 < without < len(labels):
        said.append(
            f"{without} of {len(labels)} images are unlabelled; a model with classes refuses such "
            "a set"
        )
    return result, classes, said


def lines(contents: Sequence[Contents]) -> list[str]:
    """Return what is to be said of the images of a set that webdataset would not use so."""
    said = []
    if shared := sum(one.shared for one in contents):
        said.append(
            f"{shared} images share the part of their names before the first dot, which webdataset "
            "takes as one sample: each is used. --image-field FIELD uses one of them, e.g. "
            f"{_example(contents)}"
        )
    if repeated := sum(one.repeated for one in contents):
        said.append(
            f"{repeated} images have the name of another in their tar (duplicate names): each is "
            "used"
        )
    if linked := sum(one.linked for one in contents):
        said.append(f"{linked} images are links to another image: each is used")
    return said


def _example(contents: Sequence[Contents]) -> str:
    fields = Counter(_split(name)[1] for one in contents for name in one.names)
    return printable(fields.most_common(1)[0][0][:40])
