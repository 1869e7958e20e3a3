"""A run's folder: owned by one run at a time, bound to one configuration, with markers for scripts.

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
from pipeline.runtime.errors import ConfigError, RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.locks import FileLock

IDENTITY = "run.json"


def saved_precision(config: Config) -> str | None:
    """The arithmetic this run was started with, when the configuration leaves it to the hardware.

    A run that began in bf16 must not go on in fp32 because it was requeued on another machine.
    """
    if config.train.precision != "auto":
        return config.train.precision
    try:
        identity = json.loads((Path(config.run.dir).expanduser() / IDENTITY).read_text())
        return str(identity["precision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RunFolder:
    """The open folder of a run; used by rank 0 only.

    Raises:
        RunFolderError: it cannot be written, or another run holds it.
        ConfigError: it belongs to a run with another configuration.
    """

    def __init__(self, config: Config, precision: str) -> None:
        self.path = Path(config.run.dir).expanduser()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._bind(config)
            self.id = self._identify(config, precision)
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
        """Remove a marker file that is no longer true."""
        (self.path / name).unlink(missing_ok=True)

    def _take_lock(self) -> FileLock:
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

    def _identify(self, config: Config, precision: str) -> str:
        path = self.path / IDENTITY
        try:
            name = str(json.loads(path.read_text())["id"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            name = make_run_id(config)
        write_atomic(path, json.dumps({"id": name, "precision": precision}).encode())
        return name

    def _bind(self, config: Config) -> None:
        path = self.path / "config.yaml"
        # Until something is trained there is nothing that another configuration could spoil.
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
    """A new W&B run id: the run folder's name and six random characters, e.g. ``first-3fa9c1``.

    ``WANDB_RUN_ID`` wins: a sweep agent sets it. Keep the id with the checkpoint: the same id
    continues the same W&B run.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(config.run.dir).name)[:64].strip("-") or "run"
    return os.environ.get("WANDB_RUN_ID") or f"{name}-{secrets.token_hex(3)}"


CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


def committed(run_dir: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """Whole folders of a run, oldest first; ``kind`` is ``CHECKPOINTS`` or ``SNAPSHOTS``."""
    found = (run_dir / kind).glob("step_*")
    return sorted((p for p in found if p.name.removeprefix("step_").isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    """The step in a folder's name."""
    return int(path.name.removeprefix("step_"))


def folder_of(run_dir: Path, kind: str, step: int) -> Path:
    """Where what belongs to ``step`` is, or will be."""
    return run_dir / kind / f"step_{step:08d}"
