"""Results of commands: all files or none, nobody's file replaced, one line when interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPO, environment

from pipeline.runtime import files
from pipeline.runtime.errors import GenerationError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The place was free when the work began. Of two files none is left when one cannot be."""
    a, b = tmp_path / "a.gif", tmp_path / "b.png"
    assert files.check_output_path(b) == b
    b.write_text("mine")
    with pytest.raises(GenerationError, match=r"b\.png\): exists now; give another name"):
        files.write_results({a: b"film", b: b"picture"})
    assert names(tmp_path) == ["b.png"]
    assert b.read_text() == "mine"
    files.write_results({a: b"film", b: b"picture"}, replace=True)
    assert (a.read_bytes(), b.read_bytes()) == (b"film", b"picture")
    assert names(tmp_path) == ["a.gif", "b.png"]


def test_without_hard_links_results_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    files.write_results({tmp_path / "a": b"1"})
    with pytest.raises(GenerationError, match="exists now"):
        files.write_results({tmp_path / "a": b"2"})
    assert (tmp_path / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["a"]


def test_a_place_is_followed_to_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``~`` is the home folder, also behind ``--out=``; a link stays a link."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.check_output_path(Path("~/new/x.png")) == tmp_path / "new" / "x.png"
    (tmp_path / "link.png").symlink_to("new/real.png")
    files.write_results({files.check_output_path(tmp_path / "link.png"): b"1"})
    assert (tmp_path / "new" / "real.png").read_bytes() == b"1"
    assert (tmp_path / "link.png").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop" / "x.png", Path("~nobody-here/x.png"), tmp_path / ("x" * 250)):
        with pytest.raises(GenerationError, match="cannot be written"):
            files.check_output_path(path)


def test_an_interruption_between_two_files_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = files._rename_new

    def interrupted(partial: Path, path: Path) -> None:
        if path.name == "b.png":
            raise KeyboardInterrupt
        rename(partial, path)

    monkeypatch.setattr(files, "_rename_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_results({tmp_path / "a.gif": b"1", tmp_path / "b.png": b"2"})
    assert not names(tmp_path)


WORKING = """
import sys, time
from pipeline.runtime import signals
if "installed" in sys.argv:
    signals.install()
    print("ready", flush=True)
    while not signals.received():
        time.sleep(0.01)
with signals.exit_on_interrupt("interrupted: nothing was written"):
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        raise AttributeError("of a library that was cut short")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [(), ("installed",)])
def test_a_signal_ends_a_command_with_one_line(
    number: signal.Signals, words: tuple[str, ...]
) -> None:
    """While it works, whatever a library makes of it; and one that came while it started."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING, *words],
        env=environment() | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert said == "interrupted: nothing was written.\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_has_no_end_is_not_hashed(kind: str, tmp_path: Path) -> None:
    """An error with the name of the file, at once."""
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match=r"regular file|directory") as caught:
        files.sha256_of(path)
    assert str(caught.value.filename) == str(path)
