"""Tell where shard sets lie: the parts of ``data.shards``, the files of a set, and remedies.

``data.shards`` names a folder, a URL or an index file; or several of them, joined by ``::`` or
listed in braces: ``data/a::data/b``, ``s3://bucket/part-{00..07}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from itertools import islice
from pathlib import Path

from pipeline.runtime.errors import DataError
from pipeline.runtime.files import is_folder

INDEX_NAME = "index.json"
LEFT_OUT = "***"
"""What is stored with a run in place of a credential."""
MOST_PARTS = 100_000
OTHER_TOOLS = {"mosaicml-streaming": {"shards", "version"}, "litdata": {"chunks", "config"}}
"""Keys of the index.json that other tools write."""
_BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{},]*(?:,[^{},]*)+))\}")


def is_url(location: str) -> bool:
    """Return whether a location is a URL and no path."""
    return "://" in location


def parts_of(text: str, field: str) -> list[str]:
    """Return the locations that a text names, in order: parts between ``::``, braces expanded.

    Raises:
        DataError: there are too many, none, or one twice.
    """
    found = []
    for part in text.split("::"):
        if without_query(part).endswith(".tar"):
            raise DataError(f"{field} ({part}): {_names_tars(part)}")
        found += [part] if os.path.lexists(Path(part)) else expanded(part, field)
    if not all(found):
        raise DataError(f"{field} ({text}): names an empty location. Write A::B for two sets.")
    twice = sorted(part for part in set(found) if found.count(part) > 1) if len(found) > 1 else []
    if twice:
        raise DataError(f"{field} ({text}): names {twice[0]} more than once. Leave one out.")
    return found


def expanded(text: str, field: str) -> list[str]:
    """Return the texts that braces stand for, as in a shell: ``{000..127}`` and ``{a,b}``.

    Raises:
        DataError: they are more than ``MOST_PARTS``.
    """
    if (match := _BRACES.search(text)) is None:
        return [text]
    first, last, listed = match.groups()
    if listed is None:
        low, high = int(first), int(last)
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
        choices = [f"{n:0{width}d}" for n in islice(numbers, MOST_PARTS + 1)]
    else:
        choices = listed.split(",")
    rests = expanded(text[match.end() :], field)
    if len(choices) * len(rests) > MOST_PARTS:
        raise DataError(f"{field} ({text}): names more than {MOST_PARTS} files. Name fewer.")
    return [f"{text[: match.start()]}{choice}{rest}" for choice in choices for rest in rests]


def folder_and_index(location: str) -> tuple[str, str]:
    """Return (folder or URL, name of the index in it) of a set; ``X.json`` names an index file."""
    base, mark, query = _cut_query(location)
    if base.endswith(".json") and not is_folder(Path(base).expanduser()):
        folder, _, name = base.rpartition("/")
        return f"{folder or ('/' if base.startswith('/') else '.')}{mark}{query}", name
    return (f"{base.rstrip('/')}{mark}{query}" if is_url(base) else location), INDEX_NAME


def beside(folder: str, name: str) -> str:
    """Return the path or URL of a file in a folder; the query of a URL stays at its end."""
    base, mark, query = _cut_query(folder)
    return f"{base.rstrip('/') if is_url(base) else base}/{name}{mark}{query}"


def _cut_query(location: str) -> tuple[str, str, str]:
    """Return (before, "?", query) of an http URL; other schemes have no query."""
    if location.startswith(("http://", "https://")):
        return location.partition("?")
    return location, "", ""


def without_query(url: str) -> str:
    """Return an http URL without its query, which may hold a credential."""
    return _cut_query(url)[0]


# -- remedies -----------------------------------------------------------------------------------


def prepare_command(*words: str | Path) -> str:
    """Return a command line of ``pipeline.prepare`` that a shell takes as it is."""
    return f"python -m pipeline.prepare {shlex.join(map(str, words))}"


def what_is_missing(location: str, options: str) -> str:
    """Return what a path has in place of a shard set, and the command that makes one of it.

    Args:
        location: a path without an index.
        options: of the command: size and channels, like ``--size 64``.
    """
    path = Path(location).expanduser()
    wanted = options.split()
    name = path.name.partition(".")[0] or "shards"
    other = path.with_name(f"{name}-{wanted[1] if len(wanted) > 1 else 'shards'}")
    if path.is_file() or (is_folder(path) and any(path.iterdir())):
        if is_folder(path) and (tars := len(list(path.glob("[!.]*.tar")))):
            elsewhere = "" if os.access(path, os.W_OK) else f"--index {name}.json"
            made = f" and set data.shards={name}.json" if elsewhere else ""
            command = prepare_command(path, *elsewhere.split())
            return f"{tars} tars without an index. Make it with: {command}{made}"
        command = prepare_command(path, "--out", other, *wanted)
        return (
            f"no {INDEX_NAME}: no shards, but other files. If they are images, make shards with: "
            f"{command} and set data.shards={other}"
        )
    command = prepare_command("fashion-mnist", "--out", path, *wanted)
    found = f"no {INDEX_NAME}" if is_folder(path) else "no such folder"
    return f"{found}. Make it with: {command} (or a folder of images for fashion-mnist)"


def _names_tars(location: str) -> str:
    url = without_query(location)
    name = re.split("[-_.{]", url.rpartition("/")[2])[0] or "tars"
    index = f"{name}.json" if is_url(url) else str(Path(url).with_name(f"{name}.json"))
    command = prepare_command(url, "--index", index)
    return f"names tars and no set. Make an index of them: {command} and set data.shards={index}"


def remedy_for_index(content: bytes, location: str, name: str) -> str:
    """Return what to do about a file that is no index, or a damaged one.

    Args:
        content: its bytes; b"" if they cannot be read.
        location: of the set, as the user gave it.
        name: of the file.
    """
    if content.lstrip()[:1] == b"<":
        return "It is a web page, as of a login or an error. Get the file itself again."
    document: object = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(content)
    keys = set(document) if isinstance(document, dict) else set()
    if tool := next((tool for tool, wanted in OTHER_TOOLS.items() if wanted <= keys), ""):
        return f"It is of {tool}. Export its images to a folder or to tars, and prepare these."
    if is_url(location):
        return "Upload it again, with all files of the set."
    folder = Path(name).parent
    if "shardlist" in keys and "samples_sha256" not in keys:
        own = folder / "dcgan.json"
        command = prepare_command(folder, "--index", own)
        return f"It is of another tool. Make one beside it: {command} and set data.shards={own}"
    if location.endswith(".json"):
        again = prepare_command("TARS", "--index", name)
        return f"Restore it, or remove it and make it again: {again}"
    remove = shlex.join(["rm", "-r", name])
    return f"Restore it, or make it again: {remove} && {prepare_command(folder)}"
