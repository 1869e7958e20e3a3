"""Hostile tars: one message, no traceback, bounded memory and time, for scan, index and verify."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import pixels_of

from pipeline.data.audit import index_tars, verify
from pipeline.data.codecs import encode
from pipeline.data.shards import Index
from pipeline.data.tar_scan import scan
from pipeline.runtime.errors import DataError

IMAGE = encode(pixels_of(0, (8, 8, 3)), "npy")
END = bytes(1024)


def block(
    name: str | bytes,
    content: bytes = b"",
    kind: bytes = b"0",
    size: bytes | None = None,
    prefix: bytes = b"ustar\x0000",
) -> bytes:
    """A header of 512 bytes with a right checksum, and its padded content."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    field = b"%011o\0" % len(content) if size is None else size
    head = bytearray(512)
    head[: len(raw[:100])] = raw[:100]
    head[100:124] = b"0000644\0" + b"0000000\0" * 2
    head[124 : 124 + len(field)] = field
    head[136:148] = b"00000000000\0"
    head[156:157] = kind
    head[257:265] = prefix
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + content + bytes(-len(content) % 512)


def base_256(number: int) -> bytes:
    """A size as GNU tar writes it when eleven octal digits are too few."""
    negative = b"\xff" if number < 0 else b"\x80"
    return negative + (number % 256**11).to_bytes(11, "big")


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records:
        line = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        size = len(line) + 1
        while len(str(size)) + len(line) != size:
            size += 1
        body += str(size).encode() + line
    return block("pax", body, kind)


ONE = block("a.npy", IMAGE)
HOSTILE: dict[str, bytes] = {
    "pax size beyond the file": pax(("size", str(2**40))) + ONE,
    "pax size of many digits": pax(("size", "9" * 5000)) + ONE,
    "pax size below zero": pax(("size", "-5120")) + ONE,
    "pax size that goes round": ONE + pax(("size", "-1024")) + block("b.npy", IMAGE),
    "pax size in words": pax(("size", "many")) + ONE,
    "base-256 size beyond the file": block("a.npy", IMAGE, size=base_256(2**63)),
    "base-256 size of 88 bits": block("a.npy", IMAGE, size=base_256(2**87)),
    "base-256 size below zero": ONE + block("b.npy", IMAGE, size=base_256(-1024)),
    "label of a GiB": ONE + block("a.cls", size=base_256(2**30)),
    "image of 4 GiB": block("a.npy", size=base_256(2**32)),
    "20,000 long names": block("@", b"n" * 200 + b"\0", b"L") * 20_000 + ONE,
    "20,000 long links": block("@", b"n" * 200 + b"\0", b"K") * 20_000 + ONE,
    "20,000 pax headers": pax(("path", "a.npy")) * 20_000 + ONE,
    "20,000 global pax headers": pax(("comment", "x"), kind=b"g") * 20_000 + ONE,
    "long name of 64 MiB": block("@", b"n" * (64 << 20), b"L") + ONE,
    "pax header of 64 MiB": pax(("comment", "x" * (64 << 20))) + ONE,
    "pax header of digits": block("pax", b"9" * 16_000, b"x") + ONE,
    "pax header of small records": block("pax", b"2 " * 8000 + b"=", b"x") + ONE,
    "pax header cut": block("pax", b"30 path=a", b"x") + ONE,
    "pax length zero": block("pax", b"0 path=a\n", b"x") + ONE,
    "many global keys": b"".join(
        pax(*((f"k{i}.{j}", "") for j in range(100)), kind=b"g") + block(f"{i}.txt", b"")
        for i in range(20)
    )
    + ONE,
    "old sparse": block("a.npy", IMAGE, b"S", prefix=b"ustar  \0"),
    "pax sparse": pax(("GNU.sparse.map", "0,9,x"), ("GNU.sparse.size", "9")) + ONE,
    "pax sparse 1.0": pax(
        ("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")
    )
    + block("a.npy", b"9" * 200_000),
    "two tars in one": ONE + END + bytes(32 << 20) + ONE,
}


HARMLESS = {
    "20,000 small members": block("a.txt") * 20_000 + ONE,
    "escape codes": block("\x1b[2Ja.npy", IMAGE) + block("\x1b[2Ja.cls", b"\x1b[31m"),
    "no UTF-8": block(b"\xff\xfe.npy", IMAGE) + block(b"\xff\xfe.cls", b"x"),
}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert message.replace("\n", "").isprintable(), message
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_one_message(name: str, tmp_path: Path) -> None:
    """Named with the file, nothing else, by each reader of tars."""
    path = tmp_path / "x.tar"
    path.write_bytes(HOSTILE[name] + END)
    assert str(path) in refused(lambda: scan(path))
    if len(HOSTILE[name]) < 1 << 20:
        assert str(path) in refused(lambda: index_tars(tmp_path, 1))
        assert str(path) in refused(lambda: verify(tmp_path, 1))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["x.tar"]


LIMITED = """
import resource, sys
from pathlib import Path
from pipeline.data.tar_scan import scan
from pipeline.runtime.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(scan(Path(sys.argv[1]))[0].nsamples, end=" ")
except DataError:
    print("refused", end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize(
    "name",
    [
        "long name of 64 MiB",
        "pax header of 64 MiB",
        "pax header of digits",
        "pax header of small records",
        "20,000 pax headers",
        "20,000 global pax headers",
        "label of a GiB",
        "pax sparse 1.0",
        *HARMLESS,
    ],
)
def test_a_hostile_tar_takes_little_memory(name: str, tmp_path: Path) -> None:
    """What its headers promise, or hold, is not allocated."""
    path = tmp_path / "x.tar"
    path.write_bytes((HOSTILE | HARMLESS)[name] + END)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result, mib = done.stdout.split()
    assert result == ("1" if name in HARMLESS else "refused")
    assert int(mib) < 150


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nothing"])
def test_what_is_no_file_is_not_read(kind: str, tmp_path: Path) -> None:
    """A FIFO is not waited for, /dev/zero has no end."""
    path = tmp_path / "x.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    for call in (lambda: scan(path), lambda: index_tars(tmp_path, 1), lambda: verify(tmp_path, 1)):
        assert str(path) in refused(call)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_listed_shard_that_is_no_file_is_a_fault_of_the_set(
    kind: str, make_shards: Callable[..., Index], tmp_path: Path
) -> None:
    """``--verify`` names it and goes on with the others."""
    index = make_shards(tmp_path / "set", [3, 3])
    path = Path(index.location, index.shards[0].url)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    message = refused(lambda: verify(Path(index.location), 2))
    assert f"{path}: cannot be read: is no regular file" in message
    assert "1 faults, 1 of 2 shards damaged" in message


def test_names_in_messages_of_a_damaged_set_are_escaped(tmp_path: Path) -> None:
    """A sample whose name clears the screen, in the list of faults."""
    path = tmp_path / "x.tar"
    path.write_bytes(block("\x1b[2Ja.npy", b"no image") + END)
    message = refused(lambda: index_tars(tmp_path, 1))
    assert "sample \\x1b[2Ja.npy at offset 512" in message


def test_padding_and_long_names_of_usual_tools_are_accepted(tmp_path: Path) -> None:
    """GNU tar's -b 2048, a path of 4,000 characters, and some 60 extended attributes."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for k in range(3):
            info = tarfile.TarInfo("/".join(["d" * 200] * 20) + f"/{k}.npy")
            info.size = len(IMAGE)
            info.pax_headers = {f"SCHILY.xattr.user.{i}": "v" * 100 for i in range(60)}
            tar.addfile(info, io.BytesIO(IMAGE))
    with path.open("ab") as file:
        file.write(bytes(1 << 20))
    assert scan(path)[0].nsamples == 3


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("letter", "xgXLKS0")
def test_names_of_one_letter_are_no_headers(letter: str, form: int, tmp_path: Path) -> None:
    """A long name is content: no byte of it is taken for the type of a header."""
    path = tmp_path / "x.tar"
    lengths = [90, 95, *([] if form == tarfile.USTAR_FORMAT else range(150, 600, 50))]
    with tarfile.open(path, "w", format=form) as tar:
        for length in lengths:
            info = tarfile.TarInfo(letter * length + ".npy")
            info.size = len(IMAGE)
            tar.addfile(info, io.BytesIO(IMAGE))
    assert scan(path)[0].nsamples == len(lengths)
