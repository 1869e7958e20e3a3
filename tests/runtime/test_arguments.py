"""Numbers of the command line."""

from __future__ import annotations

import argparse

import pytest

from pipeline.runtime.arguments import integer, number


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("+7", 7), ("-1", -1), ("0", 0)])
def test_whole_numbers(text, value):
    assert integer(-1, 10)(text) == value
    assert number(-1, 10)(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "11", "007a", "0x1", "1_0", "٣", "１", "²", "nan", "inf", "1e999", "9" * 5000, "\x1b[1m"],
)
def test_what_is_no_number_of_the_range_is_refused(text):
    """In one line without escape codes; ``int`` would take 1_0 and digits of other scripts."""
    for kind in (integer(-1, 10), number(-1, 10)):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"must be a .*number from -1 to 10"
        ) as error:
            kind(text)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 200


def test_whole_numbers_are_no_fractions_and_have_no_leading_zero():
    for text in ("3.5", "1e1", "07"):
        with pytest.raises(argparse.ArgumentTypeError):
            integer(0, 10)(text)
    assert number(0, 10)("3.5") == 3.5
