"""Describe the keys of the configuration, for ``train --keys`` and docs/configuration.md.

Everything comes from the dataclasses: type, default, docstring, and whether a resume may change it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from typing import Any, Literal, NamedTuple

from pipeline.config import yaml_file
from pipeline.config.hints import hint
from pipeline.config.loading import CONFIGS
from pipeline.config.recipe import ACCEPTABLE
from pipeline.config.schema import Config, flatten
from pipeline.config.values import show, types_of_keys, written
from pipeline.runtime.errors import ConfigError

TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
WORDS = {"None": "null", "False": "false", "True": "true"}
ON_RESUME = {
    "free": "may change",
    "accepted": "with run.accept_changes",
    "fixed": "fixed",
}


class Key(NamedTuple):
    """One key, as a user reads about it."""

    name: str
    """``section.key``."""
    type: str
    """What a value is: ``number``, ``text``, ``uniform, normal``."""
    default: str
    """As it is written on a command line."""
    text: str
    """The docstring of the field, on one line."""
    on_resume: str
    """A value of ``ON_RESUME``."""
    files: dict[str, str]
    """Names of the shipped configurations that set it, and their values."""

    def by_value(self) -> dict[str, str]:
        """Return ``{value: "file, file"}`` of the shipped configurations."""
        files = {file.removesuffix(".yaml"): value for file, value in self.files.items()}
        return {
            value: ", ".join(file for file in files if files[file] == value)
            for value in dict.fromkeys(files.values())
        }


def all_keys() -> list[Key]:
    """Return every key, in the order of the dataclasses."""
    shipped, defaults = _shipped(), flatten(Config())
    found = []
    for section in dataclasses.fields(Config):
        owner = type(getattr(Config(), section.name))
        texts = _docstrings(owner)
        for entry in dataclasses.fields(owner):
            name = f"{section.name}.{entry.name}"
            accepted = "accepted" if name.startswith(ACCEPTABLE) else "fixed"
            on_resume = ON_RESUME["free" if entry.metadata.get("may_change") else accepted]
            files = {file: values[name] for file, values in shipped.items() if name in values}
            kind, default = _describe(types_of_keys()[name]), written(defaults[name])
            found.append(Key(name, kind, default, texts[entry.name], on_resume, files))
    return found


def print_keys(word: str = "") -> str:
    """Return the keys with a word in their name or text, for a terminal.

    Raises:
        ConfigError: no key has it; the message has a guess.
    """
    found = [k for k in all_keys() if word.lower() in k.name]
    found = found or [k for k in all_keys() if word.lower() in k.text.lower()]
    if not found:
        raise ConfigError(f"--keys {show(word)}: no key has this word; {hint(word)}")
    return "\n".join(map(_paragraph, found))


def _paragraph(key: Key) -> str:
    files = "; ".join(f"{value} in {names}" for value, names in key.by_value().items())
    text = f"{key.text} Set to {files}." if files else key.text
    head = f"{key.name}  {key.type}; default {key.default}; on resume: {key.on_resume}"
    body = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
    return "\n    ".join([head, *body])


def _docstrings(owner: type) -> dict[str, str]:
    """Return the text below each field of a dataclass, on one line."""
    (body,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for entry, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            assert isinstance(after, ast.Expr)
            assert isinstance(after.value, ast.Constant)
            text = " ".join(str(after.value.value).split()).replace("``", "`")
            found[entry.target.id] = re.sub(
                r"\b(None|False|True)\b", lambda match: WORDS[match[0]], text
            )
    return found


@functools.cache
def _shipped() -> dict[str, dict[str, str]]:
    """Return ``{file: {section.key: value}}`` of the configurations that the package carries."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        tree = {k: v for k, v in yaml_file.read(path).items() if isinstance(v, dict)}
        values = {f"{s}.{k}": show(value) for s, part in tree.items() for k, value in part.items()}
        found[path.name] = {key: values[key] for key in values if key in types_of_keys()}
    return found


def _describe(wanted: Any) -> str:
    """Return what values of a type are, in words."""
    if isinstance(wanted, types.UnionType):
        return f"{_describe(typing.get_args(wanted)[0])}, or null"
    if typing.get_origin(wanted) is list:
        return f"list of {_describe(typing.get_args(wanted)[0])}s"
    if typing.get_origin(wanted) is Literal:
        return " or ".join(map(str, typing.get_args(wanted)))
    return TYPES[wanted]
