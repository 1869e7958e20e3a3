"""List the images of Parquet files, the format of data sets on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.labels import KEYS, NO_LABEL, Label, numbered, parse
from pipeline.data.pictures import DecodeError, reason
from pipeline.data.source import Choice, Source, Stored, label_column, package, version_of
from pipeline.runtime.console import printable
from pipeline.runtime.errors import DataError

HUB = "hf://datasets/"
LABEL_COLUMNS = (*KEYS, "fine_label")
KEPT_GROUPS = 4
"""Row groups that a worker keeps in memory: images are packed in a shuffled order."""


def parquet_files(location: Path, paths: Sequence[Path], choice: Choice) -> Source:
    """List the rows of Parquet files with a column of stored images.

    Args:
        location: the file or folder that the user named.
        paths: the files, in order.
        choice: which columns to take; by default the only one of images, and ``label``.

    Raises:
        DataError: a file is damaged, or has no such column.
    """
    parquet = package("pyarrow.parquet", "pyarrow", location)
    arrow = package("pyarrow", "pyarrow", location)
    groups: list[tuple[Path, int]] = []
    first: list[int] = [0]
    names, labels, said = list[str](), list[Label](), list[str]()
    digest, classes, bad = hashlib.sha256(), tuple[str, ...](), 0
    column, labels_in = "", None
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                column = _image_column(arrow, schema, choice, path)
                labels_in = label_column(schema.names, choice, path, LABEL_COLUMNS)
                classes = classes or _class_names(schema, labels_in)
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    groups.append((path, group))
                    first.append(first[-1] + rows)
                if labels_in:
                    for value in file.read(columns=[labels_in])[labels_in].to_pylist():
                        try:
                            labels.append(None if value is None else parse(value))
                        except (ValueError, TypeError):
                            labels.append(None)
                            bad += 1
                digest.update(
                    f"{path.name}\0{version_of(path)}\0{file.metadata.num_rows}\0".encode()
                )
                names += [f"{path.name}[{row}]" for row in range(file.metadata.num_rows)]
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read: {reason(error)}. Get it again.") from None
    if not names:
        raise DataError(f"SOURCE ({location}): its {len(paths)} Parquet files hold no rows.")
    digest.update(f"{column}\0{labels_in}".encode())
    numbers = np.full(len(names), NO_LABEL, np.int32)
    if labels_in:
        numbers, found, unused = numbered(labels)
        classes, bad = found or classes, bad + unused
        if bad:
            said.append(f"{bad} labels are no number, name or one-hot row: not used")

    def opener() -> Callable[[int], Stored]:
        @lru_cache(maxsize=KEPT_GROUPS)
        def images(number: int) -> Any:
            path, group = groups[number]
            with parquet.ParquetFile(path) as file:
                return file.read_row_group(group, columns=[column])[column].combine_chunks()

        def read(row: int) -> bytes:
            number = int(np.searchsorted(first, row, side="right")) - 1
            try:
                value = images(number)[row - first[number]].as_py()
            except arrow.ArrowException as error:
                raise DecodeError(reason(error)) from None
            value = value.get("bytes") if isinstance(value, dict) else value
            if not value:
                raise DecodeError("is empty, or only the path of a file, which is not followed")
            return bytes(value)

        return read

    return Source(
        kind="parquet",
        location=str(location),
        names=names,
        labels=numbers,
        digest=digest.hexdigest(),
        opener=opener,
        classes=classes,
        said=said,
    )


def _image_column(arrow: Any, schema: Any, choice: Choice, path: Path) -> str:
    def holds_images(kind: Any) -> bool:
        if arrow.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_images(field.type)]
    if choice.image_field in found:
        return str(choice.image_field)
    if len(found) == 1 and choice.image_field is None:
        return str(found[0])
    columns = ", ".join(f"{printable(field.name)} ({field.type})" for field in schema)
    asked = (
        f"--image-field ({choice.image_field}): is no column of images in"
        if choice.image_field
        else "SOURCE:"
    )
    raise DataError(
        f"{asked} {path}: give --image-field NAME, a column of stored images (binary, or a struct "
        f"with the field bytes). Its columns are {columns[:500]}."
    )


def _class_names(schema: Any, column: str | None) -> tuple[str, ...]:
    """Return the names of classes that the data set's features give to numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()


def from_hub(name: str) -> Path:
    """Return the folder of a data set of the Hugging Face Hub, downloaded once.

    Args:
        name: ``hf://datasets/OWNER/NAME``, with ``@REVISION`` if need be.

    Raises:
        DataError: it cannot be downloaded.
    """
    hub = package("huggingface_hub", "huggingface_hub", Path(name.removeprefix(HUB)))
    repository, _, revision = name.removeprefix(HUB).strip("/").partition("@")
    if repository.count("/") != 1:
        raise DataError(f"SOURCE ({name}): must be {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION.")
    try:
        return Path(
            hub.snapshot_download(repository, repo_type="dataset", revision=revision or None)
        )
    except Exception as error:  # the library has no base class for its network's errors
        raise DataError(
            f"SOURCE ({name}): cannot be downloaded: {reason(error)}. Check the name and the "
            "network; or download it elsewhere and give its folder."
        ) from None
