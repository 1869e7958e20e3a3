"""Read and write the project's small files: JSON documents, rows of JSONL files, signed YAML.

A document has the SHA-256 of its content under ``digest``, a row the first 16 digits of one under
``check``, a YAML file a line of its own. So a changed byte is found when the file is read. A reader
here raises ``DamagedFile`` for every fault of the content. It never raises it for what is no
damage: missing permission, too many open files, too little memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.log_file import open_to_append

LARGEST, UNSIZED = 256 << 20, 1 << 20
"""Bytes of the largest document that is read into memory, and of the largest file of /proc, which
has no size."""
SIGNATURE = "# sha256 of the lines below: "
DIGEST, CHECK = "digest", "check"
NOT_DAMAGE = (
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV, errno.ENOBUFS),  # its file system went away
)
"""A file that cannot be read for one of these reasons may be whole."""


class DamagedFile(UserError):
    """A file is not what was written; the message names the file and the fault."""


def read_bytes(path: Path, limit: int = LARGEST, head: int | None = None) -> bytes:
    """Return the content of a regular file, or its first ``head`` bytes; links are followed.

    A FIFO or a device is refused before it is read, since it may never end.

    Raises:
        FileNotFoundError: there is no such file, or it is a link to nothing.
        DamagedFile: it is no regular file or larger than ``limit`` bytes.
        OSError: it cannot be read, which is no damage.
    """
    with open_regular(path) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DamagedFile(f"{path}: has {size} bytes; at most {limit} are read")
        if head is not None:
            return file.read(head)
        most = max(size, UNSIZED)
        if len(content := file.read(most + 1)) > most:
            raise DamagedFile(f"{path}: is longer than its size of {size} bytes")
        return content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` the path of the file: reading from an open one raises it without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; links are followed.

    Raises:
        FileNotFoundError: there is no such file, or it is a link to nothing.
        DamagedFile: it is no regular file.
        OSError: it cannot be opened, which is no damage.
    """
    try:
        # O_NONBLOCK: a FIFO without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL in the name
        raise DamagedFile(f"{path}: no name of a file") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise
        raise DamagedFile(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFile(f"{path}: is no regular file")
    return os.fdopen(descriptor, "rb")


def parse_json(content: bytes, path: Path | str) -> dict[str, Any]:
    """Return the JSON object in some bytes; ``path`` is for the message.

    Raises:
        DamagedFile: they are no JSON object.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DamagedFile(f"{path}: must hold a JSON object, not {type(document).__name__}")
    return document


def read_document(
    path: Path, required: Mapping[str, type] | None = None, *, must_be_sealed: bool = False
) -> dict[str, Any]:
    """Return the JSON object in a file, without its digest, after comparing it with the digest.

    Args:
        path: the file.
        required: the fields that it must have, with their types.
        must_be_sealed: refuse a document without a digest, which is otherwise accepted: an earlier
            version wrote it, or a user.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it is no JSON object, its digest differs, or a field is missing.
        OSError: it cannot be read, which is no damage.
    """
    document = parse_json(read_bytes(path), path)
    if not unseal(document, must_be_sealed=must_be_sealed):
        raise DamagedFile(f"{path}: is damaged: its content differs from its {DIGEST}")
    require_fields(document, required or {}, path)
    return document


def write_document(path: Path, document: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a JSON object with its digest, atomically.

    Raises:
        OSError: it cannot be written.
    """
    write_atomic(path, json.dumps(sealed(document), indent=indent).encode())


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with its digest."""
    content = {key: value for key, value in document.items() if key != DIGEST}
    return content | {DIGEST: digest_of(content)}


def unseal(document: dict[str, Any], *, must_be_sealed: bool = False) -> bool:
    """Remove the digest of a document; return whether it is that of the rest.

    A document without one passes, unless it must be sealed.
    """
    found = document.pop(DIGEST, None)
    return found == digest_of(document) if must_be_sealed or found is not None else True


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a document in hexadecimal: of its JSON with sorted keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def require_fields(
    document: Mapping[str, Any], required: Mapping[str, type], path: Path | str
) -> None:
    """Raise ``DamagedFile`` if a field is missing or of another type.

    An int serves as a float, but a bool serves as neither.
    """
    for name, wanted in required.items():
        if name not in document:
            raise DamagedFile(f"{path}: has no field {name!r}")
        value = document[name]
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise DamagedFile(f"{path}: {name} ({value!r}): must be of type {wanted.__name__}")


def sign(text: str) -> str:
    """Return lines of YAML after a comment that has their SHA-256."""
    return f"{SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def check_signature(content: bytes, path: Path) -> None:
    """Raise ``DamagedFile`` if the lines of a signed file were changed; others are accepted."""
    first, _, rest = content.partition(b"\n")
    signature = f"{SIGNATURE}{hashlib.sha256(rest).hexdigest()}".encode()
    if first.startswith(SIGNATURE.encode()) and first.strip() != signature:
        raise DamagedFile(
            f"{path}: was changed since it was written: its checksum differs. Restore it; or, if "
            "you changed it, remove its first line."
        )


# -- rows ---------------------------------------------------------------------------------------


def row_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON with its check, the newline included."""
    content = {key: value for key, value in row.items() if key != CHECK}
    return json.dumps(content | {CHECK: digest_of(content)[:16]}).encode() + b"\n"


def parse_rows(
    content: bytes, required: Mapping[str, type], path: Path | str
) -> Iterator[tuple[int, bytes, dict[str, Any] | DamagedFile]]:
    """Yield the lines of a JSONL file: number from 1, bytes, and the row or what is wrong with it.

    Rows without a check are of an earlier version. They are accepted before the first that has one.
    Rows come without their check. Empty lines are left out.
    """
    checked = False
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            row = parse_json(line, name)
            found = row.pop(CHECK, None)
            if (checked or found is not None) and found != digest_of(row)[:16]:
                raise DamagedFile(f"{name}: is damaged: its content differs from its {CHECK}")
            if not line.endswith(b"\n"):
                raise DamagedFile(f"{name}: is cut short")
            require_fields(row, required, name)
        except DamagedFile as error:
            yield number, line, error
        else:
            checked = checked or found is not None
            yield number, line, row


def append_rows(file: IO[bytes], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to an unbuffered file, see ``write_all``."""
    write_all(file, b"".join(map(row_line, rows)))


def write_all(file: IO[bytes], content: bytes) -> None:
    """Write to an unbuffered file; a disk that becomes full raises, after a part maybe."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def set_lines_aside(path: Path, lines: Iterable[bytes]) -> Path:
    """Append damaged lines to ``NAME.damaged`` beside a file, synced; return its path."""
    aside = path.with_name(f"{path.name}.damaged")
    with open_to_append(aside) as file:
        write_all(file, b"".join(line.rstrip(b"\n") + b"\n" for line in lines))
        os.fsync(file.fileno())
    return aside


def set_file_aside(path: Path) -> Path:
    """Rename a damaged file or folder to ``NAME.damaged``, or with a number; return the new path.

    Raises:
        OSError: it cannot be renamed.
    """
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)
