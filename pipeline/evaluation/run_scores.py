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

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.data.codecs import encode
from pipeline.evaluation import candidates
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.d_gap import GAP, MARGIN, d_gap, open_discriminator
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.wandb_scores import WandbScores, grid_path, nearest_path
from pipeline.models.sampling import generator_id, sample_grid
from pipeline.runs.alarms import COLLAPSED, FINISHED
from pipeline.runs.results import Key, Ledger, Row, key_of
from pipeline.runs.step_folders import SNAPSHOTS, committed, step_of
from pipeline.runs.tensorboard_log import TensorBoardLog
from pipeline.runs.wandb_log import STEP_KEY
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
        self._wandb: WandbScores | None = None
        on_rank_zero(scorer.accelerator, self._open_ledger)

    def _open_ledger(self) -> None:
        self.ledger = Ledger(self.run_dir)
        protocols = [scorer.protocol for scorer in self.scorers]
        self._wandb = WandbScores(self.config, self.run_dir, self.ledger, protocols)
        self._tensorboard = TensorBoardLog(self.config, "eval")

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
        """Return whether the training reached its last step, or ``train.watch`` ended it."""
        ends = [self.run_dir / name for name in (FINISHED, COLLAPSED)]
        return on_rank_zero(self.scorer.accelerator, lambda: any(end.is_file() for end in ends))

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
            of_d: dict[str, float] = {}
            asked = ["memorization" in one.protocol.metrics for one in which]
            if any(asked):
                compare = partial(self._compare_with_held_out, candidate, G, model)
                of_d = on_rank_zero(scorer.accelerator, compare, lengthy=True)

            def record() -> None:
                generator = generator_id(model, G.state_dict())
                grid = sample_grid(G, model, config.run.seed)
                seconds = time.monotonic() - start
                for one, values, has_d in zip(which, scores, asked, strict=True):
                    values |= of_d if has_d else {}
                    self._record(one, candidate, values, generator, grid, seconds)
                    self._tensorboard.log({STEP_KEY: candidate.step, **values})
                self.log_to_wandb()

            on_rank_zero(scorer.accelerator, record)
        except CheckpointError as error:  # of ``_open_generator``, hence on all ranks
            on_rank_zero(scorer.accelerator, partial(self._pass_over, candidate, error))
        finally:
            if self.ledger is not None:
                for one in which:
                    self.ledger.release(self.key(candidate, one.protocol))

    def _compare_with_held_out(
        self, candidate: Candidate, G: nn.Module, model: ModelConfig
    ) -> dict[str, float]:
        """Return ``d_gap`` of the D beside a G; {} with a message if it cannot be computed."""
        scorer, weights = self.scorer, self.config.eval.weights
        assert scorer.held_out is not None
        named, found = replace(candidate, generator=generator_id(model, G.state_dict())), {}
        reason = "no checkpoint of this step has this G and its D (a snapshot has no D)"
        try:
            D = open_discriminator(named, model, self.run_dir, weights, scorer.accelerator.device)
            if D is not None:
                reason = "an image has no class, or a logit is NaN or infinite"
                found = d_gap(D, G, model, self.config, scorer.index, scorer.held_out)
        except CheckpointError as error:
            reason = str(error)
        if found:
            gap, margin = found[GAP], found[MARGIN]
            text = f"D's mean logit of training images is {gap:.4g} above that of held-out ones"
            say(f"step {candidate.step}: {text}, {margin:.4g} above that of generated ones")
        else:
            say(f"step {candidate.step}: left out: {GAP}: {reason}")
        return found

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
        path, nearest = grid_path(self.run_dir, candidate.step), self.scorer.picture
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, encode(grid, "png"))
            if nearest is not None:
                write_atomic(nearest_path(self.run_dir, candidate.step), encode(nearest, "png"))
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

    def log_to_wandb(self) -> None:
        """Log the rows that W&B lacks."""
        if self._wandb is not None:
            self._wandb.log()

    def close(self) -> None:
        """Log the remaining rows, close W&B and release all locks."""
        if self._wandb is not None:
            self._wandb.close()
            self._tensorboard.close()
        if self.ledger is not None:
            self.ledger.close()
        self.scorer.close()
