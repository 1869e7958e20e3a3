"""evaluations.jsonl: one row per (step, weights, protocol), and who is computing which.

    {"step": 300, "weights": "ema", "protocol": "5f0c…", "scores": {"eval/fid": 31.2, …}, …}

A row is appended under a lock and synced before anyone hears of it, so a killed evaluation loses
nothing but its own work and a repeated one adds nothing. Locks are bytes of one file: they end with
their process, hold over NFS, and leave no litter. Training reads the ledger to keep the best
checkpoint; this module imports nothing of the evaluation.
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
APPEND, DASHBOARD, FIRST_KEY = 0, 1, 2  # bytes of the lock file


class Key(NamedTuple):
    """What a row is the only one of."""

    step: int
    weights: str
    protocol: str


Row = dict[str, Any]


def read_rows(run_dir: Path) -> list[Row]:
    """The rows of a run's ledger, oldest first; [] without a ledger.

    A line cut short by a full disk or a power cut is no row: its evaluation is repeated.
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
    """The key of a row."""
    return Key(int(row["step"]), str(row["weights"]), str(row["protocol"]))


def best(rows: Collection[Row]) -> Row | None:
    """The row of the best headline score; the earliest of equals.

    Lower is better (FID, or KID where there is no FID) unless the row says otherwise.

    Args:
        rows: of one protocol.
    """
    scored = [row for row in rows if row["scores"].get(row["headline"]) is not None]
    return min(scored, key=_rank, default=None)


def _rank(row: Row) -> tuple[float, int]:
    score = float(row["scores"][row["headline"]])
    return (-score if row.get("higher_is_better") else score), int(row["step"])


def kept_steps(run_dir: Path, steps: Collection[int]) -> set[int]:
    """What ``eval.keep_best`` keeps: steps not yet evaluated and the best by each protocol."""
    rows = read_rows(run_dir)
    kept = set(steps) - {int(row["step"]) for row in rows}
    for protocol in {row["protocol"] for row in rows}:
        # The best among those that still exist: a better one may have been removed long ago.
        there = [r for r in rows if r["protocol"] == protocol and r["step"] in steps]
        if (found := best(there)) is not None:
            kept.add(int(found["step"]))
    return kept


class Ledger:
    """The ledger of one run, open for evaluations; one object per process and run.

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
        """All rows, or those of one protocol, by step."""
        rows = read_rows(self.run_dir)
        chosen = [row for row in rows if protocol in (None, row["protocol"])]
        return sorted(chosen, key=lambda row: int(row["step"]))

    def has(self, key: Key) -> bool:
        """Whether the row of a key is there."""
        return any(key_of(row) == key for row in read_rows(self.run_dir))

    def append(self, row: Row) -> bool:
        """Add a row durably, unless its key is there already; returns whether it was added.

        Raises:
            RunFolderError: the disk is full or the folder read-only.
        """
        self._lock.acquire(APPEND)
        try:
            if self.has(key_of(row)):
                return False
            try:
                whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
                line = b"" if whole else b"\n"  # the torn line of a crash stays alone
                line += json.dumps(row).encode() + b"\n"
                with self.path.open("ab", buffering=0) as file:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
            except OSError as error:
                raise RunFolderError(
                    f"{self.path}: cannot be written: {error.strerror}. Free space, then run the "
                    "same command again: what was evaluated before is kept."
                ) from None
            return True
        finally:
            self._lock.release(APPEND)

    def claim(self, key: Key) -> bool:
        """Reserve a key for this process until ``release`` or its end; False if another has it."""
        return self._lock.acquire(_byte_of(key), wait=False)

    def release(self, key: Key) -> None:
        """Give up a claim."""
        self._lock.release(_byte_of(key))

    def claim_dashboard(self) -> bool:
        """Become the only process that sends rows to W&B; False if another is."""
        return self._lock.acquire(DASHBOARD, wait=False)

    # Sent marks are a file of their own: the ledger holds nothing but evaluations.

    def unsent(self) -> list[Row]:
        """Rows that no process has marked as sent to W&B, in the order they were added."""
        sent = set(self.sent())
        return [row for row in read_rows(self.run_dir) if key_of(row) not in sent]

    def sent(self) -> list[Key]:
        """Keys marked as sent, in order."""
        try:
            lines = (self.run_dir / ".evaluations.sent").read_text().splitlines()
            return [Key(int(s), w, p) for s, w, p in (line.split() for line in lines)]
        except (FileNotFoundError, ValueError):
            return []

    def mark_sent(self, keys: Collection[Key]) -> None:
        """Remember that W&B has these rows."""
        with (self.run_dir / ".evaluations.sent").open("a") as file:
            file.writelines(f"{step} {weights} {protocol}\n" for step, weights, protocol in keys)

    def close(self) -> None:
        """Drop all locks."""
        self._lock.close()


def _byte_of(key: Key) -> int:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return FIRST_KEY + int.from_bytes(digest[:5], "big")
