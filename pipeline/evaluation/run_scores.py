"""Score the checkpoints of one run, and record the scores in its ledger and in W&B.

A row is written to the ledger first and logged to W&B later. The ledger is complete without W&B.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.data.codecs import encode
from pipeline.evaluation import candidates
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.scorer import Scorer
from pipeline.models.sampling import generator_id, sample_grid
from pipeline.runs import checkpoint, identity
from pipeline.runs.results import Key, Ledger, Row, best, key_of
from pipeline.runs.step_folders import SNAPSHOTS, committed, step_of
from pipeline.runs.wandb_log import STEP_KEY, Picture, WandbLog, wandb_mode
from pipeline.runtime.console import say
from pipeline.runtime.documents import set_file_aside
from pipeline.runtime.errors import CheckpointError, DamagedSnapshot, RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.ranks import VISIBLE_SECONDS, on_every_rank, on_rank_zero


class RunScores:
    """Scores of the checkpoints of one run, as rows of its ledger.

    ``ledger`` is open on rank 0 and None on other ranks. All methods but ``rows`` are called on all
    ranks.

    Args:
        scorer: computes the scores of one checkpoint.
        run_dir: folder of the run.

    Raises:
        RunFolderError: the run folder cannot be written.
    """

    def __init__(self, scorer: Scorer, run_dir: Path) -> None:
        self.scorer, self.run_dir = scorer, run_dir
        self.config, self.scorers = scorer.config, [scorer, *scorer.others]
        self._errors: dict[int, str] = {}  # by step; on rank 0, as is _gone
        self._gone: set[Path] = set()  # candidates that were removed before they were scored
        self.ledger: Ledger | None = None
        self._wandb: WandbLog | None = None
        self._logged: list[Key] = []
        on_rank_zero(scorer.accelerator, self._open_ledger)

    def _open_ledger(self) -> None:
        self.ledger = Ledger(self.run_dir)

    def score_all(self, find: Callable[[], list[Candidate]]) -> None:
        """Score each candidate that has no row in the ledger yet.

        Candidates that another process is scoring are left to it, and this waits until they are
        done. Damaged candidates are skipped; ``raise_if_any_failed`` reports them.

        Args:
            find: returns the candidates; called on rank 0, again after each one is scored.

        Raises:
            Stopped: a stop signal came.
        """
        while True:
            candidate, which, busy = on_rank_zero(
                self.scorer.accelerator, lambda: self._claim_one(find())
            )
            if candidate is not None:
                self._score_one(candidate, [self.scorers[k] for k in which])
            elif busy:
                reason = f"step {busy} is being scored by another process; waiting for it"
                self.scorer.wait_for_other_process(reason)
            else:
                break

    def raise_if_any_failed(self) -> None:
        """Report the candidates that could not be scored, after all others are.

        Raises:
            CheckpointError: there are some; the message has a line for each.
        """
        errors = on_rank_zero(self.scorer.accelerator, lambda: list(self._errors.values()))
        if errors:
            raise CheckpointError("\n".join(errors))

    def training_has_ended(self) -> bool:
        """Return whether the training reached its last step, so that no checkpoint will follow."""
        marker = self.run_dir / "FINISHED"
        return on_rank_zero(self.scorer.accelerator, marker.is_file)

    def rows(self, protocol: str) -> list[Row]:
        """Return the rows of a protocol, by step. Rank 0 only."""
        assert self.ledger is not None
        return self.ledger.rows(protocol)

    def key(self, candidate: Candidate, protocol: Protocol) -> Key:
        """Return the ledger key of a candidate under a protocol."""
        return Key(candidate.step, protocol.weights, protocol.id, candidate.generator)

    def _claim_one(self, found: list[Candidate]) -> tuple[Candidate | None, list[int], int]:
        """Claim the first candidate that is neither scored nor claimed by another process.

        Returns:
            the claimed candidate or None, the numbers of the scorers whose scores it lacks, and a
            step that another process is scoring or 0.
        """
        assert self.ledger is not None
        done = {key_of(row) for row in self.ledger.rows()}
        busy = 0
        for listed in found:
            candidate = candidates.with_generator(listed, self.run_dir, self.config.eval.weights)
            claimed = []
            for k, scorer in enumerate(self.scorers):
                key = self.key(candidate, scorer.protocol)
                if key in done or candidate.step in self._errors or self.ledger.revive(key):
                    continue
                if not self.ledger.claim(key):
                    busy = candidate.step
                elif self.ledger.has(key):  # another process finished it after ``done`` was read
                    self.ledger.release(key)
                else:
                    claimed.append(k)
            if claimed:
                return candidate, claimed, 0
        return None, [], busy

    def _score_one(self, candidate: Candidate, which: list[Scorer]) -> None:
        scorer, config, start = self.scorer, self.config, time.monotonic()
        try:
            G, model = on_every_rank(scorer.accelerator, lambda: self._open_generator(candidate))
            scores = scorer.score_generator(G, model, f"step {candidate.step}", which)

            def record() -> None:
                generator = generator_id(model, G.state_dict())
                grid = sample_grid(G, model, config.run.seed)
                seconds = time.monotonic() - start
                for one, values in zip(which, scores, strict=True):
                    self._record(one, candidate, values, generator, grid, seconds)
                self.log_to_wandb()

            on_rank_zero(scorer.accelerator, record)
        except CheckpointError as error:  # of ``_open_generator``, hence on all ranks
            on_rank_zero(scorer.accelerator, partial(self._pass_over, candidate, error))
        finally:
            if self.ledger is not None:
                for one in which:
                    self.ledger.release(self.key(candidate, one.protocol))

    def _pass_over(self, candidate: Candidate, error: CheckpointError) -> None:
        """Say why a candidate is not scored; set a damaged snapshot aside. Rank 0 only.

        A checkpoint of the step, if there is one, is then found in its place.
        """
        path, reason = candidate.path, str(error)
        if not path.is_dir() and path not in self._gone:
            # By the training, which keeps the newest train.keep checkpoints. Seen twice, it is odd.
            self._gone.add(path)
            reason = "removed meanwhile"
        elif isinstance(error, DamagedSnapshot) and path.parent == self.run_dir / SNAPSHOTS:
            with suppress(OSError):
                reason += f" Set aside as {set_file_aside(path).name}."
            if path.is_dir() or candidate.step not in map(step_of, committed(self.run_dir)):
                self._errors[candidate.step] = reason
        else:
            self._errors[candidate.step] = reason
        say(f"step {candidate.step} passed over: {reason}")

    def _open_generator(self, candidate: Candidate) -> tuple[nn.Module, ModelConfig]:
        if not self.scorer.is_main:  # rank 0 has found the folder; another node may see it later
            deadline = time.monotonic() + VISIBLE_SECONDS
            while not candidate.path.is_dir():
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{candidate.path}: not seen here within {VISIBLE_SECONDS:g} s. All nodes "
                        "must share the run folder."
                    )
                time.sleep(0.5)
        weights, device = self.config.eval.weights, self.scorer.accelerator.device
        return candidates.open_generator(candidate, self.run_dir, weights, device)

    def _record(
        self,
        scorer: Scorer,
        candidate: Candidate,
        scores: dict[str, float],
        generator: str,
        grid: NDArray[np.uint8],
        seconds: float,
    ) -> None:
        """Write the grid of samples and the ledger row; on rank 0."""
        assert self.ledger is not None
        path, nearest = self.grid_path(candidate.step), self.scorer.picture
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, encode(grid, "png"))
            if nearest is not None:
                write_atomic(self.nearest_path(candidate.step), encode(nearest, "png"))
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written: {error.strerror or error}. Free space or give write "
                "permission, then run the same command again. Earlier scores are kept."
            ) from None
        step = candidate.step
        protocol = scorer.protocol
        row = self.key(replace(candidate, generator=generator), protocol)._asdict() | {
            "scores": scores,
            "headline": protocol.headline,
            "higher_is_better": protocol.higher_is_better,
            "source": f"{candidate.path.parent.name}/{candidate.path.name}",
            "settings": dataclasses.asdict(protocol),
            "processes": self.scorer.accelerator.num_processes,
            "seconds": round(seconds, 3),
            "time": round(time.time(), 3),
        }
        self.ledger.append(row)
        headline = protocol.headline
        say(f"step {step}: {headline} {scores[headline]:.5g}  ({seconds:.1f} s)")

    def grid_path(self, step: int) -> Path:
        """Return the path of the grid of samples of a step."""
        return self.run_dir / "evaluations" / f"step_{step:08d}.png"

    def nearest_path(self, step: int) -> Path:
        """Return the path of the picture of a step by ``memorization.picture``."""
        return self.run_dir / "evaluations" / f"step_{step:08d}_nearest.png"

    # -- W&B --------------------------------------------------------------------------------

    def log_to_wandb(self) -> None:
        """Log the rows of this protocol that W&B lacks, also those of other evaluations.

        Only one process logs at a time, because W&B allows one writer per run. Rows count as sent
        once W&B was closed without an error. After a crash they are logged again, with the same
        values at the same ``train/step``.
        """
        if self.ledger is None or wandb_mode(self.config) == "disabled":
            return
        if self._wandb is None and not self.ledger.acquire_sender_lock():
            return
        for scorer in self.scorers:
            unsent = [row for row in self.ledger.unsent() if row["protocol"] == scorer.protocol.id]
            for row in [row for row in unsent if key_of(row) not in self._logged]:
                if self._wandb is None:
                    self._wandb = self._open_wandb(scorer.protocol)
                self._wandb.log(self._wandb_values(row))
                self._logged.append(key_of(row))
            if len(self.scorers) > 1:  # each protocol has a W&B run of its own, one at a time
                self._close_wandb()

    def close(self) -> None:
        """Log the remaining rows, close W&B and release all locks."""
        if self.ledger is not None:
            self.log_to_wandb()
            self._close_wandb()
            self.ledger.close()
        self.scorer.close()

    def _close_wandb(self) -> None:
        if self._wandb is not None and self.ledger is not None:
            self._wandb.close()
            with suppress(OSError):  # the rows are then logged again, with the same values
                self.ledger.mark_sent(self._logged)
            self._wandb, self._logged = None, []

    def _open_wandb(self, protocol: Protocol) -> WandbLog:
        assert self.ledger is not None
        run_id = identity.settle(self.run_dir, checkpoint.newest_state(self.run_dir)).id
        # The first protocol has the W&B run <id>-eval; every other one has a W&B run of its own.
        first = next((key.protocol for key in self.ledger.sent()), protocol.id)
        job = "eval" if first == protocol.id else f"eval-{protocol.id}"
        extra = {"protocol": protocol.id, "settings": dataclasses.asdict(protocol)}
        return WandbLog(self.config, run_id, job, extra)

    def _wandb_values(self, row: Row) -> dict[str, Any]:
        """Return what is logged for a row: its scores, the best ones so far and the grid."""
        values: dict[str, Any] = {STEP_KEY: row["step"], **row["scores"]}
        if (best_row := best(self.rows(row["protocol"]))) is not None:
            headline = row["headline"]
            values[f"{headline}_best"] = best_row["scores"][headline]
            values[f"{headline}_best_step"] = best_row["step"]
        if (path := self.grid_path(row["step"])).is_file():
            values["samples/grid"] = Picture(path, f"step {row['step']}")
        if (path := self.nearest_path(row["step"])).is_file():
            values["samples/nearest"] = Picture(path, f"step {row['step']}")
        return values
