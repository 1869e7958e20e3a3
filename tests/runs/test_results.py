"""The ledger of scores: rows, keys, the best row, locks between processes, marks of sent rows."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.runs.results import (
    APPEND,
    SENDER,
    Key,
    Ledger,
    Row,
    best,
    kept_steps,
    key_of,
    read_rows,
    supersede_after,
)
from pipeline.runtime.documents import row_line
from pipeline.runtime.errors import RunFolderError

KEY = Key(10, "ema", "p")
BYTE_OF_KEY = 880097651479  # 2 and the first five bytes of the SHA-256 of "10|ema|p|"


def row(step: int, fid: float | None = 1.0, protocol: str = "p", **more: object) -> Row:
    scores = {"eval/fid": fid}
    fixed = {"step": step, "weights": "ema", "protocol": protocol, "scores": scores}
    return fixed | {"headline": "eval/fid"} | more


def line_of(content: Row) -> bytes:
    return row_line(content)


def write(folder: Path, *lines: bytes) -> None:
    (folder / "evaluations.jsonl").write_bytes(b"".join(lines))


def steps(rows: list[Row]) -> list[int]:
    return [row["step"] for row in rows]


@contextmanager
def locked_elsewhere(folder: Path, byte: int) -> Iterator[None]:
    """Another process holds a byte of the ledger's lock file."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2])); print(flush=True)\n"
        "sys.stdin.read()"
    )
    words = [sys.executable, "-S", "-c", code, str(folder / ".evaluations.lock"), str(byte)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate()


def is_free(folder: Path, byte: int) -> bool:
    """Whether another process can lock this byte of the ledger's lock file."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))"
    )
    words = [sys.executable, "-S", "-c", code, str(folder / ".evaluations.lock"), str(byte)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_run_without_a_ledger_has_no_rows(tmp_path: Path) -> None:
    """A run that was never evaluated is no error: it has no rows and nothing is sent."""
    assert read_rows(tmp_path) == []
    ledger = Ledger(tmp_path)
    assert ledger.rows() == ledger.unsent() == []
    assert ledger.sent() == []
    assert not ledger.has(KEY)
    ledger.close()


def test_lines_that_are_no_rows_are_skipped(tmp_path: Path) -> None:
    """Incomplete lines, other JSON and bad bytes are skipped; the rows after them are read."""
    bad = [
        b'{"step": 2, "wei\n',
        b"[]\n",
        b"{}\n",
        b"\xff\n",
        b"\n",
        line_of(row(0) | {"step": "x"}),
    ]
    bad += [line_of({k: v for k, v in row(3).items() if k != "protocol"})]
    write(tmp_path, line_of(row(9)), *bad, line_of(row(4)))
    assert steps(read_rows(tmp_path)) == [9, 4]


def test_of_rows_with_one_key_the_first_counts(tmp_path: Path) -> None:
    """A second row with the same step, weights and protocol is ignored; other keys are kept."""
    rows = [row(1, 5.0), row(1, 6.0), row(1, 7.0, "q"), row(1, 8.0, weights="raw"), row(2, 9.0)]
    write(tmp_path, *map(line_of, rows))
    assert [r["scores"]["eval/fid"] for r in read_rows(tmp_path)] == [5.0, 7.0, 8.0, 9.0]


def test_a_key_is_the_step_the_weights_and_the_protocol() -> None:
    """The other fields of a row do not count."""
    assert key_of({"step": 10, "weights": "ema", "protocol": "p", "more": 1}) == KEY


def test_the_best_row_has_the_lowest_score_and_of_equal_ones_the_earliest() -> None:
    """Rows whose headline has no score do not count."""
    rows = [row(1, None), row(4, 2.0), row(3, 2.0), row(2, 3.0), row(0, headline="eval/kid")]
    assert best(rows) == row(3, 2.0)
    assert best([row(1, None)]) is None
    assert best([]) is None


def test_the_best_row_may_have_the_highest_score() -> None:
    """A row can say that higher is better; equal scores still give the earliest step."""
    rows = [row(n, score, higher_is_better=True) for n, score in ((1, 1.0), (3, 5.0), (2, 5.0))]
    best_row = best(rows)
    assert best_row is not None
    assert best_row["step"] == 2
    assert best([r | {"higher_is_better": False} for r in rows]) == rows[0] | {
        "higher_is_better": False
    }


def test_kept_are_the_steps_without_a_score_and_the_best_that_exist(tmp_path: Path) -> None:
    """A better step that was removed neither counts nor comes back; a protocol may keep nothing."""
    scores = ((1, 6.0, "p"), (2, 5.0, "p"), (3, 7.0, "p"), (4, 1.0, "q"), (3, 2.0, "q"))
    rows = [row(*score) for score in (*scores, (9, 2.0, "r"), (3, None, "s"))]
    write(tmp_path, *map(line_of, rows))
    assert kept_steps(tmp_path, {step: {""} for step in (1, 3, 4, 6, 7)}) == {1, 4, 6, 7}


def test_a_score_counts_only_for_the_weights_that_it_is_of(tmp_path: Path) -> None:
    """Of two trainings of one step the newer row counts; a checkpoint of neither has no score."""
    old, new = row(1, 1.0, generator="a"), row(1, 5.0, generator="b")
    write(tmp_path, line_of(row(2, 3.0, generator="c")), line_of(old), line_of(new), line_of(new))
    assert [r["scores"]["eval/fid"] for r in read_rows(tmp_path)] == [3.0, 5.0]
    assert best(read_rows(tmp_path)) == row(2, 3.0, generator="c")
    assert kept_steps(tmp_path, {1: {"", "b"}, 2: {"", "c"}}) == {2}
    assert kept_steps(tmp_path, {1: {"", "b"}, 2: {"", "x"}}) == {1, 2}
    ledger = Ledger(tmp_path)
    assert not ledger.revive(KEY._replace(step=1))
    assert ledger.revive(key_of(old))  # the step was trained to these weights again
    assert [r["scores"]["eval/fid"] for r in read_rows(tmp_path)] == [3.0, 1.0]
    ledger.close()


def test_rows_after_the_step_of_a_resume_are_superseded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They count again when their step has the same weights again; damaged lines stay for later."""
    rows = [row(step, float(step), generator=f"g{step}") for step in (10, 20, 30)]
    write(tmp_path, *map(line_of, rows), b"{}\n")
    before = (tmp_path / "evaluations.jsonl").read_bytes()
    supersede_after(tmp_path, 30)
    assert (tmp_path / "evaluations.jsonl").read_bytes() == before
    supersede_after(tmp_path, 10)
    assert steps(read_rows(tmp_path)) == [10]
    assert "2 scores of steps after 10 no longer count" in capsys.readouterr().err
    assert (tmp_path / "evaluations.jsonl").read_bytes().count(b"\n") == 4
    ledger = Ledger(tmp_path)
    assert ledger.append(row(20, 7.0, generator="other"))
    assert ledger.revive(key_of(rows[2]))
    assert not ledger.revive(key_of(rows[2])._replace(generator="other"))
    assert [r["scores"]["eval/fid"] for r in ledger.rows()] == [10.0, 7.0, 30.0]
    assert is_free(tmp_path, APPEND)
    ledger.close()
    supersede_after(tmp_path / "none", 10)  # a run without a ledger


def test_a_folder_that_cannot_hold_a_ledger_is_a_user_error(tmp_path: Path) -> None:
    """The message names the folder, the reason and the remedy."""
    folder = tmp_path / "none"
    with pytest.raises(RunFolderError) as caught:
        Ledger(folder)
    assert str(caught.value) == (
        f"{folder}: evaluations cannot be recorded there (.evaluations.lock: No such file or "
        "directory). Mend it, then run the same command again; or evaluate a copy of the run."
    )


def test_rows_are_sorted_by_step_and_selected_by_protocol(tmp_path: Path) -> None:
    """All protocols are listed unless one is named."""
    write(tmp_path, *map(line_of, (row(30), row(20, 1.0, "q"), row(10), row(5, 1.0, "q"))))
    ledger = Ledger(tmp_path)
    assert steps(ledger.rows()) == [5, 10, 20, 30]
    assert steps(ledger.rows("p")) == [10, 30]
    assert ledger.has(KEY)
    assert not ledger.has(KEY._replace(protocol="q"))
    ledger.close()


def test_the_file_holds_one_line_for_each_appended_row(tmp_path: Path) -> None:
    """A repeated key adds nothing. An incomplete last line is moved to a file of its own."""
    ledger = Ledger(tmp_path)
    ledger.path.touch()
    first, second, third = map(line_of, (row(1), row(2), row(3)))
    assert ledger.append(row(1)) is True
    assert ledger.append(row(2)) is True
    assert ledger.append(row(1, 9.0)) is False
    assert ledger.path.read_bytes() == first + second
    write(tmp_path, first, b'{"st')
    ledger.append(row(3))
    assert ledger.path.read_bytes() == first + third
    assert ledger.path.with_name("evaluations.jsonl.damaged").read_bytes() == b'{"st\n'
    ledger.path.unlink()
    ledger.append(row(2))
    assert ledger.path.read_bytes() == second
    assert is_free(tmp_path, APPEND)
    ledger.close()


def test_a_row_is_in_the_file_before_the_file_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing a row that is still in a buffer would not save it from a power cut."""
    ledger, at_sync = Ledger(tmp_path), list[bytes]()
    monkeypatch.setattr(os, "fsync", lambda _: at_sync.append(ledger.path.read_bytes()))
    ledger.append(row(1))
    assert at_sync == [line_of(row(1))]
    ledger.close()


def test_a_full_disk_is_a_user_error_and_loses_no_row(tmp_path: Path) -> None:
    """The failed append releases its lock; repeated with space, it adds its row."""
    ledger = Ledger(tmp_path)
    ledger.append(row(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(RunFolderError) as caught:
            ledger.append(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{ledger.path}: cannot be written: File too large. Free space, then run the "
        "same command again: earlier rows are kept."
    )
    assert is_free(tmp_path, APPEND)
    assert ledger.append(row(2))
    assert steps(ledger.rows()) == [1, 2]
    ledger.close()


def test_a_claimed_key_is_locked_until_it_is_released(tmp_path: Path) -> None:
    """Its byte is a frozen function of the key: processes of different versions share it."""
    ledger = Ledger(tmp_path)
    assert ledger.claim(KEY) is True
    assert not is_free(tmp_path, BYTE_OF_KEY)
    assert is_free(tmp_path, BYTE_OF_KEY + 1)
    ledger.release(KEY)
    assert is_free(tmp_path, BYTE_OF_KEY)
    with locked_elsewhere(tmp_path, BYTE_OF_KEY):
        assert ledger.claim(KEY) is False
        assert ledger.claim(KEY._replace(step=20)) is True
    ledger.close()


def test_one_process_sends_at_a_time(tmp_path: Path) -> None:
    """The sender's lock is a byte of its own, freed when the ledger is closed."""
    ledger = Ledger(tmp_path)
    with locked_elsewhere(tmp_path, SENDER):
        assert ledger.acquire_sender_lock() is False
    assert ledger.acquire_sender_lock() is True
    assert not is_free(tmp_path, SENDER)
    assert is_free(tmp_path, APPEND)
    ledger.close()
    assert is_free(tmp_path, SENDER)


def test_rows_marked_as_sent_are_not_sent_again(tmp_path: Path) -> None:
    """Marks add up in a file beside the ledger. A damaged file means that nothing was sent."""
    write(tmp_path, *map(line_of, (row(30), row(10), row(20))))
    ledger, marks = Ledger(tmp_path), tmp_path / ".evaluations.sent"
    ledger.mark_sent([KEY])
    assert steps(ledger.unsent()) == [30, 20]
    ledger.mark_sent([Key(30, "ema", "p")])
    assert [json.loads(line)["step"] for line in marks.read_text().splitlines()] == [10, 30]
    assert ledger.sent() == [KEY, Key(30, "ema", "p")]
    assert steps(ledger.unsent()) == [20]
    marks.write_text("10 em")
    assert steps(ledger.unsent()) == [30, 10, 20]
    ledger.close()


@pytest.mark.parametrize(
    "harm",
    [
        (b'"eval/fid": 1.0', b'"eval/fid": 7.0'),
        (b'"headline"', b'"heedline"'),
        (b'"step": 10', b'"step": 12'),
        (b'"step": 10', b'"step": "10"'),
        (b"}", b""),
    ],
)
def test_a_changed_row_is_neither_believed_nor_lost(
    harm: tuple[bytes, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left out with a message; the next append moves it to a file beside the ledger."""
    ledger = Ledger(tmp_path)
    for step in (10, 20):
        ledger.append(row(step))
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    write(tmp_path, lines[0].replace(*harm), lines[1])
    assert steps(read_rows(tmp_path)) == [20]
    assert kept_steps(tmp_path, {10: {""}, 20: {""}}) == {10, 20}
    assert f"{ledger.path}, line 1: " in capsys.readouterr().err
    assert ledger.append(row(10))
    assert steps(read_rows(tmp_path)) == [20, 10]
    aside = tmp_path / "evaluations.jsonl.damaged"
    assert aside.read_bytes() == lines[0].replace(*harm)
    assert "moved to evaluations.jsonl.damaged" in capsys.readouterr().err
    ledger.close()


ODD_SCORES = [*({"eval/fid": odd} for odd in ("1", True, [1], float("nan"), float("inf"))), []]


@pytest.mark.parametrize("scores", ODD_SCORES)
def test_a_score_that_is_no_number_is_a_damaged_row(scores: object, tmp_path: Path) -> None:
    """Also of a row of an early version, which has no check."""
    write(tmp_path, json.dumps(row(1) | {"scores": scores}).encode() + b"\n", line_of(row(2)))
    assert steps(read_rows(tmp_path)) == [2]


def test_a_ledger_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    """A folder in its place, or a FIFO, which nobody writes to."""
    os.mkfifo(tmp_path / "evaluations.jsonl")
    with pytest.raises(RunFolderError, match=r"evaluations\.jsonl: is no regular file"):
        read_rows(tmp_path)
