"""A run on one rank: opening its folder, resuming, and what is written at which step.

The loop asks ``due`` questions and calls ``log``, ``sample`` and ``save``; every answer is the same
on all ranks, and only rank 0 writes.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.data.order import Order
from pipeline.data.shards import Index
from pipeline.models.sampling import make_sampler, sample_grid
from pipeline.runs import checkpoint
from pipeline.runs.metrics_log import MetricsLog, NullMetricsLog
from pipeline.runs.run_folder import SNAPSHOTS, RunFolder, committed, step_of
from pipeline.runtime import signals
from pipeline.runtime.errors import CheckpointError
from pipeline.runtime.ranks import on_every_rank, on_rank_zero, same_on_all_ranks
from pipeline.training.gan import GAN
from pipeline.training.meter import Meter

log = logging.getLogger("pipeline")


class Run:
    """The open run of this rank.

    Args:
        config: the whole configuration.
        accelerator: the processes that share the run.
        precision: resolved arithmetic, kept for the life of the run.

    Raises:
        RunFolderError: the folder is in use or cannot be written.
        ConfigError: the folder belongs to another configuration.
    """

    def __init__(self, config: Config, accelerator: Accelerator, precision: str) -> None:
        self.config, self.accelerator, self.precision = config, accelerator, precision
        self.dir = Path(config.run.dir).expanduser()
        self.is_main = accelerator.is_main_process
        self.folder: RunFolder | None = None
        self.id = on_rank_zero(accelerator, self._open_folder)
        self._agreement = signals.Agreement(accelerator.num_processes)
        self._stop, self._save_by_clock = False, False
        self._saved_step, self._saved_at = -1, time.monotonic()

    def _open_folder(self) -> str:
        self.folder = RunFolder(self.config, self.precision)
        checkpoint.remove_unfinished(self.dir)
        return self.folder.id

    # -- resume -----------------------------------------------------------------------------

    def resume(self, gan: GAN, index: Index, order: Order, micro_batch: int) -> int:
        """Load the newest good checkpoint into ``gan``; returns its step, 0 for a new run.

        Raises:
            CheckpointError: none is usable, or it was trained on other data.
        """
        self._stream = order.describe() | {"fingerprint": index.fingerprint}
        self._micro_batch = micro_batch
        path = on_rank_zero(self.accelerator, self._newest)
        if path is None:
            return 0
        found = on_every_rank(self.accelerator, lambda: self._read(path))
        if self.is_main and (before := found.state["micro_batch"]) != micro_batch:
            log.warning(
                f"micro-batch was {before}, is {micro_batch} on {self.accelerator.num_processes} "
                "process(es): BatchNorm groups change from here on. Set "
                f"train.micro_batch={before} to keep the computation the same."
            )
        gan.load(found.weights, found.optimizers)
        self._saved_step = int(found.state["step"])
        on_rank_zero(self.accelerator, lambda: self._export_missing_snapshot(gan))
        return self._saved_step

    def _read(self, path: Path) -> checkpoint.Checkpoint:
        found = checkpoint.read(path)
        for key, value in self._stream.items():
            if (before := found.state["stream"][key]) != value:
                raise CheckpointError(
                    f"{path}: trained on other data: {key} was {before}, is {value}. Point "
                    "data.shards at the same set, or start a new run with run.dir=..."
                )
        return found

    def _export_missing_snapshot(self, gan: GAN) -> None:
        """The disk was full, or a kill came, when its checkpoint had just been written."""
        step = self._saved_step
        if self.due(step, self.config.train.checkpoint_every) and step not in map(
            step_of, committed(self.dir, SNAPSHOTS)
        ):
            self._export(step, gan)

    def _newest(self) -> Path | None:
        found, damaged = checkpoint.read_newest(self.dir)
        for line in damaged:
            log.warning("damaged checkpoint passed over: %s", line)
        return found.path if found else None

    # -- while training ---------------------------------------------------------------------

    def start(self, step: int) -> Run:
        """Open metrics and tracker; after the data workers exist, which are forked without them.

        From here on the run is no longer finished, if it was.
        """
        if self.folder is not None and step < self.config.train.total_steps:
            self.folder.unmark("FINISHED")
        self.tracker = (
            MetricsLog(self.config, self.id, step, self.config.train.total_steps)
            if self.is_main
            else NullMetricsLog(self.config)
        )
        self.meter = Meter(self.accelerator, self.config.images_per_step)
        self._saved_at = time.monotonic()
        return self

    def agree(self, step: int) -> None:
        """Share stop requests and the checkpoint clock; once a step, on every rank."""
        minutes = self.config.train.checkpoint_minutes
        late = self.is_main and 0 < minutes * 60 < time.monotonic() - self._saved_at
        self._stop, late = self._agreement.agree(stop=signals.received() is not None, flag=late)
        # Several ranks hear of the step before: what was late then may have been saved since.
        heard_of = step - 1 if self.accelerator.num_processes > 1 else step
        self._save_by_clock = late and self._saved_step < heard_of
        self.tracker.advance(step)

    @property
    def stopping(self) -> bool:
        """Whether all ranks leave after this step."""
        return self._stop

    def due(self, step: int, every: int) -> bool:
        """Whether something done ``every`` steps (0 = never) and at the end is due."""
        return step == self.config.train.total_steps or bool(every and step % every == 0)

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due: by step, by the clock, at the end or before leaving."""
        asked = self._stop or self._save_by_clock
        return (asked or self.due(step, self.config.train.checkpoint_every)) and (
            step != self._saved_step
        )

    def log(self, step: int, gan: GAN) -> None:
        """Write a row of metrics; the loop's only wait for the device."""
        gan.guard.raise_if_tripped()
        self.tracker.log(step, self.meter.row(step))

    def sample(self, step: int, gan: GAN) -> None:
        """Write a grid of G_ema's images from z that are fixed for the whole run."""
        if self.is_main:
            model, seed = self.config.model, self.config.run.seed
            G = make_sampler(model, gan.G_ema.state_dict(), self.accelerator.device)
            self.tracker.images(step, sample_grid(G, model, seed))

    def save(self, step: int, gan: GAN) -> None:
        """Commit a checkpoint, then prune; a snapshot of G_ema with each regular one."""
        gan.guard.raise_if_tripped()
        gan.raise_if_weights_are_not_finite(step)
        if not same_on_all_ranks(self.accelerator, gan.networks(), gan.optimizers()):
            raise RuntimeError(f"ranks hold different states at step {step}; not saved")
        if self.is_main:
            train = self.config.train
            state = {
                "run_id": self.id,
                "images_seen": step * self.config.images_per_step,
                "stream": self._stream | {"position": step * self.config.images_per_step},
                "micro_batch": self._micro_batch,
                "precision": self.precision,
                "world_size": self.accelerator.num_processes,
            }
            checkpoint.save(self.dir, step, gan.networks(), gan.optimizers(), state)
            self._mark("progress", str(step))
            keep_best = self.config.eval.keep_best
            checkpoint.prune(self.dir, train.keep, train.keep_every, keep_best)
            if self.due(step, train.checkpoint_every):
                self._export(step, gan)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _export(self, step: int, gan: GAN) -> None:
        weights, device = gan.G_ema.state_dict(), self.accelerator.device
        checkpoint.export_snapshot(self.dir, step, weights, self.config, device)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the tracker, whatever ended the loop."""
        self.tracker.close(failed=kind is not None)

    def finish(self, step: int) -> None:
        """Leave the marker that launch scripts decide by, after the last checkpoint."""
        self._agreement.close()
        finished = step >= self.config.train.total_steps
        if self.is_main:
            if not finished and self.folder is not None:
                self.folder.unmark("FINISHED")
            self._mark("FINISHED" if finished else "PREEMPTED", str(step))
            if not finished:
                log.warning(
                    "stopped by %s at step %s; run the same command again to go on",
                    signals.received() or "another rank's signal",
                    step,
                )

    def leave_early(self) -> bool:
        """End before the first step, stopped; whether the run had finished already."""
        step = on_rank_zero(self.accelerator, self._progress)
        self.finish(step)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return step >= self.config.train.total_steps

    def _progress(self) -> int:
        try:
            return int((self.dir / "progress").read_text())
        except (OSError, ValueError):
            return 0

    def _mark(self, name: str, content: str) -> None:
        assert self.folder is not None
        self.folder.mark(name, content)
