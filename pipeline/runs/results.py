"""The ledger of a run's scores: evaluations.jsonl, one row per (step, weights, protocol).

    {"step": 300, "weights": "ema", "protocol": "5f0c…", "scores": {"eval/fid": 31.2, …}, …}

A row is appended under a lock and synced before it is sent to W&B. So a killed evaluation loses
only the score that it was computing, and a repeated one adds no row. The locks are bytes of one
file: they end with their process and hold over NFS. Training reads the ledger to keep the best
checkpoint, so this module imports nothing of evaluation/.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.runtime.errors import RunFolderError
from pipeline.runtime.locks import FileLock

LEDGER_NAME = "evaluations.jsonl"
APPEND, SENDER, FIRST_KEY = 0, 1, 2  # offsets of bytes in the lock file


class Key(NamedTuple):
    """Primary key of a ledger row."""

    step: int
    weights: str
    protocol: str


Row = dict[str, Any]


def read_rows(run_dir: Path) -> list[Row]:
    """Return the rows of a run's ledger, oldest first; [] without a ledger.

    A line that a full disk or a power cut left incomplete is skipped: its evaluation is repeated.
    """
    try:
        lines = (run_dir / LEDGER_NAME).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    seen: set[Key] = set()
    for line in lines:
        try:
            row = json.loads(line)
            key = key_of(row)
        except (ValueError, KeyError, TypeError):
            continue
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return rows


def key_of(row: Row) -> Key:
    """Return the primary key of a row."""
    return Key(int(row["step"]), str(row["weights"]), str(row["protocol"]))


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


def kept_steps(run_dir: Path, steps: Collection[int]) -> set[int]:
    """Return the steps that ``eval.keep_best`` keeps: not yet evaluated, or best by a protocol."""
    rows = read_rows(run_dir)
    kept = set(steps) - {int(row["step"]) for row in rows}
    for protocol in {row["protocol"] for row in rows}:
        # Only steps that still exist: a better checkpoint may have been removed before.
        existing = [r for r in rows if r["protocol"] == protocol and r["step"] in steps]
        if (row := best(existing)) is not None:
            kept.add(int(row["step"]))
    return kept


class Ledger:
    """The ledger of one run, open for appending; at most one object per process and run.

    Raises:
        RunFolderError: the run folder cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / LEDGER_NAME
        try:
            self._lock = FileLock(run_dir / ".evaluations.lock")
        except OSError as error:
            raise RunFolderError(
                f"{run_dir}: evaluations cannot be recorded there ({error.strerror}); give write "
                "permission, or evaluate a copy of the run."
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
        self._lock.acquire(APPEND)
        try:
            if self.has(key_of(row)):
                return False
            try:
                complete = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
                line = b"" if complete else b"\n"  # end the incomplete line of a crash
                line += json.dumps(row).encode() + b"\n"
                with self.path.open("ab", buffering=0) as file:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
            except OSError as error:
                raise RunFolderError(
                    f"{self.path}: cannot be written: {error.strerror}. Free space, then run the "
                    "same command again: earlier rows are kept."
                ) from None
            return True
        finally:
            self._lock.release(APPEND)

    def claim(self, key: Key) -> bool:
        """Try to lock a key until ``release``. Returns False if another process evaluates it."""
        return self._lock.acquire(_byte_of(key), wait=False)

    def release(self, key: Key) -> None:
        """Unlock a key."""
        self._lock.release(_byte_of(key))

    def acquire_sender_lock(self) -> bool:
        """Try to acquire the W&B sender lock. Returns False if another process holds it."""
        return self._lock.acquire(SENDER, wait=False)

    def unsent(self) -> list[Row]:
        """Return the rows not yet marked as sent to W&B, oldest first."""
        sent = set(self.sent())
        return [row for row in read_rows(self.run_dir) if key_of(row) not in sent]

    def sent(self) -> list[Key]:
        """Return the keys of the rows marked as sent to W&B, in order."""
        try:
            lines = (self.run_dir / ".evaluations.sent").read_text().splitlines()
            return [Key(int(s), w, p) for s, w, p in (line.split() for line in lines)]
        except (FileNotFoundError, ValueError):
            return []

    def mark_sent(self, keys: Collection[Key]) -> None:
        """Mark rows as sent to W&B, in a file of its own beside the ledger."""
        with (self.run_dir / ".evaluations.sent").open("a") as file:
            file.writelines(f"{step} {weights} {protocol}\n" for step, weights, protocol in keys)

    def close(self) -> None:
        """Release all locks."""
        self._lock.close()


def _byte_of(key: Key) -> int:
    """Return the offset of the byte that locks a key: a hash of 40 bits."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return FIRST_KEY + int.from_bytes(digest[:5], "big")
