"""Log a training run: metrics.jsonl and sample grids always, W&B and a progress bar beside them.

Each row is on disk before it is sent to W&B. Training never waits for W&B (``wandb_log``).
"""

from __future__ import annotations

import bisect
import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.config.schema import Config
from pipeline.runs.tensorboard_log import TensorBoardLog
from pipeline.runs.wandb_log import STEP_KEY, Alert, Picture, WandbLog
from pipeline.runtime.console import FIRST_LINE, eta, say
from pipeline.runtime.documents import (
    DamagedFile,
    append_rows,
    parse_rows,
    read_bytes,
    set_lines_aside,
)
from pipeline.runtime.errors import RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.log_file import open_to_append


class MetricsLog:
    """The log of a training run on rank 0; every method is cheap next to a training step.

    A resumed run truncates ``metrics.jsonl`` to its checkpoint, so the file has each step at most
    once. Rows in W&B cannot be removed, so steps after the checkpoint are logged there twice, with
    the same ``train/step``. Both times the values are the same, except perf/*, so the curves over
    ``train/step`` coincide. (W&B's own ``_step`` is not set: it must grow, and ``wandb sync``
    renumbers offline folders.)
    """

    def __init__(self, config: Config, run_id: str, start_step: int, total_steps: int) -> None:
        """Open the files and start W&B in the background.

        Args:
            config: the run's configuration, all of which becomes the W&B config.
            run_id: the W&B run id from ``make_run_id``; a resume passes the same one.
            start_step: steps already done, 0 for a new run; rows of later steps are removed.
            total_steps: the last step, for the progress bar and the time left.

        Raises:
            RunFolderError: the run folder is read-only or full.
        """
        self.run_dir = Path(config.run.dir).expanduser()
        self._start, self._total = start_step, total_steps
        self._path = self.run_dir / "metrics.jsonl"
        with _raise_run_folder_error(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with _raise_run_folder_error(self._path):
            self._last_step = _rewind(self._path, start_step)
            # Unbuffered: when log() returns, the kernel has the row and no kill can lose it.
            self._file = open_to_append(self._path)
        self._began, self._may_tell = time.monotonic(), True
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._wandb = WandbLog(config, run_id)
        self._tensorboard = TensorBoardLog(config, start_step=start_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row; ``step`` must grow from call to call.

        NaN and infinity become ``null`` in metrics.jsonl, because JSON has neither.

        Raises:
            RunFolderError: the disk is full or the folder became read-only.
        """
        assert step > self._last_step, f"step {step} after {self._last_step}: one row per step"
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: v if math.isfinite(v) else None for key, v in numbers.items()}
        row = {"step": step, **finite, "time": round(time.time(), 3)}
        with _raise_run_folder_error(self._path):
            append_rows(self._file, [row])
        self._last_step, self._may_tell = step, False
        self._send({STEP_KEY: step, **numbers})
        self._print_progress(step, numbers)

    def images(self, step: int, grid: NDArray[np.uint8]) -> Path:
        """Write ``samples/step_0000100.png`` atomically, log it to W&B and return its path.

        Args:
            step: the step of the weights that generated the images.
            grid: (H, W), (H, W, 1) or (H, W, 3) uint8.

        Raises:
            RunFolderError: the disk is full or the folder became read-only.
        """
        content = io.BytesIO()
        pixels = grid[:, :, 0] if grid.ndim == 3 and grid.shape[2] == 1 else grid
        # Level 1 takes a fifth of the default's time; the files are a few per cent larger.
        Image.fromarray(np.ascontiguousarray(pixels)).save(content, "png", compress_level=1)
        path = self.run_dir / "samples" / f"step_{step:07d}.png"
        with _raise_run_folder_error(path):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content.getvalue())
        self._send({STEP_KEY: step, "samples/grid": Picture(path, f"step {step}")})
        return path

    def alert(self, step: int, title: str, text: str) -> None:
        """Send an alert to W&B, which mails it or posts it where its user wants that."""
        self._wandb.log({STEP_KEY: step, "watch/alert": Alert(title, text)})

    def _send(self, row: dict[str, Any]) -> None:
        self._wandb.log(row)
        self._tensorboard.log(row)

    def advance(self, step: int) -> None:
        """Move the progress bar; without a terminal, print one line before the first row is due."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif self._may_tell and time.monotonic() - self._began > FIRST_LINE:
            self._may_tell = False
            self._print_progress(step, {})

    def close(self, failed: bool = False) -> None:
        """Close the files and wait up to ``tracking.timeout`` seconds for W&B.

        Args:
            failed: mark the W&B run as failed instead of finished.
        """
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._wandb.close(failed)
        self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _print_progress(self, step: int, values: Mapping[str, float]) -> None:
        """Update the progress bar; print one line if stderr is not a terminal."""
        shown = {k: f"{v:.4g}" for k, v in values.items() if k.startswith(("loss/", "scores/"))}
        if self._bar is not None:
            self.advance(step)
            self._bar.set_postfix(shown)
            return
        parts = [f"step {step}/{self._total}", *(f"{k} {v}" for k, v in shown.items())]
        if "perf/images_per_sec" in values:
            parts.append(f"{values['perf/images_per_sec']:.0f} img/s")
        pace = (time.monotonic() - self._began) / max(1, step - self._start)
        say("  ".join([*parts, eta((self._total - step) * pace)]))


class NullMetricsLog(MetricsLog):
    """The log of the other ranks, which writes no files and prints nothing."""

    def __init__(self, config: Config) -> None:
        self.run_dir = Path(config.run.dir).expanduser()

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, grid: NDArray[np.uint8]) -> Path:
        return self.run_dir / "samples" / f"step_{step:07d}.png"

    def alert(self, step: int, title: str, text: str) -> None: ...

    def advance(self, step: int) -> None: ...

    def close(self, failed: bool = False) -> None: ...


def _rewind(path: Path, start_step: int) -> int:
    """Remove the rows after ``start_step``; return the last step kept, or -1.

    Damaged lines are moved to a file beside it. So are rows whose step does not fit those around
    them; rows of early versions have no check. The file is replaced atomically.

    Raises:
        DamagedFile: it is no regular file.
    """
    try:
        before = read_bytes(path)
    except FileNotFoundError:
        return -1
    steps: list[int] = []
    lines: list[bytes] = []
    damaged: list[bytes] = []
    for _, line, row in parse_rows(before, {"step": int}, path):
        if isinstance(row, DamagedFile):
            damaged.append(line)
            say(f"{row}; moved to {path.name}.damaged")
        else:
            steps.append(row["step"])
            lines.append(line)
    growing = _longest_growing(steps)
    for misplaced in sorted(set(range(len(steps))) - set(growing)):
        damaged.append(lines[misplaced])
        step = steps[misplaced]
        say(f"{path}: the row of step {step} is misplaced; moved to {path.name}.damaged")
    kept = [k for k in growing if steps[k] <= start_step]
    if damaged:
        set_lines_aside(path, damaged)
    if (after := b"".join(lines[k] for k in kept)) != before:
        write_atomic(path, after)
    return steps[kept[-1]] if kept else -1


def _longest_growing(steps: Sequence[int]) -> list[int]:
    """Return the indices of the longest strictly increasing subsequence."""
    last: list[int] = []  # for each length, the index at which the lowest such sequence ends
    previous: list[int] = []
    for index, step in enumerate(steps):
        length = bisect.bisect_left(last, step, key=lambda k: steps[k])
        previous.append(last[length - 1] if length else -1)
        last[length : length + 1] = [index]
    found: list[int] = []
    index = last[-1] if last else -1
    while index >= 0:
        found.append(index)
        index = previous[index]
    return found[::-1]


@contextlib.contextmanager
def _raise_run_folder_error(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a RunFolderError that names ``path``."""
    try:
        yield
    except DamagedFile as error:
        raise RunFolderError(f"{error}. Move it away, then run the same command again.") from None
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written: {error.strerror or error}. Free space, or set run.dir to "
            "a writable folder, and run the same command again: it resumes."
        ) from None
