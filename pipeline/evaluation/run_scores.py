"""The evaluation of one run: candidates -> rows of its ledger -> W&B.

A row is in the ledger before W&B hears of it, and W&B is a view: it may be slow, dead or absent.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.data.codecs import encode
from pipeline.evaluation import candidates
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.scorer import Scorer
from pipeline.models.sampling import sample_grid
from pipeline.runs.results import Key, Ledger, Row, best, key_of
from pipeline.runs.wandb_log import STEP_KEY, Picture, WandbLog, wandb_mode
from pipeline.runtime.console import say
from pipeline.runtime.errors import CheckpointError, RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.ranks import VISIBLE_SECONDS, on_every_rank, on_rank_zero


class RunScores:
    """Candidates of one run -> rows of its ledger -> W&B.

    Args:
        evaluator: ready to score.
        run_dir: the run's folder.
    """

    def __init__(self, evaluator: Scorer, run_dir: Path) -> None:
        self.evaluator, self.run_dir = evaluator, run_dir
        self.config, self.protocol = evaluator.config, evaluator.protocol
        self._failed: dict[int, str] = {}
        self.ledger: Ledger | None = None
        self._dashboard: WandbLog | None = None
        self._sending: list[Key] = []
        on_rank_zero(evaluator.accelerator, self._open)

    def _open(self) -> None:
        self.ledger = Ledger(self.run_dir)

    def evaluate(self, find: Callable[[], list[Candidate]]) -> None:
        """Evaluate everything that ``find`` (called on rank 0) gives and the ledger lacks.

        What another process is evaluating is left to it; this returns when that is done too. What
        cannot be used is passed over and remembered: ``raise_if_any_failed``.

        Raises:
            Stopped: a stop signal came.
        """
        while True:
            candidate, busy = on_rank_zero(
                self.evaluator.accelerator, lambda: self._claim_one(find())
            )
            if candidate is not None:
                self._evaluate_one(candidate)
            elif busy:
                self.evaluator.wait_because(
                    f"step {busy} is being evaluated by another process; waiting"
                )
            else:
                break

    def raise_if_any_failed(self) -> None:
        """At the end, so that one damaged candidate keeps no other from its scores.

        Raises:
            CheckpointError: naming all that could not be used.
        """
        if self._failed:
            raise CheckpointError("\n".join(self._failed.values()))

    def training_has_ended(self) -> bool:
        """Whether the run reached its last step: nothing more will come."""
        marker = self.run_dir / "FINISHED"
        return on_rank_zero(self.evaluator.accelerator, marker.is_file)

    def rows(self) -> list[Row]:
        """Rows of this protocol, by step; rank 0 only."""
        assert self.ledger is not None
        return self.ledger.rows(self.protocol.id)

    def key(self, candidate: Candidate) -> Key:
        """The ledger key of a candidate under this protocol."""
        return Key(candidate.step, self.protocol.weights, self.protocol.id)

    def _claim_one(self, found: list[Candidate]) -> tuple[Candidate | None, int]:
        """(a candidate that is now ours or None, a step that another process works on or 0)."""
        assert self.ledger is not None
        done = {key_of(row) for row in self.ledger.rows()}
        busy = 0
        for candidate in found:
            key = self.key(candidate)
            if key in done or candidate.step in self._failed:
                continue
            if not self.ledger.claim(key):
                busy = candidate.step
            elif self.ledger.has(key):  # finished between the look and the claim
                self.ledger.release(key)
            else:
                return candidate, 0
        return None, busy

    def _evaluate_one(self, candidate: Candidate) -> None:
        evaluator, config, began = self.evaluator, self.config, time.monotonic()
        try:
            G, model = on_every_rank(evaluator.accelerator, lambda: self._opened(candidate))
            images = candidates.generated_images(G, model, config.eval.seed)
            scores = evaluator.score(images, f"step {candidate.step}")
            on_rank_zero(
                evaluator.accelerator,
                lambda: self._record(
                    candidate,
                    scores,
                    sample_grid(G, model, config.run.seed),
                    time.monotonic() - began,
                ),
            )
        except CheckpointError as error:  # of opening, so all ranks are here
            if on_rank_zero(evaluator.accelerator, candidate.path.is_dir):
                self._failed[candidate.step] = str(error)
                reason = str(error)
            else:
                reason = "removed meanwhile"  # by the training, which keeps train.keep of them
            if evaluator.is_main:
                say(f"step {candidate.step} passed over: {reason}")
        finally:
            if self.ledger is not None:
                self.ledger.release(self.key(candidate))

    def _opened(self, candidate: Candidate) -> tuple[nn.Module, ModelConfig]:
        if not self.evaluator.is_main:  # rank 0 has just seen it
            deadline = time.monotonic() + VISIBLE_SECONDS
            while not candidate.path.is_dir():
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{candidate.path}: not seen here within {VISIBLE_SECONDS:g} s; all nodes "
                        "must share the run's folder."
                    )
                time.sleep(0.5)
        weights, device = self.config.eval.weights, self.evaluator.accelerator.device
        return candidates.open_generator(candidate, self.run_dir, weights, device)

    def _record(
        self,
        candidate: Candidate,
        scores: dict[str, float],
        grid: NDArray[np.uint8],
        seconds: float,
    ) -> None:
        assert self.ledger is not None
        path = self.grid_path(candidate.step)
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, encode(grid, "png"))
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written: {error.strerror or error}. Free space, then run the "
                "same command again: what was evaluated before is kept."
            ) from None
        step, weights, protocol = self.key(candidate)
        row = {
            "step": step,
            "weights": weights,
            "protocol": protocol,
            "scores": scores,
            "headline": self.protocol.headline,
            "higher_is_better": self.protocol.higher_is_better,
            "source": f"{candidate.path.parent.name}/{candidate.path.name}",
            "settings": dataclasses.asdict(self.protocol),
            "processes": self.evaluator.accelerator.num_processes,
            "seconds": round(seconds, 3),
            "time": round(time.time(), 3),
        }
        self.ledger.append(row)
        headline = self.protocol.headline
        say(f"step {step}: {headline} {scores[headline]:.5g}  ({seconds:.1f} s)")
        self.send()

    def grid_path(self, step: int) -> Path:
        """Where the picture of a step's fixed z lies."""
        return self.run_dir / "evaluations" / f"step_{step:08d}.png"

    # -- W&B --------------------------------------------------------------------------------

    def send(self) -> None:
        """Hand rows that W&B does not have to it, unless another evaluator of this run does so.

        Two processes that write one W&B run overwrite each other, so there is one sender at a
        time; it also sends the rows of others. A row counts as sent when W&B was closed in order:
        after a crash it is sent again, with the same values at the same ``train/step``.
        """
        if self.ledger is None or wandb_mode(self.config) == "disabled":
            return
        if self._dashboard is None and not self.ledger.acquire_sender_lock():
            return
        mine = [row for row in self.ledger.unsent() if row["protocol"] == self.protocol.id]
        for row in [row for row in mine if key_of(row) not in self._sending]:
            if self._dashboard is None:
                self._dashboard = self._open_dashboard()
            self._dashboard.log(self._shown(row))
            self._sending.append(key_of(row))

    def close(self) -> None:
        """Send what is left and drop all locks."""
        if self.ledger is not None:
            self.send()
            if self._dashboard is not None:
                self._dashboard.close()
                with suppress(OSError):  # they are sent again then, with the same values
                    self.ledger.mark_sent(self._sending)
            self.ledger.close()
        self.evaluator.close()

    def _open_dashboard(self) -> WandbLog:
        assert self.ledger is not None
        try:
            run_id = str(json.loads((self.run_dir / "run.json").read_text())["id"])
        except (OSError, ValueError, KeyError, TypeError):
            run_id = self.run_dir.resolve().name
        # One curve, one protocol: a second protocol's rows go to a W&B run of their own.
        first = next((key.protocol for key in self.ledger.sent()), self.protocol.id)
        job = "eval" if first == self.protocol.id else f"eval-{self.protocol.id}"
        extra = {"protocol": self.protocol.id, "settings": dataclasses.asdict(self.protocol)}
        return WandbLog(self.config, run_id, job, extra)

    def _shown(self, row: Row) -> dict[str, Any]:
        """A row as W&B shows it; the best so far are metrics of their own, made from the ledger."""
        shown: dict[str, Any] = {STEP_KEY: row["step"], **row["scores"]}
        if (found := best(self.rows())) is not None:
            headline = row["headline"]
            shown[f"{headline}_best"] = found["scores"][headline]
            shown[f"{headline}_best_step"] = found["step"]
        if (path := self.grid_path(row["step"])).is_file():
            shown["samples/grid"] = Picture(path, f"step {row['step']}")
        return shown
