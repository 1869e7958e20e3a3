"""Write rows and grids for TensorBoard from a daemon thread, beside metrics.jsonl and W&B.

    tensorboard --logdir runs

As with W&B (``wandb_log``), training never waits for it and no fault of it ends a run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.schema import Config
from pipeline.runs.wandb_log import COMPLETE_FILES, QUEUE_ROWS, STEP_KEY, Picture
from pipeline.runtime.console import say
from pipeline.runtime.errors import ConfigError

FOLDER = "tensorboard"
"""Folder in the run folder, with one folder for each job type."""


def require_package(config: Config) -> None:
    """Raise ConfigError if ``tracking.tensorboard`` is set and TensorBoard is not installed."""
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard (true): needs the package tensorboard. Install it: "
            "pip install tensorboard"
        )


class TensorBoardLog:
    """TensorBoard's files of one process, behind a bounded queue; no method raises or waits long.

    A resume hides the rows after its checkpoint that the process before it wrote.

    Args:
        config: says whether there are such files, and where.
        job_type: ``train`` or ``eval``.
        start_step: steps done, for ``train``.
    """

    def __init__(self, config: Config, job_type: str = "train", start_step: int = 0) -> None:
        self._folder = Path(config.run.dir).expanduser() / FOLDER / job_type
        self._first = (start_step and start_step + 1) if job_type == "train" else None
        self._timeout, self._dropped = config.tracking.timeout, 0
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._thread: threading.Thread | None = None
        if config.tracking.tensorboard:
            self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Queue a row, which holds ``train/step``. Drops it if the queue is full; never waits."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait up to ``tracking.timeout`` seconds until all rows are written."""
        if self._thread is None:
            return
        deadline = time.monotonic() + self._timeout
        if self._thread.is_alive():  # it has ended if it failed
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=self._timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() or self._dropped:
            say(f"TensorBoard was too slow: the last rows or some are missing.{COMPLETE_FILES}")
        self._thread = None

    def _work(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            writer = SummaryWriter(str(self._folder), purge_step=self._first)
            while (row := self._queue.get()) is not None:
                self._write(writer, row)
            writer.close()
        except Exception as error:  # of any kind: none of them may end a run
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            say(f"TensorBoard failed, going on without it.{COMPLETE_FILES} [{reason}]")

    @staticmethod
    def _write(writer: Any, row: Mapping[str, Any]) -> None:
        step = row[STEP_KEY]
        for key, value in row.items():
            if isinstance(value, Picture):
                with Image.open(value.path) as image:
                    pixels = np.asarray(image)
                layout = "HW" if pixels.ndim == 2 else "HWC"
                writer.add_image(key, pixels, step, dataformats=layout)
            elif key != STEP_KEY and value is not None:
                writer.add_scalar(key, value, step)
        writer.flush()
