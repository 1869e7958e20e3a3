"""Unpack a compressed tar into a temporary file: images are read by offset."""

from __future__ import annotations

import atexit
import bz2
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import BLOCKSIZE, TarError
from typing import IO, Any, cast

from pipeline.data.pictures import reason
from pipeline.data.tars import open_tar
from pipeline.runtime.console import say
from pipeline.runtime.documents import open_regular
from pipeline.runtime.errors import DataError

MAGIC = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
PIECE = 1 << 20


def is_compressed(path: Path) -> bool:
    """Return whether a file is packed by gzip, bzip2 or xz."""
    with open_regular(path) as file:
        head = file.read(6)
    return any(head.startswith(magic) for magic in MAGIC)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a compressed file; damage is a ``DataError`` in the block."""
    with open_regular(path) as file:
        head = file.read(6)
        file.seek(0)
        unpack: Any = next(tool for magic, tool in MAGIC.items() if head.startswith(magic))
        try:
            with unpack(file) as content:
                yield cast(IO[bytes], content)
        except BROKEN as error:
            raise DataError(
                f"SOURCE ({path}): damaged: {reason(error)}. Get the file again."
            ) from None


def unpacked(path: Path) -> Path:
    """Return the tar in a compressed file, unpacked into ``TMPDIR`` until the command ends.

    Raises:
        DataError: the file is damaged or holds no tar, or there is too little room.
    """
    folder = Path(tempfile.mkdtemp(prefix="dcgan-unpacked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / f"{path.name.split('.')[0]}.tar"
    say(f"note: {path}: unpacked into {folder} while this command runs")
    try:
        with opened(path) as content, target.open("wb") as out:
            head = content.read(BLOCKSIZE)
            if head[257:262] != b"ustar" and any(head):
                raise DataError(
                    f"SOURCE ({path}): its content is no tar. Unpack it, and give what is in it."
                )
            out.write(head)
            shutil.copyfileobj(content, out, PIECE)
    except OSError as error:
        raise DataError(
            f"SOURCE ({path}): cannot be unpacked into {folder}: {error.strerror or error}. Make "
            "room, or name a folder with room: TMPDIR=FOLDER."
        ) from None
    return target


def extracted(tar_path: Path, names: set[str], limit: int) -> Path | None:
    """Return a temporary folder with the named files of a tar, by their last names; None: none."""
    folder: Path | None = None
    try:
        with open_tar(tar_path) as tar:
            for member in tar:
                parts = member.name.split("/")
                if member.isfile() and parts[-1] in names and len(parts) > 1:
                    folder = tar_path.parent / parts[-2]
                    folder.mkdir(exist_ok=True)
                    (folder / parts[-1]).write_bytes(tar.content(member, limit))
    except TarError as error:
        raise DataError(f"SOURCE ({tar_path}): damaged: {reason(error)}.") from None
    return folder
