"""The ledger of a run's scores: evaluations.jsonl, one row per step, weights, protocol, generator.

    {"step": 300, "weights": "ema", "protocol": "5f0c…", "generator": "9a41…",
     "scores": {"eval/fid": 31.2, …}, …}

A score belongs to the weights that ``generator`` identifies. If a step is trained anew with other
weights, its newer row counts; rows of steps that a resume goes back before are marked superseded.

A row is appended under a lock and synced before it is sent to W&B. So a killed evaluation loses
only the score that it was computing, and a repeated one adds no row. The locks are bytes of one
file: they end with their process and hold over NFS. Training reads the ledger to keep the best
checkpoint, so this module imports nothing of evaluation/.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.runtime.console import say
from pipeline.runtime.documents import (
    DamagedFile,
    append_rows,
    parse_rows,
    read_bytes,
    row_line,
    set_lines_aside,
)
from pipeline.runtime.errors import RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.host import remedy_of_file
from pipeline.runtime.locks import FileLock
from pipeline.runtime.log_file import open_to_append

LEDGER_NAME = "evaluations.jsonl"
SENT_NAME = ".evaluations.sent"
OWN, TRAINING = "eval", "train"
"""W&B runs that rows are sent to: the evaluation's own one, and that of the training."""
APPEND, SENDER, FIRST_KEY = 0, 1, 2  # offsets of bytes in the lock file
KEY_FIELDS: dict[str, type] = {"step": int, "weights": str, "protocol": str}
FIELDS = KEY_FIELDS | {"scores": dict, "headline": str}
"""What a row must have, besides more for readers."""


class Key(NamedTuple):
    """Primary key of a ledger row; ``generator`` is "" in rows of an early version."""

    step: int
    weights: str
    protocol: str
    generator: str = ""


Row = dict[str, Any]


def read_rows(run_dir: Path) -> list[Row]:
    """Return the rows of a run's ledger that count, oldest first; [] without a ledger.

    Damaged lines are left out, with a message; ``Ledger.append`` sets them aside.

    Raises:
        RunFolderError: the ledger cannot be read.
    """
    good, damaged = _read(run_dir / LEDGER_NAME)
    for error in damaged.values():  # also of a row that is being appended, which is seldom met
        _say_once(f"{error}; left out")
    counting: dict[tuple[int, str, str], Row] = {}
    for row in good:
        if not row.get("superseded"):
            slot = (row["step"], row["weights"], row["protocol"])
            if slot not in counting or key_of(counting[slot]) != key_of(row):
                counting.pop(slot, None)  # the weights of an earlier training
                counting[slot] = row
    return list(counting.values())


def supersede_after(run_dir: Path, step: int) -> None:
    """Mark the rows of later steps superseded: a training goes on from ``step``.

    Such a row counts again once its step has the same weights again (``Ledger.revive``).

    Raises:
        RunFolderError: the ledger cannot be read or written.
    """
    path = run_dir / LEDGER_NAME
    if not any(row["step"] > step for row in read_rows(run_dir)):
        return
    with closing(Ledger(run_dir)) as ledger, ledger.appending():
        lines, count = [], 0
        for _, line, row in parse_rows(read_bytes(path), FIELDS, path):
            if isinstance(row, DamagedFile) or row["step"] <= step or row.get("superseded"):
                lines.append(line)
            else:
                lines.append(row_line(row | {"superseded": True}))
                count += 1
        write_atomic(path, b"".join(lines))
    say(
        f"{path}: {count} scores of steps after {step} no longer count: training goes on from there"
    )


def _read(path: Path, required: Mapping[str, type] = FIELDS) -> tuple[list[Row], dict[bytes, str]]:
    """Return the rows of a JSONL file, and the message of each damaged line by its bytes."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return [], {}
    except (OSError, DamagedFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunFolderError(f"{path}: cannot be read: {reason}. Mend it or move it.") from None
    rows: list[Row] = []
    damaged: dict[bytes, str] = {}
    for number, line, found in parse_rows(content, required, path):
        if isinstance(found, DamagedFile):
            damaged[line] = str(found)
        elif odd := [v for v in found.get("scores", {}).values() if not _is_score(v)]:
            damaged[line] = f"{path}, line {number}: a score is {odd[0]!r}"
        else:
            rows.append(found)
    return rows, damaged


def _is_score(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return math.isfinite(value)


@functools.cache
def _say_once(text: str) -> None:
    say(text)


def key_of(row: Row) -> Key:
    """Return the primary key of a row."""
    return Key(row["step"], row["weights"], row["protocol"], str(row.get("generator", "")))


def best(rows: Collection[Row]) -> Row | None:
    """Return the row with the best headline score, of equal ones the earliest; None without any.

    Lower is better (FID, or KID without FID) unless the row sets ``higher_is_better``.

    Args:
        rows: rows of one protocol.
    """
    scored = [row for row in rows if row["scores"].get(row["headline"]) is not None]
    return min(scored, key=_sort_key, default=None)


def _sort_key(row: Row) -> tuple[float, int]:
    """Return a key that sorts rows from best to worst, then by step."""
    score = float(row["scores"][row["headline"]])
    return (-score if row.get("higher_is_better") else score), int(row["step"])


def kept_steps(run_dir: Path, generators: Mapping[int, Collection[str]]) -> set[int]:
    """Return the steps that ``eval.keep_best`` keeps: not yet evaluated, or best by a protocol.

    Args:
        run_dir: the run's folder.
        generators: by step, the ids of the generators in its checkpoint. Scores of others, whose
            checkpoint was removed or replaced, do not count.
    """
    rows = [
        row
        for row in read_rows(run_dir)
        if str(row.get("generator", "")) in generators.get(row["step"], ())
    ]
    kept = set(generators) - {int(row["step"]) for row in rows}
    for protocol in {row["protocol"] for row in rows}:
        if (row := best([row for row in rows if row["protocol"] == protocol])) is not None:
            kept.add(int(row["step"]))
    return kept


class Ledger:
    """The ledger of one run, open for appending; at most one object per process and run.

    Raises:
        RunFolderError: the run folder cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / LEDGER_NAME
        lock = run_dir / ".evaluations.lock"
        try:
            self._lock = FileLock(lock)
        except OSError as error:
            raise RunFolderError(
                f"{run_dir}: evaluations cannot be recorded there ({lock.name}: {error.strerror}). "
                f"{remedy_of_file(error)}; or evaluate a copy of the run."
            ) from None

    def rows(self, protocol: str | None = None) -> list[Row]:
        """Return all rows, or those of one protocol, sorted by step."""
        rows = read_rows(self.run_dir)
        selected = [row for row in rows if protocol in (None, row["protocol"])]
        return sorted(selected, key=lambda row: int(row["step"]))

    def has(self, key: Key) -> bool:
        """Return whether the ledger has a row with this key."""
        return any(key_of(row) == key for row in read_rows(self.run_dir))

    def append(self, row: Row) -> bool:
        """Append and sync a row unless its key exists. Returns whether it was appended.

        Raises:
            RunFolderError: the disk is full or the folder read-only.
        """
        with self.appending():
            if self.has(key_of(row)):
                return False
            self._set_damaged_lines_aside()
            with open_to_append(self.path) as file:
                append_rows(file, [row])
                os.fsync(file.fileno())
        return True

    def revive(self, key: Key) -> bool:
        """Append a row that no longer counted again, if its weights are back; return whether."""
        rows, _ = _read(self.path)
        for row in rows:
            if key.generator and key_of(row) == key:
                return self.append({k: v for k, v in row.items() if k != "superseded"})
        return False

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Hold the lock for changes of the ledger.

        Raises:
            RunFolderError: the disk is full or the folder read-only.
        """
        self._lock.acquire(APPEND)
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot be written: {error.strerror}. Free space, then run the "
                "same command again: earlier rows are kept."
            ) from None
        finally:
            self._lock.release(APPEND)

    def _set_damaged_lines_aside(self) -> None:
        """Move damaged lines, also the incomplete one of a crash, to a file beside the ledger."""
        _, damaged = _read(self.path)
        if damaged:
            aside = set_lines_aside(self.path, damaged)
            for error in damaged.values():
                say(f"{error}; moved to {aside.name}")
            lines = self.path.read_bytes().splitlines(keepends=True)
            write_atomic(self.path, b"".join(line for line in lines if line not in damaged))

    def claim(self, key: Key) -> bool:
        """Try to lock a key until ``release``. Returns False if another process evaluates it."""
        return self._lock.acquire(_byte_of(key), wait=False)

    def release(self, key: Key) -> None:
        """Unlock a key."""
        self._lock.release(_byte_of(key))

    def acquire_sender_lock(self) -> bool:
        """Try to acquire the W&B sender lock. Returns False if another process holds it."""
        return self._lock.acquire(SENDER, wait=False)

    def unsent(self, run: str = OWN) -> list[Row]:
        """Return the rows not yet marked as sent to a W&B run, oldest first."""
        sent = set(self.sent(run))
        return [row for row in read_rows(self.run_dir) if key_of(row) not in sent]

    def sent(self, run: str = OWN) -> list[Key]:
        """Return the keys of the rows marked as sent to a W&B run, in order.

        A row whose mark is damaged is sent again, with the same values.
        """
        rows, damaged = _read(self.run_dir / SENT_NAME, KEY_FIELDS)
        for error in damaged.values():
            _say_once(f"{error}; the row is sent to W&B again")
        return [key_of(row) for row in rows if row.get("run", OWN) == run]

    def mark_sent(self, keys: Collection[Key], run: str = OWN) -> None:
        """Mark rows as sent to a W&B run, in a file of its own beside the ledger."""
        where = {} if run == OWN else {"run": run}
        with open_to_append(self.run_dir / SENT_NAME) as file:
            append_rows(file, [key._asdict() | where for key in keys])

    def close(self) -> None:
        """Release all locks."""
        self._lock.close()


def _byte_of(key: Key) -> int:
    """Return the offset of the byte that locks a key: a hash of 40 bits."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return FIRST_KEY + int.from_bytes(digest[:5], "big")
