"""Log the scores of a run to W&B: to a run of the evaluation's own, and to that of the training.

``<id>-eval`` gets scores, grids and settings as they are computed. The training's own run gets the
scores once the training has ended, in its history over ``train/step`` and in its summary. Before,
both would write one W&B run and overwrite each other's rows. W&B's shared mode is not used: it
loses rows if the training was not started in it, and ``wandb sync`` refuses its offline folders.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.evaluation.protocol import Protocol
from pipeline.runs import checkpoint, identity
from pipeline.runs.alarms import FINISHED
from pipeline.runs.results import TRAINING, Key, Ledger, Row, best, key_of
from pipeline.runs.wandb_log import STEP_KEY, Picture, WandbLog, wandb_mode
from pipeline.runs.wandb_names import SCORES
from pipeline.runtime.console import say
from pipeline.runtime.documents import DamagedFile, parse_rows, read_bytes
from pipeline.runtime.locks import FileLock


def grid_path(run_dir: Path, step: int) -> Path:
    """Return the path of the grid of samples of a step."""
    return run_dir / "evaluations" / f"step_{step:08d}.png"


def nearest_path(run_dir: Path, step: int) -> Path:
    """Return the path of the picture of a step by ``memorization.picture``."""
    return run_dir / "evaluations" / f"step_{step:08d}_nearest.png"


class WandbScores:
    """The rows of a ledger in W&B; rank 0 only.

    Args:
        config: of the evaluation.
        run_dir: folder of the run.
        ledger: of the run.
        protocols: whose rows get W&B runs of the evaluation's own.
    """

    def __init__(
        self, config: Config, run_dir: Path, ledger: Ledger, protocols: list[Protocol]
    ) -> None:
        self._config, self._run_dir, self._ledger = config, run_dir, ledger
        self._protocols = protocols
        self._log: WandbLog | None = None
        self._logged: list[Key] = []

    def log(self) -> None:
        """Log the rows of the protocols that W&B lacks, also those of other evaluations.

        Only one process logs at a time, because W&B allows one writer per run. Rows count as sent
        once W&B was closed without an error. After a crash they are logged again, with the same
        values at the same ``train/step``.
        """
        if wandb_mode(self._config) == "disabled":
            return
        if self._log is None and not self._ledger.acquire_sender_lock():
            return
        for protocol in self._protocols:
            unsent = [row for row in self._ledger.unsent() if row["protocol"] == protocol.id]
            for row in [row for row in unsent if key_of(row) not in self._logged]:
                if self._log is None:
                    self._log = self._open(protocol)
                self._log.log(self._values(row) | self._pictures(row["step"]))
                self._logged.append(key_of(row))
            if len(self._protocols) > 1:  # each protocol has a W&B run of its own, one at a time
                self._close_log()

    def close(self) -> None:
        """Log the remaining rows, also to the training's run if it has ended, and close W&B."""
        self.log()
        self._close_log()
        self._log_to_training()

    def _log_to_training(self) -> None:
        """Add all scores that the training's own W&B run lacks to it, unless it may go on.

        That run has a folder in the run folder. W&B keeps the last value of each score in the
        summary: that of the last step. The last row of the training is sent again, because ``wandb
        sync`` puts nothing into the summary that is not in the folder that it uploads last.
        """
        ended = (self._run_dir / FINISHED).is_file()
        if not ended or wandb_mode(self._config) == "disabled":
            return
        rows = sorted(self._ledger.unsent(TRAINING), key=lambda row: int(row["step"]))
        if not rows or not any(self._run_dir.glob(f"wandb/*run-*-{self._run_id()}")):
            return
        if not self._ledger.acquire_sender_lock() or not self._training_let_go():
            return
        log = WandbLog(self._config, self._run_id(), SCORES)
        for row in rows:
            log.log(self._values(row))
        if last := self._last_metrics():
            log.log(last)
        log.close()
        with suppress(OSError):  # the rows are then logged again, with the same values
            self._ledger.mark_sent([key_of(row) for row in rows], TRAINING)

    def _last_metrics(self) -> dict[str, Any]:
        """Return the last row that the training logged; {} if it cannot be read."""
        path = self._run_dir / "metrics.jsonl"
        with suppress(OSError, DamagedFile):
            found = (row for _, _, row in parse_rows(read_bytes(path), {"step": int}, path))
            for row in reversed([row for row in found if not isinstance(row, DamagedFile)]):
                values = {k: v for k, v in row.items() if "/" in k and v is not None}
                return {STEP_KEY: row["step"], **values}
        return {}

    def _training_let_go(self) -> bool:
        """Wait until the training has ended, which then still sends its last rows; False if not."""
        path, deadline = self._run_dir / ".lock", time.monotonic() + self._config.tracking.timeout
        # OSError: the lock is somebody else's file, or cannot be used; FINISHED must do.
        with suppress(OSError), closing(FileLock(path)) as lock:
            while not lock.acquire(shared=True, wait=False):
                if time.monotonic() > deadline:
                    say("W&B: the training still runs; its own run gets the scores next time")
                    return False
                time.sleep(0.5)
        return True

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            with suppress(OSError):  # the rows are then logged again, with the same values
                self._ledger.mark_sent(self._logged)
            self._log, self._logged = None, []

    def _open(self, protocol: Protocol) -> WandbLog:
        # The first protocol has the W&B run <id>-eval; every other one has a W&B run of its own.
        first = next((key.protocol for key in self._ledger.sent()), protocol.id)
        job = "eval" if first == protocol.id else f"eval-{protocol.id}"
        extra = {"protocol": protocol.id, "settings": dataclasses.asdict(protocol)}
        return WandbLog(self._config, self._run_id(), job, extra)

    def _run_id(self) -> str:
        return identity.settle(self._run_dir, checkpoint.newest_state(self._run_dir)).id

    def _values(self, row: Row) -> dict[str, Any]:
        """Return what is logged for a row: its scores and the best ones so far."""
        values: dict[str, Any] = {STEP_KEY: row["step"], **row["scores"]}
        if (best_row := best(self._ledger.rows(row["protocol"]))) is not None:
            headline = row["headline"]
            values[f"{headline}_best"] = best_row["scores"][headline]
            values[f"{headline}_best_step"] = best_row["step"]
        return values

    def _pictures(self, step: int) -> dict[str, Picture]:
        """Return the grid, and the picture of the nearest training images if there is one."""
        found = {
            "samples/grid": grid_path(self._run_dir, step),
            "samples/nearest": nearest_path(self._run_dir, step),
        }
        caption = f"step {step}"
        return {key: Picture(path, caption) for key, path in found.items() if path.is_file()}
