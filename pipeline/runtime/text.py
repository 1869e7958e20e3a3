"""Make text from outside safe to print: file names, keys and values may hold anything."""

from __future__ import annotations

import os
import re
from typing import Any

_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: a terminal obeys them
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # they reorder or break the line that follows
    "\ud800-\udfff]"  # bytes of a file name that are no UTF-8: they cannot be encoded
)


def printable(text: str) -> str:
    r"""Return a name with every character that a terminal obeys as ``\xNN`` or ``\uNNNN``."""
    return _ACTIVE.sub(lambda match: _escaped(match[0]), text)


def printable_lines(text: str) -> str:
    """Return a message in the same way, without credentials; its newlines and tabs stay."""
    return _ACTIVE.sub(
        lambda match: match[0] if match[0] in "\n\t" else _escaped(match[0]), masked(text)
    )


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def masked_tree(value: Any) -> Any:
    """Return a tree of dictionaries and lists with ``masked`` texts."""
    if isinstance(value, dict):
        return {key: masked_tree(child) for key, child in value.items()}
    if isinstance(value, list):
        return [masked_tree(child) for child in value]
    return masked(value) if isinstance(value, str) else value


_USER = re.compile(r"(\w://)[^/\s?#'\"]*@")
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:sig|token|secret|passw|credential|key|auth)[\w.-]*=)[^&;\s#'\")\]]+", re.I
)
_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|JWT)(?:_|$)")


def without_credentials(text: str) -> str:
    """Return text with ``***`` for passwords, tokens and signatures in URLs."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text)) if "://" in text else text


def has_login(text: str) -> bool:
    """Return whether a URL in a text has a user or a password before its host, not masked."""
    return any("***" not in found[0] for found in _USER.finditer(text))


def masked(text: str) -> str:
    """Return text with ``***`` for credentials: in URLs, and keys that the environment holds."""
    text = without_credentials(text)
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 8 and value in text:
            text = text.replace(value, "***")
    return text
