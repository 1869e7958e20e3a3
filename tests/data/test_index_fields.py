"""Hostile indexes and tables: one message that names file, field and remedy, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CountingServer

from pipeline.data.shards import INDEX_NAME, ROW, Index, read_index
from pipeline.runtime.documents import read_document, write_document
from pipeline.runtime.errors import DataError

TABLE_NAME = f"{INDEX_NAME}.samples.npy"

HUGE = 10**4000


@pytest.fixture
def own(uneven: Index, tmp_path: Path) -> Path:
    """A copy of the uneven set that a test may change; its folder."""
    return Path(shutil.copytree(uneven.location, tmp_path / "own"))


def refused(folder: Path | str) -> str:
    """The one message with which a set is refused; it fits on a line of a terminal or two."""
    with pytest.raises(DataError) as caught:
        read_index(str(folder))
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 1200
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / INDEX_NAME
    document = read_document(path)
    change(document)
    write_document(path, document)


FIELDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "__kind__ is 'other'": lambda d: d.update(__kind__="other"),
    "__kind__ is None": lambda d: d.pop("__kind__"),
    "shape is None": lambda d: d.pop("shape"),
    "shape is '888'": lambda d: d.update(shape="888"),
    "shape[0] is '8'": lambda d: d.update(shape=["8", 8, 3]),
    "shape[1] is 8.0": lambda d: d.update(shape=[8, 8.0, 3]),
    "shape[1] is True": lambda d: d.update(shape=[8, True, 3]),
    "shape[0] is -8": lambda d: d.update(shape=[-8, 8, 3]),
    "made_by.skipped is 'x'": lambda d: d["made_by"].update(skipped="x"),
    "made_by.done is None": lambda d: d["made_by"].update(done=None),
    "made_by.left_out is [1]": lambda d: d["made_by"].update(left_out=[1]),
    "made_by.left_out is {'.txt': True}": lambda d: d["made_by"].update(left_out={".txt": True}),
    "made_by.said is 'text'": lambda d: d["made_by"].update(said="text"),
    "made_by.classes is [['a']]": lambda d: d["made_by"].update(classes=[["a"]]),
    "made_by.source_files is [{'times': 'x'}]": lambda d: d["made_by"].update(
        source_files=[{"times": "x"}]
    ),
    "shape[2] is inf": lambda d: d.update(shape=[8, 8, float("inf")]),
    "shape[0] is nan": lambda d: d.update(shape=[float("nan"), 8, 3]),
    "shape[0] is 4294967296": lambda d: d.update(shape=[2**32, 8, 3]),
    "shape[0] is a number of many digits": lambda d: d.update(shape=[HUGE, 8, 3]),
    "1 or 3 channels": lambda d: d.update(shape=[8, 8, 2]),
    "field is 'exe'": lambda d: d.update(field="exe"),
    "field is ['npy']": lambda d: d.update(field=["npy"]),
    "field is {}": lambda d: d.update(field={}),
    "samples_sha256 is 5": lambda d: d.update(samples_sha256=5),
    "samples_sha256 is '\\x1b[31m'": lambda d: d.update(samples_sha256="\x1b[31m"),
    "samples_parts is 5": lambda d: d.update(samples_parts=5),
    "samples_parts.rows is 0": lambda d: d["samples_parts"].update(rows=0),
    "samples_parts.rows is '256'": lambda d: d["samples_parts"].update(rows="256"),
    "must be the 4 checksums": lambda d: d["samples_parts"].update(rows=256),
    "must be the 1 checksums": lambda d: d["samples_parts"].update(sha256="Z" * 32),
    "samples_parts.sha256 must be": lambda d: d["samples_parts"].update(sha256=[1]),
    "label_counts is []": lambda d: d.update(label_counts=[]),
    "label_counts is {'0': 1}": lambda d: d.update(label_counts={"0": 1}),
    "label_counts is {'x': 997}": lambda d: d.update(label_counts={"x": 997}),
    "label_counts is {'0': -1, '1': 998}": lambda d: d.update(label_counts={"0": -1, "1": 998}),
    "made_by is [3]": lambda d: d.update(made_by=[3]),
    "shardlist is {}": lambda d: d.update(shardlist={}),
    "shardlist[1] is 3": lambda d: d["shardlist"].__setitem__(1, 3),
    "shardlist[0].url is None": lambda d: d["shardlist"][0].pop("url"),
    "shardlist[0].url is 5": lambda d: d["shardlist"][0].update(url=5),
    "shardlist[2].nsamples is '7'": lambda d: d["shardlist"][2].update(nsamples="7"),
    "shardlist[2].nsamples is -1": lambda d: d["shardlist"][2].update(nsamples=-1),
    "shardlist[2].nsamples is 1e+300": lambda d: d["shardlist"][2].update(nsamples=1e300),
    "shardlist[2].nsamples is 4611686018427387904": lambda d: d["shardlist"][2].update(
        nsamples=2**62
    ),
    "shardlist[3].filesize is 0": lambda d: d["shardlist"][3].update(filesize=0),
    "shardlist[3].filesize is 9223372036854775808": lambda d: d["shardlist"][3].update(
        filesize=2**63
    ),
    "shardlist[3].filesize is a number of many": lambda d: d["shardlist"][3].update(filesize=HUGE),
    "shardlist[4].sha256 is 'ABC'": lambda d: d["shardlist"][4].update(sha256="ABC"),
    "shardlist[4].sha256 is '../../../": lambda d: d["shardlist"][4].update(sha256="../" * 9999),
    "at most 1073741824 are read": lambda d: d["shardlist"][2].update(
        nsamples=2**31, filesize=2**50
    ),
}


@pytest.mark.parametrize("said", FIELDS)
def test_a_field_that_is_not_what_it_must_be(said: str, own: Path) -> None:
    """Named with its value; the message says how to make the index again."""
    edit(own, FIELDS[said])
    message = refused(own)
    assert message.startswith(
        f"{own}/{INDEX_NAME}: not an index of this project ({said}"[:150]
    ) or (said in message)
    assert f"&& python -m pipeline.prepare {own}" in message


NAMES = {
    "../x.tar": "'../x.tar'",
    "/etc/passwd": "'/etc/passwd'",
    "a\0.tar": "'a\\x00.tar'",
    "a\x1b[2J.tar": "'a\\x1b[2J.tar'",
    "a\u202etar.exe": "'a\\u202etar.exe'",
    "a\ud800.tar": "'a\\ud800.tar'",
    "é" * 150 + ".tar": "é",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_shard_is_plain_and_printed_escaped(name: str, own: Path) -> None:
    """No path, no byte that a file system or a terminal acts on, and none too long for a file."""
    edit(own, lambda d: d["shardlist"][0].update(url=name))
    message = refused(own)
    assert "must be a plain file name beside it" in message
    assert NAMES[name] in message


def test_a_shard_is_listed_once(own: Path) -> None:
    """Two entries of one file would read the same bytes as two shards."""
    edit(own, lambda d: d["shardlist"][1].update(url=d["shardlist"][2]["url"]))
    assert "is listed more than once" in refused(own)


BYTES = {
    "brackets": b"[" * 200_000,
    "objects": b'{"a":' * 100_000,
    "digits": b'{"shape": ' + b"9" * 20_000 + b"}",
    "NUL": bytes(100),
    "half": b'{"__kind__": "wids-shard-index-v1"',
    "escape codes": b'{"\x1b[31m": \x1b]0;title\x07}',
    "latin": "é".encode("latin-1"),
    "twice": b"{}{}",
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_index(name: str, own: Path) -> None:
    """However deep, long or odd: one message, also from a server."""
    (own / INDEX_NAME).write_bytes(BYTES[name])
    assert "not an index of this project" in refused(own)


@pytest.mark.parametrize("name", [INDEX_NAME, TABLE_NAME])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link in a circle", "huge"])
def test_files_that_are_no_files(kind: str, name: str, own: Path) -> None:
    """Nothing is waited for, and nothing without an end is read."""
    path = own / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link in a circle":
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    message = refused(own)
    assert f"{path} cannot be read" in message
    assert f"&& python -m pipeline.prepare {own}" in message


# -- the table ----------------------------------------------------------------------------------


def put_table(folder: Path, content: bytes) -> None:
    """Store a table and sign it: whoever makes a hostile table makes the index too."""
    (folder / TABLE_NAME).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(folder, lambda d: d.update(samples_sha256=digest))


def npy(header: str, rows: bytes, version: int = 1) -> bytes:
    text = header.encode("latin-1")
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + rows


DESCR = [("offset", "<u8"), ("length", "<u4"), ("label", "<i4")]


def header(**changes: object) -> str:
    return repr({"descr": DESCR, "fortran_order": False, "shape": (997,)} | changes)


@pytest.fixture
def rows(own: Path) -> bytes:
    return bytes(read_index(str(own)).table.tobytes())


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "many rows": lambda rows: npy(header(shape=(2**60,)), rows),
    "rows of many digits": lambda rows: npy(header(shape=(HUGE // 10**500,)), rows),
    "negative rows": lambda rows: npy(header(shape=(-1,)), rows),
    "rows that are true": lambda rows: npy(header(shape=(True,)), rows),
    "no rows": lambda rows: npy(header(shape=()), rows),
    "two dimensions": lambda rows: npy(header(shape=(997, 1)), rows),
    "objects": lambda rows: npy(header(descr="|O"), rows),
    "pickled column": lambda rows: npy(header(descr=[("offset", "|O")]), rows),
    "wide column": lambda rows: npy(header(descr=[("offset", "<u8", (2**30, 2**30))]), rows),
    "other columns": lambda rows: npy(header(descr=DESCR[:2]), rows),
    "fortran": lambda rows: npy(header(fortran_order=True), rows),
    "code": lambda rows: npy("__import__('os').abort()", rows),
    "brackets": lambda rows: npy("(" * 4000, rows),
    "minus signs": lambda rows: npy("-" * 4000 + "1", rows),
    "no dict": lambda rows: npy("[1, 2]", rows),
    "header past the end": lambda rows: npy(header(), rows)[:40],
    "version 3, 4 GiB of header": lambda rows: b"\x93NUMPY\x03\x00\xff\xff\xff\xff" + rows,
    "version 9": lambda rows: b"\x93NUMPY\x09\x00\x80\x00" + rows,
    "a zip": lambda rows: b"PK\x03\x04" + rows,
    "a pickle": lambda rows: b"cos\nabort\n(tR." + rows,
    "empty": lambda rows: b"",
    "a row less": lambda rows: npy(header(), rows[:-16]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_table_with_a_hostile_header(name: str, own: Path, rows: bytes) -> None:
    """Its checksum is right; its header is not believed, unpickled or evaluated."""
    put_table(own, BOMBS[name](rows))
    message = refused(own)
    assert message.startswith(f"{own}/{TABLE_NAME}: damaged or not of this index (")
    assert f"rm -r {own}/{INDEX_NAME} && python -m pipeline.prepare {own}" in message


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_table_in_any_version_of_npy_is_read(version: int, own: Path, rows: bytes) -> None:
    """As numpy may come to write it."""
    put_table(own, npy(header(), rows, version))
    assert read_index(str(own)).table.tobytes() == rows


@pytest.mark.parametrize(
    ("sample", "offset", "length", "label"),
    [
        (0, 2**64 - 1, 320, 0),
        (5, 2**63, 320, 0),
        (996, 2**40, 320, 0),
        (500, 0, 2**32 - 1, 0),
        (500, 2**64 - 320, 320, 0),  # offset and length overflow to a small number
        (17, 0, 0, 0),
        (418, 1536, 320, -2),
    ],
)
def test_a_sample_lies_inside_its_shard(
    sample: int, offset: int, length: int, label: int, own: Path, rows: bytes
) -> None:
    """Offsets, lengths and labels are checked before one is used; sums do not overflow."""
    table = np.frombuffer(rows, ROW).copy()
    table[sample] = (offset, length, label)
    put_table(own, npy(header(), table.tobytes()))
    assert f"sample {sample} is {length} bytes at {offset} with label {label}" in refused(own)


def test_the_last_byte_of_a_shard_may_be_used(own: Path, rows: bytes) -> None:
    """The bound is exact, in both directions."""
    sizes = [s["filesize"] for s in json.loads((own / INDEX_NAME).read_text())["shardlist"]]
    table = np.frombuffer(rows, ROW).copy()
    table[0] = (sizes[0] - 320, 320, 0)
    put_table(own, npy(header(), table.tobytes()))
    assert read_index(str(own)).num_samples == 997
    table[0] = (sizes[0] - 319, 320, 0)
    put_table(own, npy(header(), table.tobytes()))
    assert "sample 0 is 320 bytes" in refused(own)


READ = """
import resource, sys
from pipeline.data.shards import read_index
from pipeline.runtime.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_index(sys.argv[1])
except DataError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("where", ["disk", "server"])
def test_an_index_that_promises_much_takes_little_memory(
    where: str, own: Path, rows: bytes, serve: Callable[[Path], CountingServer]
) -> None:
    """Samples, shapes and sizes at the edge of what is allowed, behind a table of a few KB."""
    put_table(own, npy(header(shape=(2**30 - 1,)), rows))

    def promise(document: dict[str, Any]) -> None:
        del document["samples_parts"], document["label_counts"]
        document["shape"] = [65536, 65536, 3]
        document["shardlist"] = document["shardlist"][:1]
        document["shardlist"][0] |= {"nsamples": 2**30 - 1, "filesize": 2**61}

    edit(own, promise)
    location = str(own) if where == "disk" else serve(own).url
    done = subprocess.run(
        [sys.executable, "-c", READ, location], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
