"""Open, resume and record a training run on one rank.

The loop of ``train.py`` asks what is due and calls ``log``, ``sample`` and ``save``. All ranks get
the same answers at the same step. Only rank 0 writes.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.config.changes import fixed_differences
from pipeline.config.schema import Config, flatten, without_credentials
from pipeline.data.order import Order
from pipeline.data.shards import Index
from pipeline.models.sampling import generator_id, make_sampler, sample_grid
from pipeline.runs import alarms, announce, checkpoint, snapshot
from pipeline.runs.alarms import COLLAPSED, FINISHED, PREEMPTED
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.healing import finish_healing
from pipeline.runs.metrics_log import MetricsLog, NullMetricsLog
from pipeline.runs.results import supersede_after
from pipeline.runs.run_folder import RunFolder, saved_noise
from pipeline.runs.step_folders import SNAPSHOTS, committed, step_of
from pipeline.runtime import log_file, signals
from pipeline.runtime.documents import set_file_aside
from pipeline.runtime.errors import CheckpointError
from pipeline.runtime.ranks import on_rank_zero, same_on_all_ranks
from pipeline.training.collapse import Collapse
from pipeline.training.finite_guard import require_finite_weights
from pipeline.training.gan import GAN
from pipeline.training.meter import meter_of_run
from pipeline.training.origin import start_from_origin
from pipeline.training.restore import require_data
from pipeline.training.step_profile import StepProfile

log = logging.getLogger("pipeline")


class Run:
    """An open run, as one rank sees it.

    Args:
        config: the whole configuration.
        accelerator: the ranks that share the run.
        precision: ``fp32``, ``bf16`` or ``fp16``; a run keeps that of its first checkpoint.

    Raises:
        RunFolderError: the folder is in use, cannot be written or has files of something else.
        ConfigError: the folder belongs to another configuration.
    """

    def __init__(self, config: Config, accelerator: Accelerator, precision: str) -> None:
        self.config, self.accelerator, self.precision = config, accelerator, precision
        self.dir = Path(config.run.dir).expanduser()
        self.is_main = accelerator.is_main_process
        self.folder: RunFolder | None = None
        self.id = on_rank_zero(accelerator, self._open_folder)
        self.meter = meter_of_run(config, accelerator, precision)
        limit = timedelta(seconds=config.train.rank_timeout)
        self._agreement = signals.Agreement(accelerator.num_processes, limit)
        self._stop, self._save_by_clock = False, False
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._started_at = 0
        self._events: list[dict[str, Any]] = []
        self.collapse = Collapse(config)

    def _open_folder(self) -> str:
        self.folder = RunFolder(self.config)
        log_file.open_log(self.dir / "log.txt")
        announce.record_start(self.accelerator.num_processes)
        return self.folder.identity.id

    # -- resume -----------------------------------------------------------------------------

    def resume(self, gan: GAN, index: Index, order: Order, micro_batch: int) -> int:
        """Load the newest undamaged checkpoint into ``gan``; return its step, 0 for a new run.

        Args:
            gan: takes the weights and optimizer states.
            index: the shards; a checkpoint of other shards is refused.
            order: the data order; a checkpoint of another order is refused.
            micro_batch: images per BatchNorm group. A change is allowed, with a warning.

        Raises:
            CheckpointError: all checkpoints are damaged, of other data or of a newer version.
        """
        self._data_identity = order.describe() | {"fingerprint": index.fingerprint}
        self.noise = on_rank_zero(self.accelerator, lambda: saved_noise(self.config))
        self._micro_batch = micro_batch
        found, healings = on_rank_zero(self.accelerator, self._newest)  # one reader sends to all
        if found is not None:
            self._load(gan, found, healings)
        elif self.config.train.init:
            self._events = [start_from_origin(self.config, self.accelerator, gan)]
        if found is None and (self._events or self.config.train.watch == "heal"):
            self.save(0, gan)  # no resume reads the origin again; a healing may lead back to 0
        if self.folder is not None:
            announce.say_start(
                *(self.config, self.folder.identity, index, max(0, self._saved_step)),
                device=self.accelerator.device,
                precision=self.precision,
                ranks=self.accelerator.num_processes,
                micro_batch=micro_batch,
                schedule=gan.schedules.describe(),
            )
        return max(0, self._saved_step)

    def _load(self, gan: GAN, found: Checkpoint, healings: Sequence[alarms.Alarm]) -> None:
        if self.is_main and (before := found.state["micro_batch"]) != self._micro_batch:
            announce.warn_of_groups(before, self._micro_batch, self.accelerator.num_processes)
        try:
            gan.load(found.weights, found.optimizers)
        except ValueError as error:  # checksums are right, so another program wrote it
            raise CheckpointError(f"{found.path}: is of another run or program: {error}.") from None
        self._saved_step = int(found.state["step"])
        self._note_changes(found.state, healings)
        gan.schedules.multiply(self.collapse.factors())
        on_rank_zero(self.accelerator, lambda: self._export_missing_snapshot(gan))

    def _note_changes(self, state: Mapping[str, Any], healings: Sequence[alarms.Alarm]) -> None:
        """Take over the events of a checkpoint, and add what happened since."""
        self._events = list(state.get("events") or [])
        before = state.get("config") or flatten(self.config)
        changed = fixed_differences(before, self.config, state["stream"])
        if changed:
            self._events.append({"step": state["step"], "changed": changed})
        self._events += self.collapse.load(state, healings, changed=bool(changed))

    def _export_missing_snapshot(self, gan: GAN) -> None:
        """Export the snapshot that a full disk or a kill prevented after the last checkpoint."""
        step = self._saved_step
        if self.due(step, self.config.train.checkpoint_every) and step not in map(
            step_of, committed(self.dir, SNAPSHOTS)
        ):
            self._export(step, gan)

    def _newest(self) -> tuple[Checkpoint | None, list[alarms.Alarm]]:
        """Return the newest undamaged checkpoint and all healings; set damaged ones aside."""
        assert self.folder is not None
        healings = finish_healing(self.dir)
        found, damaged = checkpoint.read_newest(self.dir)
        for path, reason in damaged.items():
            aside = set_file_aside(path)
            log.warning("damaged checkpoint set aside as %s: %s", aside.name, reason)
        step = int(found.state["step"]) if found else 0
        self.folder.require_progress(step)
        if found is None:
            return None, []
        self.folder.require_own(found)
        require_data(found, self.id, self._data_identity)
        if damaged:
            self.folder.mark("progress", str(step))
        return found, healings

    # -- while training ---------------------------------------------------------------------

    def start(self, step: int) -> Run:
        """Open the metrics log and W&B, and start the clocks; return the run itself.

        Call it after the data workers were forked, so that they do not inherit open files. The
        marker FINISHED is removed if steps are left to do.
        """
        self._started_at = step
        if self.folder is not None and step < self.config.train.total_steps:
            self.folder.unmark(FINISHED)
            supersede_after(self.dir, step)
            alarms.rewind_alarms(self.dir, step)
        self.tracker = (
            MetricsLog(self.config, self.id, step, self.config.train.total_steps)
            if self.is_main
            else NullMetricsLog(self.config)
        )
        self.meter.reset()
        self._saved_at = time.monotonic()
        self.profile = StepProfile(self.config, self.accelerator, self.meter, step)
        return self

    def agree(self, step: int) -> None:
        """Make all ranks agree on stop requests and on the checkpoint clock, once a step."""
        minutes = self.config.train.checkpoint_minutes
        late = self.is_main and 0 < minutes * 60 < time.monotonic() - self._saved_at
        self._stop, late = self._agreement.agree(stop=signals.received() is not None, flag=late)
        # Several ranks get the answer of the step before, which a save since may have settled.
        asked_at = step - 1 if self.accelerator.num_processes > 1 else step
        self._save_by_clock = late and self._saved_step < asked_at
        self.tracker.advance(step)
        self.profile.end(step, stopping=self._stop)

    @property
    def leaving(self) -> bool:
        """Whether all ranks leave the loop after this step."""
        return self._stop or self.collapse.alarm is not None

    @property
    def healing(self) -> bool:
        """Whether the run goes on from an earlier checkpoint: ``resume`` it anew."""
        return self.leaving and not self._stop and not self.collapse.stopped

    def due(self, step: int, every: int) -> bool:
        """Return whether work done every ``every`` steps (0 = never) and at the end is due."""
        return step == self.config.train.total_steps or bool(every and step % every == 0)

    def save_due(self, step: int) -> bool:
        """Return whether a checkpoint is due: by its step, by the clock, at the end, or to stop."""
        asked = self._stop or self._save_by_clock
        due = asked or self.due(step, self.config.train.checkpoint_every)
        return due and step != self._saved_step and self.collapse.alarm is None

    def log(self, step: int, gan: GAN) -> None:
        """Write a row of metrics. This is the loop's only wait for the device."""
        gan.guard.raise_if_tripped()
        self._require_folder()
        row = self.meter.row(step) | gan.schedules.row(step) | gan.watch.row()
        self.tracker.log(step, row)
        for alarm in self.collapse.judge(step, row):
            on_rank_zero(self.accelerator, partial(self._tell, alarm))

    def _tell(self, alarm: alarms.Alarm) -> None:
        alarm = alarms.record(self.dir, alarm)
        self.tracker.alert(alarm.step, alarm.title, alarm.text)

    def sample(self, step: int, gan: GAN) -> None:
        """Write a grid of G_ema's images, from the same z at every step of the run."""
        with self.meter.upkeep():
            self._require_folder()
            if self.is_main:
                model, seed = self.config.model, self.config.run.seed
                G = make_sampler(model, gan.G_ema.state_dict(), self.accelerator.device)
                self.tracker.images(step, sample_grid(G, model, seed))

    def save(self, step: int, gan: GAN) -> None:
        """Commit a checkpoint, remove old ones, and export a snapshot at regular steps.

        Raises:
            NonFiniteLoss: a loss or a weight is NaN or infinite; nothing is saved.
            RunFolderError: the checkpoint cannot be written; earlier ones are intact.
        """
        with self.meter.upkeep():
            gan.guard.raise_if_tripped()
            require_finite_weights(gan.networks().values(), step)
            if not same_on_all_ranks(self.accelerator, gan.networks(), gan.optimizers()):
                raise RuntimeError(f"ranks hold different states at step {step}; not saved")
            if self.is_main:
                self._commit(step, gan)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _commit(self, step: int, gan: GAN) -> None:
        self._require_folder()
        train, networks = self.config.train, gan.networks()
        seen = step * self.config.images_per_step
        state = {
            checkpoint.GENERATORS: {
                name: generator_id(self.config.model, networks[name].state_dict())
                for name in ("G", "G_ema")
            },
            "run_id": self.id,
            "run_dir": str(self.dir.resolve()),
            "inode": self.dir.stat().st_ino,
            "config": flatten(without_credentials(self.config)),
            "events": self._events,
            "watch": self.collapse.state(),
            "images_seen": seen,
            "stream": self._data_identity | {"position": seen, "z": self.noise},
            "micro_batch": self._micro_batch,
            "precision": self.precision,
            "world_size": self.accelerator.num_processes,
        }
        checkpoint.save(self.dir, step, networks, gan.optimizers(), state)
        assert self.folder is not None
        self.folder.mark("progress", str(step))
        best, kept = self.config.eval.keep_best, self.collapse.kept(step)
        checkpoint.prune(self.dir, step, train.keep, train.keep_every, best, kept)
        if self.due(step, train.checkpoint_every):
            self._export(step, gan)

    def _export(self, step: int, gan: GAN) -> None:
        weights, device = gan.G_ema.state_dict(), self.accelerator.device
        snapshot.export_snapshot(self.dir, step, weights, self.config, device)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Close the metrics log and W&B; keep the traceback of an error in log.txt."""
        if error is not None:
            log_file.write_line("".join(traceback.format_exception(error)).rstrip())
        self.profile.close()
        self.tracker.close(failed=kind is not None or self.collapse.stopped)

    def finish(self, step: int) -> bool:
        """Write FINISHED, PREEMPTED or COLLAPSED, for scripts; return whether it finished."""
        if self.healing:
            return False
        self._agreement.close()
        finished = step >= self.config.train.total_steps and self.collapse.alarm is None
        end = COLLAPSED if self.collapse.stopped else FINISHED if finished else PREEMPTED
        if self.folder is not None:
            self.folder.mark_end(end, str(step))
            if finished and step == self._saved_step > self._started_at:
                announce.say_end(self.config, step)
            if end == PREEMPTED:
                announce.say_stopped(step)
        return finished

    def leave_early(self) -> bool:
        """Leave before the first step, on a stop request; return whether the run had finished."""
        step = on_rank_zero(self.accelerator, lambda: self.folder.progress() if self.folder else 0)
        finished = self.finish(step)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return finished

    def _require_folder(self) -> None:
        if self.folder is not None:
            self.folder.require_in_place()
