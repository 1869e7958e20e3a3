"""Read YAML that may come from anybody: sections of keys with text or lists of text, nothing else.

A parser of all YAML builds any depth, aliases that multiply, and numbers from ``010`` or ``1:30``.
Here the events of the file are read one by one, so that it is refused before anything is built.
Values stay text; ``values.convert`` turns them into what their keys want.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.runtime.console import printable
from pipeline.runtime.documents import DamagedFile, check_signature, read_bytes
from pipeline.runtime.errors import ConfigError

LARGEST = 1 << 20
"""Bytes of the largest configuration that is read."""
MOST_VALUES = 2000
DEEPEST = 4
"""Levels of a configuration: sections, keys, lists; one more, to name the key that is too deep."""

Value = Any
"""Text, a list of values or a dictionary of them."""


class Plain(str):
    """Text that was written without quotes; ``null`` and ``true`` mean something then."""

    __slots__ = ()


def read(path: Path) -> dict[str, Value]:
    """Return the sections of a YAML file, and their values as text.

    Raises:
        ConfigError: the file is missing or no configuration; the message names it and the line.
    """
    try:
        content = read_bytes(path, LARGEST)
        check_signature(content, path)
        tree = _parse(content.decode("utf-8-sig"))
    except FileNotFoundError:
        near = sorted(printable(str(p)) for p in path.parent.glob("*.yaml"))[:20] or ["none"]
        raise ConfigError(
            f"--config {path}: no such file; in that folder: {', '.join(near)}."
        ) from None
    except DamagedFile as error:
        raise ConfigError(f"--config {error}") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {error.reason}"
        raise ConfigError(f"--config {path}: not a configuration: is not UTF-8: {at}.") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: not a configuration: {error}.") from None
    if isinstance(tree, str) and not tree:
        return {}
    if not isinstance(tree, dict):
        what = "a list" if isinstance(tree, list) else "one value"
        raise ConfigError(f"--config {path}: must hold sections (run:, model:, ...), not {what}.")
    return tree


def parse_override(text: str) -> Value:
    """Return the value on the right of ``section.key=``; a list may be written as ``[a, b]``.

    Raises:
        ValueError: it is not YAML; the message says why.
    """
    value = _parse(text)
    # On a command line, " # ..." is no comment.
    return Plain(text.strip()) if isinstance(value, Plain) else value


def _parse(text: str) -> Value:
    """Return the one document in some YAML; ``Plain("")`` if it is empty.

    Raises:
        ValueError: the text is no YAML of the kind that is read here.
    """
    value: Value = Plain("")
    try:
        events = _Events(yaml.parse(text, Loader=yaml.SafeLoader))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                value = events.node(next(events), 0)
            elif isinstance(event, yaml.DocumentEndEvent):
                break
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                raise ValueError(f"{_line(event)}has a second document; keep one")
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"not valid YAML: {line}{printable(str(error.problem))}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {printable(str(error).partition(chr(10))[0])}") from None
    return value


class _Events:
    """The events of a YAML text, and the number of values so far."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events, self._count = events, 0

    def __iter__(self) -> _Events:
        return self

    def __next__(self) -> yaml.Event:
        return next(self._events)

    def node(self, event: yaml.Event, depth: int) -> Value:
        """Return the value that starts with an event."""
        assert isinstance(event, yaml.NodeEvent)
        self._count += 1
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise ValueError(
                f"{_line(event)}has an anchor or alias (& or *); write the value again"
            )
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag is not None:
            raise ValueError(f"{_line(event)}has a tag ({printable(event.tag)}); remove it")
        if self._count > MOST_VALUES:
            raise ValueError(f"{_line(event)}has more than {MOST_VALUES} values")
        if isinstance(event, yaml.ScalarEvent):
            return str(event.value) if event.style else Plain(event.value)
        if depth == DEEPEST:
            raise ValueError(f"{_line(event)}is nested deeper than section, key and list")
        if isinstance(event, yaml.SequenceStartEvent):
            return [self.node(child, depth + 1) for child in self._until(yaml.SequenceEndEvent)]
        return self._mapping(depth)

    def _until(self, end: type) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _mapping(self, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for event in self._until(yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            if not isinstance(key, str):
                raise ValueError(f"{_line(event)}has a key that is no name")
            if key in found:
                raise ValueError(f"{_line(event)}has the key {printable(key)} twice; keep one")
            found[str(key)] = self.node(next(self._events), depth + 1)
        return found


def _line(event: yaml.Event) -> str:
    assert event.start_mark is not None
    return f"line {event.start_mark.line + 1} "
