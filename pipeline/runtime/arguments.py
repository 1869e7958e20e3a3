"""Parse and describe command-line arguments: types with ranges, and the layout of the help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.text import printable

# Without 1_000, 0x10 and digits of other scripts, which int() and float() take.
WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]{0,39})", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", re.ASCII)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of a description, and end each option's help with its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is False or action.default in (None, ""):  # which say nothing
            return action.help
        return super()._get_help_string(action)


def adder(parser: argparse._ActionsContainer) -> Callable[..., None]:
    """Return a function to add arguments: ``add("--out DIR", "write this folder", type=Path)``."""

    def add(name: str, text: str, **settings: Any) -> None:
        *names, last = name.split()
        if names and not last.startswith("-"):
            settings["metavar"] = last
        else:
            names.append(last)
        parser.add_argument(*names, help=text, **settings)

    return add


OVERRIDE = re.compile(r"--([a-z]+\.[a-z0-9_]+=)", re.ASCII)


def plain_overrides(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with ``--section.key=value`` as ``section.key=value``.

    W&B's sweeps, among others, write the former.
    """
    return [OVERRIDE.sub(r"\1", word, count=1) if OVERRIDE.match(word) else word for word in words]


class Once(argparse.Action):
    """An option with one value that is refused if it is given twice: one would be ignored."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set the value, or end the command with code 2."""
        if getattr(namespace, self.dest, self.default) is not self.default:
            parser.error(f"argument {option_string}: was given twice; give it once")
        setattr(namespace, self.dest, values)


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for a whole number in [low, high]."""

    def parse(text: str) -> int:
        value = int(text) if WHOLE.fullmatch(text) else low - 1
        if not low <= value <= high:
            shown = printable(text[:80])
            raise argparse.ArgumentTypeError(
                f"{shown}: must be a whole number from {low} to {high}, in decimal digits"
            )
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type for a number in [low, high]."""

    def parse(text: str) -> float:
        value = float(text) if DECIMAL.fullmatch(text) else float("nan")
        if not low <= value <= high:  # also NaN
            shown = printable(text[:80])
            raise argparse.ArgumentTypeError(
                f"{shown}: must be a number from {low:g} to {high:g}, in decimal digits"
            )
        return value

    return parse


def colour(text: str) -> tuple[int, int, int]:
    """Return (R, G, B) of a colour, the argparse type of --background."""
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{printable(text[:80])}: must be a colour: white, #ff8800, ..."
        ) from None
    return red, green, blue


def file_ending_in(suffix: str) -> Callable[[str], Path]:
    """Return an argparse type for a path whose name ends in ``suffix``, e.g. ``.png``."""

    def parse(text: str) -> Path:
        if Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(f"{printable(text)}: must end in {suffix}")
        return Path(text)

    return parse


seed = integer(0, 2**63 - 1)
"""Argparse type of every ``--seed``."""
