"""Check what ``prepare`` is given before anything is read: SOURCE, --out, --index and sizes."""

from __future__ import annotations

import argparse
import os
import re
from os.path import realpath
from pathlib import Path

from pipeline.config.schema import DCGAN_SIZES
from pipeline.data.locations import INDEX_NAME, is_url, prepare_command
from pipeline.data.pictures import SUFFIXES
from pipeline.data.preview import PREVIEW_NAME
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.text import printable


def path_of(text: str) -> str:
    """Return a path with ``~`` expanded; a URL and the word fashion-mnist stay as they are."""
    if is_url(text):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from None


def local_path(text: str) -> Path:
    """Return the value of ``--verify``."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text}: must be a local folder or index file. Remote shards are checked when they "
            "are downloaded"
        )
    return Path(path_of(text))


def local_folder(text: str) -> Path:
    """Return the value of ``--out``."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text}: must be a local folder. Write the shards into one, then upload its files, "
            f"{INDEX_NAME} last, and give data.shards the URL"
        )
    return Path(path_of(text))


def part(text: str) -> tuple[int, int]:
    """Parse ``I/N``."""
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if numbers is None or not int(numbers[1]) < int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text}: must be I/N with I from 0 to N-1, like 0/8")
    return int(numbers[1]), int(numbers[2])


def index_file(text: str | None, source: str, out: Path | None) -> Path | None:
    """Return the path of ``--index``, which may be written; None without one.

    Args:
        text: the option.
        source: SOURCE; tars behind URLs, or listed in braces, need an index elsewhere.
        out: the option ``--out``.

    Raises:
        UserError: it is no place for an index file, or it is needed and missing.
    """
    if text is None:
        if source.endswith(".tar") and (is_url(source) or "{" in Path(source).name):
            raise UserError(
                f"SOURCE ({source}): to index tars where they are, give --index FILE.json."
            )
        return None
    if out is not None:
        raise UserError("--index and --out: give one of them; --out writes an index of its own.")
    file = Path(text).expanduser()
    if is_url(text) or file.suffix != ".json":
        raise UserError(f"--index ({text}): must be a local file that ends in .json.")
    if not file.parent.is_dir():
        raise UserError(f"--index ({text}): there is no folder {file.parent}. Make it first.")
    if file.name == "index.json" and file.parent.resolve() == Path(source).resolve():
        raise UserError(f"--index ({text}): is the usual place. Leave --index out.")
    return file


def has_tars(folder: Path) -> bool:
    """Return whether a folder holds tars at its top; raise ``UserError`` if images too."""
    if not folder.is_dir() or not (tars := list(folder.glob("[!.]*.tar"))):
        return False
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            is_image = Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            if is_image and name != PREVIEW_NAME:
                raise UserError(
                    f"SOURCE ({folder}): holds {len(tars)} tars and also images, e.g. "
                    f"{printable(str(Path(place) / name))}. Move the tars or the images to a "
                    "folder of their own."
                )
    return True


def require_writable(folder: Path) -> None:
    """Raise ``UserError`` if an index cannot be written beside tars, before they are read."""
    if os.access(folder, os.W_OK) or (folder / INDEX_NAME).exists():
        return
    command = prepare_command(folder, "--index", f"{folder.name}.json")
    raise UserError(
        f"SOURCE ({folder}): its index cannot be written there: the folder is read-only. Write it "
        f"elsewhere: {command}"
    )


def require_apart(out: Path, source: Path) -> None:
    """Raise ``UserError`` if the shards would lie in the folder of the images, or inside it."""
    if realpath(out) == realpath(source):
        raise UserError(f"--out ({out}): must be another folder than SOURCE.")
    if source.is_dir() and Path(realpath(out)).is_relative_to(realpath(source)):
        raise UserError(
            f"--out ({out}): lies inside SOURCE ({source}), whose images would be others then. "
            "Give a folder outside of it."
        )


def say_models_of(size: int) -> None:
    """Say which models take images of a size, where not all do."""
    if size not in DCGAN_SIZES:
        listed = ", ".join(map(str, DCGAN_SIZES))
        say(f"note: --size {size}: only model.architecture=mlp takes it; dcgan takes {listed}")
