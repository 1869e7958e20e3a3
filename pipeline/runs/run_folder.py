"""The folder of a run: locked by one process, tied to one configuration, with marker files.

runs/<name>/ config.yaml  run.json (id, precision)  metrics.jsonl  samples/  checkpoints/
             snapshots/  wandb/  progress (step of the last checkpoint)  FINISHED | PREEMPTED
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from pathlib import Path

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config, fixed_differences
from pipeline.runs import wandb_names
from pipeline.runtime.errors import ConfigError, RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.locks import FileLock

IDENTITY = "run.json"


def saved_precision(config: Config) -> str | None:
    """Return the configured precision; for ``auto`` the one the run started with, None if new.

    A run that started in bf16 must not continue in fp32 because it was requeued on another machine.
    """
    if config.train.precision != "auto":
        return config.train.precision
    try:
        identity = json.loads((Path(config.run.dir).expanduser() / IDENTITY).read_text())
        return str(identity["precision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RunFolder:
    """The open folder of a run, locked until this process ends; rank 0 only.

    ``id`` is the run's W&B id, ``path`` the folder.

    Args:
        config: the run's configuration; it is written to ``config.yaml``.
        precision: the resolved precision; it is written to ``run.json``.

    Raises:
        RunFolderError: the folder cannot be written, or another process has locked it.
        ConfigError: the folder has checkpoints of another configuration.
    """

    def __init__(self, config: Config, precision: str) -> None:
        if config.tracking.wandb != "disabled":
            wandb_names.require_names()
        self.path = Path(config.run.dir).expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire_lock()
            self._write_config(config)
            self.id = self._write_identity(config, precision)
            self.unmark("PREEMPTED")
        except OSError as error:
            raise RunFolderError(
                f"run.dir ({self.path}): cannot be written ({error.strerror}); "
                "choose another folder with run.dir=... or give write permission."
            ) from None

    def mark(self, name: str, content: str) -> None:
        """Write a marker file that launch scripts read: progress, FINISHED or PREEMPTED."""
        write_atomic(self.path / name, content.encode())

    def unmark(self, name: str) -> None:
        """Remove a marker file."""
        (self.path / name).unlink(missing_ok=True)

    def require_own(self) -> None:
        """Raise RunFolderError if the folder was removed, or its lock, since this run opened it."""
        if not self._lock.is_in_place():
            raise RunFolderError(
                f"run.dir ({self.path}): the folder was moved or removed, or its .lock, while this "
                "run wrote it; another run may be writing there. This run ends and writes nothing "
                "more. To resume it, put the folder back, end other runs of it, and run the same "
                "command again."
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

    def _write_identity(self, config: Config, precision: str) -> str:
        """Write run.json with the id that it holds already, or with a new one; return the id."""
        path = self.path / IDENTITY
        try:
            name = str(json.loads(path.read_text())["id"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            name = make_run_id(config)
        write_atomic(path, json.dumps({"id": name, "precision": precision}).encode())
        return name

    def _write_config(self, config: Config) -> None:
        """Write config.yaml; raise if the folder's checkpoints have another configuration."""
        path = self.path / "config.yaml"
        if path.exists() and committed(self.path):
            try:
                changed = fixed_differences(load(path), config)
            except ConfigError as error:
                raise RunFolderError(
                    f"{path}: the configuration this run was started with cannot be read: {error}"
                ) from None
            if changed:
                listed = "\n  ".join(changed)
                raise ConfigError(
                    f"run.dir ({self.path}) belongs to a run with another configuration:\n  "
                    f"{listed}\nSet the values back to resume it, or start a new run with "
                    "run.dir=..."
                )
        write_atomic(path, dump(config).encode())


def make_run_id(config: Config) -> str:
    """Return a new W&B run id: the folder's name and six random characters, ``first-3fa9c1``.

    ``WANDB_RUN_ID``, which a sweep agent sets, takes precedence. A resume must use the same id to
    continue the same W&B run.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(config.run.dir).name)[:64].strip("-") or "run"
    given = wandb_names.given_id(Path(config.run.dir).expanduser())
    return given or f"{name}-{secrets.token_hex(3)}"


CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


def committed(run_dir: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Return the complete folders of a run by step; ``kind`` is CHECKPOINTS or SNAPSHOTS."""
    folders = (run_dir / kind).glob("step_*")
    return sorted((p for p in folders if p.name.removeprefix("step_").isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a folder's name."""
    return int(path.name.removeprefix("step_"))


def folder_of(run_dir: Path, kind: str, step: int) -> Path:
    """Return the folder of a step's checkpoint or snapshot, which need not exist."""
    return run_dir / kind / f"step_{step:08d}"
