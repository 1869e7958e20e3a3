"""Turn the text of a configuration into typed values: what a key wants, and references.

Numbers are decimal digits and nothing else: ``010``, ``1_000``, ``0x10`` and ``1:30`` would each be
another number than somebody meant.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from pipeline.config.schema import Config
from pipeline.config.yaml_file import Plain, Value
from pipeline.runtime.arguments import DECIMAL, WHOLE
from pipeline.runtime.console import printable
from pipeline.runtime.text import masked

LONGEST = 4096
"""Characters of the longest text; the longest path of Linux."""
READABLE = ("WANDB_RUN_ID", "SWEEP_DIR", "USER", "HOME", "TMPDIR")
"""Environment variables that ``${oc.env:NAME}`` may read, besides SLURM_*: others may be keys."""
NULLS = ("null", "Null", "NULL", "~", "")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_REFERENCE = re.compile(r"(\\*)\$\{")
_KEY = re.compile(r"\$\{ *([a-z_]+)\.([a-z0-9_]+) *\}", re.ASCII)


class Unasked(str):
    """The name of an extractor in a file that came with a run: it is never imported.

    A downloaded run could name any module. Only the command line, or a file that the user named
    with --config, asks for one.
    """

    file: Path

    def __new__(cls, name: str, file: Path) -> Unasked:
        """Return the name, and remember which file has it."""
        text = super().__new__(cls, name)
        text.file = file
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes the same object in another process."""
        return type(self), (str(self), self.file)


class Misfit(ValueError):
    """A value that its key cannot have; the message is the requirement."""


def convert(key: str, value: Value) -> Any:
    """Return a value as its key wants it.

    Args:
        key: a key of the schema, ``section.key``.
        value: as it was read, without references.

    Raises:
        Misfit: the value is of another type.
    """
    return _convert(types_of_keys()[key], value, _example(key))


def show(value: Value) -> str:
    """Return a value as messages show it: short, on one line, without credentials."""
    if isinstance(value, list):
        text = f"[{', '.join(map(show, value[:20]))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{k}: {show(v)}' for k, v in list(value.items())[:20])}}}"
    else:
        text = str(value) if isinstance(value, Plain) or not isinstance(value, str) else repr(value)
    text = printable(masked(text))
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


@cache
def types_of_keys() -> dict[str, Any]:
    """Return ``{"section.key": type}`` of the whole schema."""
    return {
        f"{section}.{name}": annotation
        for section, owner in typing.get_type_hints(Config).items()
        for name, annotation in typing.get_type_hints(owner).items()
    }


@cache
def _example(key: str) -> str:
    """Return ``, e.g. section.key=default`` to show how a value is written."""
    section, _, name = key.partition(".")
    default = getattr(getattr(Config(), section), name)
    items = "[0,1]" if types_of_keys()[key] == list[int] else "[a,b]"
    return f", e.g. {key}={items if isinstance(default, list) else written(default)}"


def written(value: Any) -> str:
    """Return a value of a configuration as a command line has it: ``null``, ``false``, ``[a,b]``.

    Texts have no quotes, except the empty one.
    """
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    words = {"None": "null", "True": "true", "False": "false", "": '""'}
    return words.get(str(value), str(value))


def _convert(wanted: Any, value: Value, example: str) -> Any:
    """Return a value as a type; see ``convert``."""
    if isinstance(wanted, types.UnionType):  # T | None
        if isinstance(value, Plain) and value in NULLS:
            return None
        return _convert(typing.get_args(wanted)[0], value, f" or null{example}")
    if typing.get_origin(wanted) is list:
        if not isinstance(value, list):
            raise Misfit(f"must be a list{example}")
        (of_items,) = typing.get_args(wanted)
        return [_convert(of_items, item, " in every place") for item in value]
    if typing.get_origin(wanted) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(wanted)}
        if not isinstance(value, str) or value not in choices:
            raise Misfit(f"must be one of {', '.join(choices)}")
        return choices[value]
    requirement = REQUIREMENTS[wanted] + example
    if not isinstance(value, str):
        quotes = "; put a text with : or [ in quotes" if wanted is str else ""
        raise Misfit(f"must be {requirement}{quotes}")
    if wanted is str:
        return _text(value, requirement)
    if wanted is bool and value.lower() in WORDS:
        return WORDS[value.lower()]
    if wanted is int and WHOLE.fullmatch(value):
        return int(value)
    if wanted is float and len(value) <= LONGEST and DECIMAL.fullmatch(value):
        return float(value) + 0.0  # without the sign of zero
    raise Misfit(f"must be {requirement}")


REQUIREMENTS = {
    bool: "true or false",
    int: "a whole number in decimal digits",
    float: "a finite number in decimal digits",
    str: "text",
}


def _text(value: str, requirement: str) -> str:
    if isinstance(value, Plain) and value in NULLS:
        raise Misfit(f"must be {requirement}; an empty text is written '\"\"', with both quotes")
    if len(value) > LONGEST:
        raise Misfit(f"must have at most {LONGEST} characters")
    if re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", value):
        raise Misfit("must be text in UTF-8 without control characters")
    return str(value)


# -- references ---------------------------------------------------------------------------------


def has_reference(value: Value) -> bool:
    """Return whether a text, or one in a list, has ``${...}`` that is not escaped."""
    if isinstance(value, list):
        return any(map(has_reference, value))
    found = _REFERENCE.finditer(value) if isinstance(value, str) else ()
    return any(len(match[1]) % 2 == 0 for match in found)


def escape(value: Any) -> Any:
    r"""Return a tree with every literal ``${`` as ``\${``, so that it is read as it is."""
    if isinstance(value, dict):
        return {key: escape(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escape(child) for child in value]
    if isinstance(value, str):
        return _REFERENCE.sub(r"\1\1\\${", value)
    return value


def expand(value: Value, look_up: Callable[[str], Value]) -> Value:
    r"""Return a value with its references replaced, and ``\${`` as ``${``; OmegaConf reads them.

    Args:
        value: text or a list. A text that is one reference becomes what that refers to.
        look_up: returns the value of ``section.key``, itself expanded.

    Raises:
        Misfit: a reference cannot be read; the message never has the value of a variable.
    """
    if isinstance(value, list):
        return [expand(item, look_up) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    if len(value) > LONGEST:
        raise Misfit(f"must have at most {LONGEST} characters")
    if whole := _KEY.fullmatch(value):
        return look_up(f"{whole[1]}.{whole[2]}")
    tree: dict[str, Any] = {"": {"text": str(value)}}
    for section, name in _KEY.findall(value):
        if not isinstance(found := look_up(f"{section}.{name}"), str):
            raise Misfit("refers to a list, which must stand alone")
        tree.setdefault(section, {})[name] = escape(str(found))
    try:
        text = OmegaConf.create(tree)[""]["text"]
    except (OmegaConfBaseException, RecursionError) as error:
        raise _misfit(error) from None
    if len(text := "null" if text is None else str(text)) > LONGEST:
        raise Misfit(f"must have at most {LONGEST} characters")
    return type(value)(text)


def _misfit(error: BaseException) -> Misfit:
    """Return why OmegaConf reads no value; its own message may have the value of a variable."""
    cause: BaseException | None = error
    while cause is not None:  # it wraps what a resolver raises
        if isinstance(cause, Misfit):
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UnsupportedInterpolationType):
        return Misfit("may refer to ${section.key} and ${oc.env:NAME} only; write the value itself")
    if isinstance(error, InterpolationKeyError):
        return Misfit("refers to a key that does not exist")
    return Misfit("has a ${ that begins no reference; write \\${ for these two characters")


def _read_variable(name: Any, *default: Any) -> Any:
    """Resolve ``${oc.env:NAME}`` or ``${oc.env:NAME,default}`` for the variables allowed."""
    if str(name) not in READABLE and not re.fullmatch("SLURM_(?!JWT)[A-Z0-9_]+", str(name)):
        raise Misfit(
            f"environment variable {show(Plain(name))} must not be read here, only "
            f"{', '.join(READABLE)} or SLURM_*. Write the value itself, or pass it as an override "
            "on the command line"
        )
    if name not in os.environ and not default:
        raise Misfit(
            f"environment variable {name} is not set. Set it, or write the value itself, or pass "
            "it as an override on the command line"
        )
    return os.environ.get(name, *default)


OmegaConf.register_resolver("oc.env", _read_variable, replace=True)
for _other in ("create", "decode", "deprecated", "dict.keys", "dict.values", "select"):
    OmegaConf.clear_resolver(f"oc.{_other}")
