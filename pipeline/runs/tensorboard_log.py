"""Write rows and grids for TensorBoard from a daemon thread, beside metrics.jsonl and W&B.

    tensorboard --logdir runs

As with W&B (``wandb_log``), training never waits for it and no fault of it ends a run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.schema import Config
from pipeline.runs.row_queue import Row, RowQueue
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
        self._timeout, self._rows = config.tracking.timeout, RowQueue(QUEUE_ROWS)
        if config.tracking.tensorboard:
            self._rows.start(self._work, "tensorboard")

    def log(self, row: Row) -> None:
        """Queue a row, which holds ``train/step``. Drops it if the queue is full; never waits."""
        self._rows.put(row)

    def close(self) -> None:
        """Wait up to ``tracking.timeout`` seconds until all rows are written."""
        if self._rows.is_open and (not self._rows.close(self._timeout) or self._rows.dropped):
            say(f"TensorBoard was too slow: the last rows or some are missing.{COMPLETE_FILES}")

    def _work(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            writer = SummaryWriter(str(self._folder), purge_step=self._first)
            while (row := self._rows.take()) is not None:
                self._write(writer, row)
            writer.close()
        except Exception as error:  # of any kind: none of them may end a run
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            say(f"TensorBoard failed, going on without it.{COMPLETE_FILES} [{reason}]")

    @staticmethod
    def _write(writer: Any, row: Row) -> None:
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
