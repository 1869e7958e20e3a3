"""Documents, rows and signed files: every changed byte is found, and nothing else is damage."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runtime.documents import (
    DamagedFile,
    check_signature,
    parse_rows,
    read_bytes,
    read_document,
    row_line,
    set_file_aside,
    set_lines_aside,
    sign,
    write_document,
)

DOCUMENT = {
    "step": 12,
    "name": "a\u00e9",
    "scores": {"eval/fid": 30.852},
    "none": None,
    "list": [1],
}


def flipped(content: bytes) -> list[bytes]:
    """The content with each of its bits flipped, one at a time."""
    return [
        content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        for at in range(len(content))
        for bit in range(8)
    ]


def test_every_flipped_bit_of_a_document_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """It changes nothing in white space, or in the name of the digest."""
    path = tmp_path / "a.json"
    write_document(path, DOCUMENT, indent=1)
    assert read_document(path) == DOCUMENT
    accepted = 0
    for content in flipped(path.read_bytes()):
        path.write_bytes(content)
        try:
            found = read_document(path)
        except DamagedFile:
            continue
        accepted += 1
        assert {key: found[key] for key in DOCUMENT} == DOCUMENT
    assert 0 < accepted < 150


def test_every_flipped_bit_of_rows_is_found_or_changes_nothing() -> None:
    """The rows around it are read; without its newline a row takes the next one with it."""
    lines = [row_line({"step": step, "loss/G": step / 3}) for step in range(3)]
    for changed in flipped(lines[1])[:-8]:
        found = [row for _, _, row in parse_rows(lines[0] + changed + lines[2], {"step": int}, "f")]
        assert found[0] == {"step": 0, "loss/G": 0.0}
        assert found[-1] == {"step": 2, "loss/G": 2 / 3}
        for middle in found[1:-1]:
            assert isinstance(middle, DamagedFile) or middle == {"step": 1, "loss/G": 1 / 3}


def test_rows_without_a_check_count_before_the_first_that_has_one() -> None:
    """An early version wrote them; a row that lost its check is damaged."""
    old, new = json.dumps({"step": 1}).encode() + b"\n", row_line({"step": 2})
    rows = [row for _, _, row in parse_rows(old + new + old, {"step": int}, "f")]
    assert rows[:2] == [{"step": 1}, {"step": 2}]
    assert isinstance(rows[2], DamagedFile)


def test_a_signed_file_may_be_changed_only_without_its_first_line(tmp_path: Path) -> None:
    """Each flipped bit of the lines is found; that of the comment changes nothing."""
    text = sign("run:\n  seed: 0\n")
    first = len(text.partition("\n")[0]) + 1
    check_signature(text.encode(), tmp_path)
    for content in flipped(text.encode())[8 * first :]:
        with pytest.raises(DamagedFile, match="remove its first line"):
            check_signature(content, tmp_path)
    check_signature(b"run:\n  seed: 1\n", tmp_path)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse: no byte on the disk


@pytest.mark.parametrize("make", [make_fifo, link_to_zeros, make_large, Path.mkdir])
def test_what_is_no_small_file_is_refused_before_it_is_read(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    """Neither does a FIFO hang the reader, nor does a device or a huge file fill the memory."""
    make(tmp_path / "a.json")
    with pytest.raises(DamagedFile, match=r"a\.json"):
        read_document(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b'{"a": 1', b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_one_message(content: bytes, tmp_path: Path) -> None:
    """It names the file; brackets that nest deep are no crash."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a\.json"):
        read_document(path)


def test_names_with_a_nul_are_refused() -> None:
    """As a damaged file: Python's own error is a ValueError."""
    with pytest.raises(DamagedFile, match="no name of a file"):
        read_bytes(Path("a\0b"))


@pytest.mark.parametrize("value", ["1", True, None, [1], {}])
def test_a_field_of_another_type_is_named(value: object, tmp_path: Path) -> None:
    """With its value and the type that it must have."""
    path = tmp_path / "a.json"
    write_document(path, {"step": value})
    with pytest.raises(DamagedFile, match=r"step \(.*\): must be of type int"):
        read_document(path, {"step": int})


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    """The caller gets the system's error, not the word that the file is damaged."""
    path = tmp_path / "a.json"
    write_document(path, DOCUMENT)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            read_document(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert caught.value.errno == errno.EMFILE


def test_what_is_set_aside_never_replaces_what_was(tmp_path: Path) -> None:
    """Neither a file nor earlier lines."""
    path = tmp_path / "a"
    for content in ("first", "second"):
        path.write_text(content)
        set_file_aside(path)
    assert (tmp_path / "a.damaged").read_text() == "first"
    assert (tmp_path / "a.damaged-2").read_text() == "second"
    for line in (b"1\n", b"2"):
        set_lines_aside(tmp_path / "rows", [line])
    assert (tmp_path / "rows.damaged").read_bytes() == b"1\n2\n"
