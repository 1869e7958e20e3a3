"""Read labels as tools write them, and number the classes that are named."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_LABEL = -1
LARGEST_LABEL = 2**31 - 1
LONGEST_NAME = 100
MOST_CLASSES = 100_000
KEYS = ("label", "class", "cls", "class_id", "category_id", "labels")
"""Names of the field with the label, where a file has several; the first that is there counts."""

Label = int | str | None
"""A number, the name of a class, or None: unlabelled."""


def parse(value: object) -> Label:
    """Return the label in a text, a number or a list with a single one (one-hot).

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8").strip()  # a UnicodeDecodeError is a ValueError
    if isinstance(value, str):
        return _parse_text(value.strip())
    if isinstance(value, bool) or value is None:
        raise ValueError(value)
    if isinstance(value, (int, float, np.integer, np.floating)):
        if value != int(value) or not -1 <= value <= LARGEST_LABEL:
            raise ValueError(value)
        return None if value == NO_LABEL else int(value)
    if isinstance(value, (list, tuple)):
        if len(value) > 1 and sorted(value)[-1] == 1 and set(value) == {0, 1} and sum(value) == 1:
            return value.index(1)
        if len(value) == 1:
            return parse(value[0])
    raise ValueError(value)


def _parse_text(text: str) -> Label:
    try:
        number = float(text)
    except ValueError:
        numbers = re.fullmatch(r"[\[(]?([01.,\s]+)[\])]?", text)
        if numbers and (fields := re.split(r"[,\s]+", numbers[1].strip(", \n"))):
            return parse([float(field) for field in fields])
        if not 0 < len(text) <= LONGEST_NAME or not text.isprintable():
            raise
        return text
    return parse(number if number != int(number) else int(number))


def parse_json(content: bytes, field: str | None) -> Label:
    """Return the label in a JSON object, by the name of its field; None if it has none.

    Raises:
        ValueError: it is no JSON, or the field holds no label.
    """
    try:
        document = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(document, dict):
        raise ValueError(document)
    found = next((key for key in ([field] if field else KEYS) if key in document), None)
    return None if found is None else parse(document[found])


def numbered(labels: Sequence[Label]) -> tuple[NDArray[np.int32], tuple[str, ...], int]:
    """Number the classes: by their sorted names, if they have names.

    Returns:
        (int32 (N,), ``NO_LABEL`` where unknown; the names, empty for numbers; how many labels could
        not be used: names among numbers, or more names than ``MOST_CLASSES``)
    """
    names = {label for label in labels if isinstance(label, str)}
    unused = 0
    if len(names) > MOST_CLASSES or (names and any(isinstance(label, int) for label in labels)):
        unused = sum(isinstance(label, str) for label in labels)
        labels = [None if isinstance(label, str) else label for label in labels]
        names = set()
    number: dict[Label, int] = {name: k for k, name in enumerate(sorted(names))}
    number[None] = NO_LABEL
    values = [number.get(label, label) for label in labels]
    return np.array(values, np.int32), tuple(sorted(names)), unused
