"""Check the fields of an index and the table of its samples, which may come from anywhere.

Each function raises ``ValueError`` with the field, its value and what it must be. Nothing is
allocated that is larger than the bytes that were read.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import IMAGE_FIELDS
from pipeline.data.index import Shard
from pipeline.data.staleness import is_record
from pipeline.runtime.documents import DIGEST, DamagedFile, parse_json, unseal
from pipeline.runtime.text import printable

LARGEST_NUMBER = 2**62
LARGEST_SIDE = 1 << 16
MOST_SAMPLES = 2**30
LEAST_SAMPLE = 1024
"""Bytes that a sample takes in a tar: two blocks."""
LONGEST_NPY_HEADER = 1 << 12
SHOWN = 60
LONGEST_NAME, LONGEST_PATH = 255, 4096
MAGIC = b"\x93NUMPY"
HEXADECIMAL = re.compile(r"[0-9a-f]*").fullmatch
DIGITS = re.compile(r"[0-9a-f]{64}").fullmatch
USUAL_NAME = re.compile(r"[\w-][\w.-]{0,254}", re.ASCII).fullmatch
LABEL = re.compile(r"-1|0|[1-9][0-9]{0,9}").fullmatch
MOST_LABELS = 1 << 16
"""Different labels that an index counts."""
SMALLEST_PART, LARGEST_PART = 1 << 8, 1 << 20
"""Rows of a part of the table that has a checksum of its own."""
SUM = 16
"""Bytes of the checksum of a part."""
AT_ONCE = 1 << 20


def parsed(content: bytes, kind: str) -> dict[str, Any]:
    """Return the fields of an index that are used, each of the right type and in its range.

    Args:
        content: the bytes of the file.
        kind: what ``__kind__`` must be.
    """
    try:
        document = parse_json(content, "it")
    except DamagedFile as error:
        raise ValueError(printable(str(error).removeprefix("it: "))[:200]) from None
    if not unseal(document):
        raise ValueError(f"its content differs from its {DIGEST}")
    if document.get("__kind__") != kind:
        raise ValueError(f"__kind__ is {_shown(document.get('__kind__'))}, must be {kind!r}")
    sides = _list(document, "shape")
    if len(sides) != 3:
        raise ValueError(f"shape is {_shown(sides)}, must be three numbers")
    shape = [_number(side, f"shape[{k}]", 1, LARGEST_SIDE) for k, side in enumerate(sides)]
    if shape[2] not in (1, 3):
        raise ValueError(f"shape is {shape}; an image has 1 or 3 channels")
    if (field := document.get("field")) not in IMAGE_FIELDS:
        raise ValueError(f"field is {_shown(field)}, must be one of {', '.join(IMAGE_FIELDS)}")
    shards = [_shard(one, k) for k, one in enumerate(_list(document, "shardlist"))]
    if (count := sum(shard.nsamples for shard in shards)) > MOST_SAMPLES:
        raise ValueError(f"its shards have {count} samples, at most {MOST_SAMPLES} are read")
    if not isinstance(at := document.get("shards_at", ""), str) or "::" in at or not _plain(at):
        raise ValueError(f"shards_at is {_shown(at)}, must be a folder or a URL")
    return {
        "shards_at": at,
        "shape": shape,
        "field": field,
        "samples_sha256": _digest(document.get("samples_sha256"), "samples_sha256"),
        "made_by": _made_by(document.get("made_by", {})),
        "shards": tuple(shards),
        "parts": _parts(document.get("samples_parts"), count),
        "label_counts": _label_counts(document.get("label_counts"), count),
    }


class Parts(NamedTuple):
    """The checksums of the parts of a table."""

    rows: int
    """Rows of each part; the last may have fewer."""
    sums: bytes
    """The first ``SUM`` bytes of the SHA-256 of each part, one after the other."""


def _parts(value: object, count: int) -> Parts | None:
    if value is None:  # an index of an earlier version
        return None
    if not isinstance(value, dict):
        raise ValueError(f"samples_parts is {_shown(value)}, must be an object")
    rows = _number(value.get("rows"), "samples_parts.rows", SMALLEST_PART, LARGEST_PART)
    text, parts = value.get("sha256"), -(-count // rows)
    if not isinstance(text, str) or len(text) != 2 * SUM * parts or not HEXADECIMAL(text):
        raise ValueError(f"samples_parts.sha256 must be the {parts} checksums of its parts")
    return Parts(rows, bytes.fromhex(text))


def _label_counts(value: object, count: int) -> dict[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, dict)
        or not all(LABEL(label) and _is_count(number) for label, number in value.items())
        or sum(value.values()) != count
    ):
        raise ValueError(f"label_counts is {_shown(value)}, must count the {count} samples")
    return {int(label): number for label, number in value.items()}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_NUMBER


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_records(value: object) -> bool:
    return isinstance(value, list) and all(map(is_record, value))


USED = {
    "skipped": (_is_count, "a number of images"),
    "skipped_sha256": (lambda value: value is None or isinstance(value, str), "a text or null"),
    "done": (_are_counts, "an object of numbers"),
    "left_out": (_are_counts, "an object of numbers"),
    "said": (_are_texts, "a list of texts"),
    "classes": (_are_texts, "a list of names"),
    "source_files": (_are_records, "a list of records with times and contents"),
}
"""The fields of ``made_by`` that are used later: what each must be."""


def _made_by(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"made_by is {_shown(value)}, must be an object")
    for name, (fits, wanted) in USED.items():
        if name in value and not fits(value[name]):
            raise ValueError(f"made_by.{name} is {_shown(value[name])}, must be {wanted}")
    return value


def _plain(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST_PATH


def _shard(entry: object, k: int) -> Shard:
    """Return an entry of the list; there may be 100,000, and names for messages take time."""
    if isinstance(entry, dict):
        url, count, size = entry.get("url"), entry.get("nsamples"), entry.get("filesize")
        digest = entry.get("sha256")
        if type(url) is str and type(count) is int and type(size) is int and type(digest) is str:
            in_range = 0 < size <= LARGEST_NUMBER and 0 <= count <= size // LEAST_SAMPLE
            if in_range and DIGITS(digest):
                return Shard(url, count, size, digest)
    name = f"shardlist[{k}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {_shown(entry)}, must be an object")
    if not isinstance(url, str):
        raise ValueError(f"{name}.url is {_shown(url)}, must be a file name")
    size = _number(size, f"{name}.filesize", 1, LARGEST_NUMBER)
    count = _number(count, f"{name}.nsamples", 0, size // LEAST_SAMPLE)
    return Shard(url, count, size, _digest(digest, f"{name}.sha256"))


def _list(document: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value := document.get(name), list):
        raise ValueError(f"{name} is {_shown(value)}, must be a list")
    return value


def _number(value: object, name: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}, must be a whole number, {least} to {most}")
    return value


def _digest(value: object, name: str) -> str:
    if not isinstance(value, str) or not DIGITS(value):
        raise ValueError(f"{name} is {_shown(value)}, must be 64 hexadecimal digits")
    return value


def _shown(value: object) -> str:
    """Return a value for a message: short, and on one line."""
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return "a number of many digits"
    text = printable(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def odd_name(names: Sequence[str]) -> str:
    """Return what is wrong with a file name of a shard, or ""."""
    for name in names:
        if USUAL_NAME(name):
            continue
        # fsspec would open a second file system for what follows "::".
        odd = name in ("", ".", "..") or "::" in name or not name.isprintable()
        if odd or Path(name).name != name or len(name.encode()) > LONGEST_NAME:
            return f"{_shown(name)} must be a plain file name beside it"
    twice = [name for name, count in Counter(names).items() if count > 1]
    return f"{_shown(twice[0])} is listed more than once" if twice else ""


def npy_head(content: bytes, size: int, row: np.dtype[np.void], count: int) -> int:
    """Return the number of bytes before the rows of an npy file; nothing is unpickled.

    Args:
        content: its first ``LONGEST_NPY_HEADER`` bytes, or more.
        size: its bytes.
        row: the dtype that it must have.
        count: the number of rows that it must have.
    """
    if content[:6] != MAGIC or len(content) < 12:
        raise ValueError("it is no npy file")
    version, width = content[6], 2 if content[6] == 1 else 4
    length = int.from_bytes(content[8 : 8 + width], "little")
    begin = 8 + width + length
    if version not in (1, 2, 3) or begin > min(LONGEST_NPY_HEADER, len(content)):
        raise ValueError("its npy header is damaged or too long")
    try:
        header = ast.literal_eval(content[8 + width : begin].decode("latin-1").strip())
        dtype = np.dtype([tuple(column) for column in header["descr"]])
        shape, plain = tuple(header["shape"]), header["fortran_order"] is False
    except Exception:  # text from outside, in which anything may stand
        raise ValueError("its npy header is damaged") from None
    if dtype != row or not plain or len(shape) != 1 or type(shape[0]) is not int:
        raise ValueError(f"its rows must be one column of {row}")
    if shape[0] * row.itemsize != size - begin:
        raise ValueError(f"its header says {_shown(shape[0])} rows, its length differs")
    if shape[0] != count:
        raise ValueError(f"has {shape[0]} rows; the shards of the index have {count} samples")
    return begin


class Bounds(NamedTuple):
    """What the rows of a set must be within."""

    starts: NDArray[np.int64]
    """The first row of each shard, and the number of rows: (shards + 1,)."""
    sizes: NDArray[np.uint64]
    """Bytes of each shard, (shards,)."""
    labels: tuple[int, int]
    """The least and the greatest label."""


def bounds(document: dict[str, Any]) -> Bounds:
    """Return what a document of ``parsed`` says about its rows."""
    shards, counts = document["shards"], document["label_counts"]
    return Bounds(
        np.cumsum([0, *(shard.nsamples for shard in shards)], dtype=np.int64),
        np.array([shard.filesize for shard in shards], np.uint64),
        (min(counts), max(counts)) if counts else (-1, 2**31 - 1),
    )


def check_rows(rows: NDArray[np.void], within: Bounds, first: int = 0) -> None:
    """Check that every sample lies inside its shard and has a label that there is.

    Args:
        rows: offset, length and label of samples that follow each other.
        within: of the set.
        first: the id of the first of them.
    """
    for start in range(0, len(rows), AT_ONCE):
        few = rows[start : start + AT_ONCE]
        begin, end = first + start, first + start + len(few)
        low, high = np.searchsorted(within.starts, [begin, end - 1], side="right") - 1
        most = int(few["offset"].max()) + int(few["length"].max())
        known = within.labels[0] <= few["label"].min() and few["label"].max() <= within.labels[1]
        if known and few["length"].min() and most <= within.sizes[low : high + 1].min():
            continue  # as nearly always: a batch from all over a set checks thousands of parts
        counts = np.diff(within.starts[low : high + 2].clip(begin, end))
        sizes = np.repeat(within.sizes[low : high + 1], counts)
        lengths = few["length"].astype(np.uint64)
        bad = (lengths == 0) | (lengths > sizes)
        bad |= few["offset"] > np.where(bad, np.uint64(0), sizes - lengths)
        bad |= (few["label"] < within.labels[0]) | (few["label"] > within.labels[1])
        if bad.any():
            k = int(bad.argmax())
            offset, length, label = few[k].tolist()
            raise ValueError(
                f"sample {begin + k} is {length} bytes at {offset} with label {label}: not inside "
                f"its shard of {int(sizes[k])} bytes, or no label of the index"
            )
