"""Parse and describe command-line arguments: types with ranges, and the layout of the help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of a description, and end each option's help with its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:  # "(default: None)" says nothing
            return action.help
        return super()._get_help_string(action)


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for a whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type for a number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # also NaN
            raise argparse.ArgumentTypeError(f"{text}: must be a number from {low:g} to {high:g}")
        return value

    return parse


def file_ending_in(suffix: str) -> Callable[[str], Path]:
    """Return an argparse type for a path whose name ends in ``suffix``, e.g. ``.png``."""

    def parse(text: str) -> Path:
        if Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(f"{text}: must end in {suffix}")
        return Path(text)

    return parse


seed = integer(0, 2**63 - 1)
"""Argparse type of every ``--seed``."""
