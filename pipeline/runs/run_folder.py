"""The folder of a run: locked by one process, tied to one configuration, with marker files.

runs/<name>/ config.yaml  run.json (id, place, origin)  metrics.jsonl  log.txt  samples/
             checkpoints/  snapshots/  wandb/  progress (step of the last checkpoint)
             watch.json (alarms)  FINISHED | PREEMPTED | COLLAPSED
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.changes import fixed_differences
from pipeline.config.loading import dump, load
from pipeline.config.recipe import ACCEPTABLE
from pipeline.config.schema import Config, flatten
from pipeline.models.noise import BY_BATCH, BY_ROW
from pipeline.runs import checkpoint, tensorboard_log, wandb_names
from pipeline.runs.alarms import COLLAPSED, ENDS, PREEMPTED
from pipeline.runs.identity import (
    damage_of,
    identify,
    new_identity,
    read_identity,
    set_damaged_aside,
)
from pipeline.runs.step_folders import CHECKPOINTS, committed, folder_of, steps_set_aside
from pipeline.runtime.console import say
from pipeline.runtime.documents import DamagedFile, read_bytes, sign
from pipeline.runtime.errors import CheckpointError, ConfigError, RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.locks import FileLock

WRITTEN = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "progress")
"""Files of a run folder that a run replaces or cuts: none may be there before run.json is."""
LONGEST_PROGRESS = 100
"""Bytes of the file ``progress``."""


def saved_precision(config: Config) -> str | None:
    """Return the configured precision; for ``auto`` the one of the newest checkpoint, or None.

    A run that started in bf16 must not continue in fp32 because it was requeued on another machine.
    """
    if config.train.precision != "auto":
        return config.train.precision
    state = _state_to_resume(config)
    return None if state is None else str(state["precision"])


def saved_order(config: Config) -> dict[str, Any]:
    """Return what the newest checkpoint has of its data order, and its ``data.order``.

    Empty for a new run. Runs from before that key are of ``auto``.
    """
    state = _state_to_resume(config)
    if state is None:
        return {}
    stream: dict[str, Any] = state["stream"]
    return stream | {"order": (state.get("config") or {}).get("data.order", "auto")}


def saved_noise(config: Config) -> str:
    """Return the rule by which the newest checkpoint's run draws z; that of a new run without one.

    Raises:
        CheckpointError: this version does not know it.
    """
    state = _state_to_resume(config)
    rule = BY_ROW if state is None else str(state["stream"].get("z", BY_BATCH))
    if rule not in (BY_ROW, BY_BATCH):
        raise CheckpointError(
            f"run.dir ({config.run.dir}): its checkpoints are of a newer version, which draws z by "
            f"the rule {rule!r}: resume with that version, or start a new run with run.dir=..."
        )
    return rule


def _state_to_resume(config: Config) -> dict[str, Any] | None:
    """Return state.json of the checkpoint that a run or fork starts from; None without any."""
    for folder in filter(None, (config.run.dir, config.run.fork)):
        if (state := checkpoint.newest_state(Path(folder).expanduser())) is not None:
            return state
    return None


class RunFolder:
    """The open folder of a run, locked until this process ends; rank 0 only.

    ``identity.id`` is the run's W&B id, ``path`` the folder.

    Args:
        config: the run's configuration; it is written to ``config.yaml``.

    Raises:
        RunFolderError: the folder cannot be written, another process has locked it, or it holds
            files that no run wrote.
        ConfigError: the folder has checkpoints of another configuration.
        CheckpointError: ``run.fork`` has no checkpoint that can be read.
    """

    def __init__(self, config: Config) -> None:
        if config.tracking.wandb != "disabled":
            wandb_names.require_names()
        tensorboard_log.require_package(config)
        self.path = Path(config.run.dir).expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire_lock()
            self._refuse_files_of_others()
            set_damaged_aside(self.path)
            checkpoint.remove_unfinished(self.path)
            if config.run.fork:
                self._fork(config)
            state = checkpoint.newest_state(self.path)
            self.identity = identify(self.path, state)
            if state is not None:
                self._check_configuration(config, state)
            self.identity.write()
            once = replace(config, run=replace(config.run, accept_changes=False))
            write_atomic(self.path / "config.yaml", sign(dump(once)).encode())
            self.unmark(PREEMPTED)
            self.unmark(COLLAPSED)
        except OSError as error:
            inside = Path(str(error.filename or self.path))
            reason = error.strerror if inside == self.path else f"{inside.name}: {error.strerror}"
            raise RunFolderError(
                f"run.dir ({self.path}): cannot be written ({reason}); "
                "choose another folder with run.dir=... or give write permission."
            ) from None

    def mark(self, name: str, content: str) -> None:
        """Write a marker file that launch scripts read: progress or one of ``ENDS``."""
        write_atomic(self.path / name, content.encode())

    def mark_end(self, name: str, content: str) -> None:
        """Write one of ``ENDS`` and remove the others."""
        for other in ENDS:
            if other != name:
                self.unmark(other)
        self.mark(name, content)

    def unmark(self, name: str) -> None:
        """Remove a marker file."""
        (self.path / name).unlink(missing_ok=True)

    def progress(self) -> int:
        """Return the step of the last checkpoint that was saved, as the file ``progress`` says."""
        path = self.path / "progress"
        try:
            return int(read_bytes(path, LONGEST_PROGRESS))
        except FileNotFoundError:
            return 0
        except (OSError, DamagedFile, ValueError) as error:
            say(f"{path}: holds no step, so a lost checkpoint would not be noticed ({error})")
            return 0

    def require_progress(self, step: int) -> None:
        """Raise if a checkpoint above ``step``, the newest that is there, was saved and is gone.

        Raises:
            CheckpointError: say, the file system of ``checkpoints/`` is not mounted.
        """
        saved, there = self.progress(), max([step, *steps_set_aside(self.path)])
        if saved > there:
            found = f"the newest checkpoint is of step {step}" if step else "there is none"
            raise CheckpointError(
                f"{self.path}: step {saved} was saved (says the file progress), but in "
                f"{self.path / CHECKPOINTS} {found}. Mount or restore that folder; or, to go on "
                f"from step {step}, remove {self.path / 'progress'}."
            )

    def require_in_place(self) -> None:
        """Raise RunFolderError if the folder was removed, or its lock, since this run opened it."""
        if not self._lock.is_in_place():
            raise RunFolderError(
                f"run.dir ({self.path}): the folder was moved or removed, or its .lock, while this "
                "run wrote it; another run may be writing there. This run ends and writes nothing "
                "more. To resume it, put the folder back, end other runs of it, and run the same "
                "command again."
            )

    def require_own(self, found: checkpoint.Checkpoint) -> None:
        """Raise if a checkpoint is of another run than this folder's and those it comes from.

        Raises:
            CheckpointError: it was copied or moved here.
        """
        if (run_id := found.state["run_id"]) not in self.identity.ids:
            raise CheckpointError(
                f"{found.path}: is of run {run_id}, but run.json says {self.identity.id}. "
                "Move it away; to train on from another run, start a new one with run.dir=... and "
                "run.fork=THAT_RUN."
            )

    def _acquire_lock(self) -> FileLock:
        lock = FileLock(self.path / ".lock")
        if not lock.acquire(wait=False):
            holder = lock.holder() or "another process"
            lock.close()
            raise RunFolderError(
                f"run.dir ({self.path}): in use by {holder}; "
                "wait for that run to end or choose another folder with run.dir=..."
            )
        lock.write_holder(f"process {os.getpid()} on {socket.gethostname()}\n")
        return lock

    def _refuse_files_of_others(self) -> None:
        """Raise if the folder is no run's, but has files that a run would overwrite."""
        if (self.path / "run.json").exists() or committed(self.path):
            return
        theirs = [name for name in WRITTEN if (self.path / name).exists()]
        if theirs:
            raise RunFolderError(
                f"run.dir ({self.path}): has no run in it (run.json is missing), but the run would "
                f"overwrite its {' and '.join(theirs)}; choose another folder with run.dir=..."
            )

    def _fork(self, config: Config) -> None:
        """Copy the newest checkpoint of ``run.fork`` into a folder that has none."""
        source = Path(config.run.fork).expanduser()
        parent, own = read_identity(source), read_identity(self.path)
        if committed(self.path):
            if parent is None or own is None or parent.id not in own.ids:
                raise ConfigError(
                    f"run.fork ({source}): run.dir ({self.path}) has checkpoints that do not come "
                    "from there; leave run.fork out to resume them, or choose another run.dir."
                )
            return
        try:
            found, damaged = checkpoint.read_newest(source)
        except OSError as error:
            raise ConfigError(
                f"run.fork ({source}): cannot be read: {error.strerror}. Give the folder of a run."
            ) from None
        if parent is None or found is None:
            fault = damage_of(source) or "must be the folder of a run with checkpoints"
            raise ConfigError(f"run.fork ({source}): {fault}.")
        for reason in damaged.values():
            say(f"run.fork ({source}): damaged checkpoint passed over: {reason}")
        _check_networks(config, found.state, f"run.fork ({source})")
        self.identity = own or new_identity(self.path, parent)
        self.identity.write()  # first: a checkpoint of another run must not come alone
        final = folder_of(self.path, CHECKPOINTS, found.state["step"])
        with checkpoint.new_folder(final) as partial:
            shutil.copytree(found.path, partial, dirs_exist_ok=True)

    def _check_configuration(self, config: Config, state: Mapping[str, Any]) -> None:
        """Raise if the newest checkpoint has another configuration.

        The first checkpoint of a copy is its original's. There every key outside ``model`` may
        change, with a line; and the keys of ``ACCEPTABLE`` with ``run.accept_changes``.
        """
        before = state.get("config") or self._configuration_of_an_old_run()
        changed = fixed_differences(before, config, state.get("stream"))
        if not changed:
            return
        own, accepts = state["run_id"] == self.identity.id, config.run.accept_changes
        if not own:
            _check_networks(config, state, f"run.dir ({self.path})")
        refused = [k for k in changed if own and not (accepts and k.startswith(ACCEPTABLE))]
        if not refused:
            listed = "\n  ".join(changed)
            return say(f"{self.path}: changed from step {state['step']} on:\n  {listed}")
        listed, hint = "\n  ".join(refused), ""
        if all(line.startswith(ACCEPTABLE) for line in refused):
            hint = "run.accept_changes=true to go on with the new ones, or "
        raise ConfigError(
            f"run.dir ({self.path}) belongs to a run with another configuration:\n  {listed}\n"
            f"Set the values back to resume it, or {hint}start a new run with run.dir=... "
            f"(with run.fork={self.path} from this one's newest checkpoint)."
        )

    def _configuration_of_an_old_run(self) -> dict[str, Any]:
        """Return the keys of config.yaml: early checkpoints have no configuration."""
        path = self.path / "config.yaml"
        try:
            return flatten(load(path, saved=True))
        except ConfigError as error:
            raise RunFolderError(
                f"{path}: the configuration this run was started with cannot be read: {error}"
            ) from None


def _check_networks(config: Config, state: Mapping[str, Any], field: str) -> None:
    """Raise if a checkpoint is of other networks than the configuration."""
    changed = fixed_differences(state.get("config", {}) or flatten(config), config)
    if listed := [line for line in changed if line.startswith("model.")]:
        raise ConfigError(
            f"{field}: its checkpoint is of other networks:\n  "
            + "\n  ".join(listed)
            + "\nSet the values back, or start without run.fork."
        )
