"""What a run says about itself: metrics.jsonl and sample grids always, W&B and progress beside.

The files in the run folder are the truth, and a row is on disk before W&B hears of it. W&B is a
view of them, kept by ``dashboard``, that training never waits for.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.config.schema import Config
from pipeline.runs.wandb_log import STEP_KEY, Picture, WandbLog
from pipeline.runtime.console import say
from pipeline.runtime.errors import RunFolderError
from pipeline.runtime.files import write_atomic


class MetricsLog:
    """Rank 0's record of a training run; every method is cheap next to a training step.

    A resumed run starts with ``metrics.jsonl`` rewound to its checkpoint, so the file holds every
    step at most once. W&B cannot take rows back: steps after the checkpoint are logged to the same
    run again, with the same ``train/step``. The replay computes the same values, so the curves
    over ``train/step`` lie on top of each other; only perf/* differs. (W&B's own ``_step`` is left
    to W&B: it must grow, and offline folders are renumbered by ``wandb sync``.)
    """

    def __init__(self, config: Config, run_id: str, start_step: int, total_steps: int) -> None:
        """Open the files and start W&B in the background.

        Args:
            config: the run's; ``run.dir`` and ``tracking`` are used, all of it is sent to W&B.
            run_id: from ``make_run_id``, the same for the whole life of a run.
            start_step: steps already done, 0 for a new run; later rows are dropped.
            total_steps: where the progress bar ends.

        Raises:
            RunFolderError: the run folder is read-only or full.
        """
        self.run_dir = Path(config.run.dir).expanduser()
        self._start, self._total = start_step, total_steps
        self._path = self.run_dir / "metrics.jsonl"
        with _writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with _writing(self._path):
            self._last_step = _rewind(self._path, start_step)
            # Unbuffered: a row is in the kernel, safe from any kill, when log() returns.
            self._file = self._path.open("ab", buffering=0)
        self._began = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._dashboard = WandbLog(config, run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record one row; ``step`` must grow from call to call.

        A value that is not finite is ``null`` in metrics.jsonl (JSON knows no NaN).

        Raises:
            RunFolderError: the disk is full or the folder became read-only.
        """
        assert step > self._last_step, f"step {step} after {self._last_step}: one row per step"
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: v if math.isfinite(v) else None for key, v in numbers.items()}
        line = json.dumps({"step": step, **finite, "time": round(time.time(), 3)}) + "\n"
        rest = memoryview(line.encode())
        with _writing(self._path):
            while rest:  # a disk that fills up takes a part first and refuses the rest
                rest = rest[self._file.write(rest) :]
        self._last_step = step
        self._dashboard.log({STEP_KEY: step, **numbers})
        self._show(step, numbers)

    def images(self, step: int, grid: NDArray[np.uint8]) -> Path:
        """Write ``samples/step_0000100.png`` (whole or not at all) and show it in W&B.

        Args:
            step: the step whose weights drew the images.
            grid: (H, W), (H, W, 1) or (H, W, 3) uint8.

        Raises:
            RunFolderError: the disk is full or the folder became read-only.
        """
        content = io.BytesIO()
        pixels = grid[:, :, 0] if grid.ndim == 3 and grid.shape[2] == 1 else grid
        # Level 1 takes a fifth of the default's time for a few per cent more bytes.
        Image.fromarray(np.ascontiguousarray(pixels)).save(content, "png", compress_level=1)
        path = self.run_dir / "samples" / f"step_{step:07d}.png"
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content.getvalue())
        self._dashboard.log({STEP_KEY: step, "samples/grid": Picture(path, f"step {step}")})
        return path

    def advance(self, step: int) -> None:
        """Move the progress bar; no file, no W&B, and nothing at all without a terminal."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self, failed: bool = False) -> None:
        """Close the files; wait up to ``tracking.timeout`` seconds for W&B. Never raises for W&B.

        Args:
            failed: mark the W&B run as failed instead of finished.
        """
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._dashboard.close(failed)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        shown = {k: f"{v:.4g}" for k, v in values.items() if k.startswith(("loss/", "scores/"))}
        if self._bar is not None:
            self.advance(step)
            self._bar.set_postfix(shown)
            return
        parts = [f"step {step}/{self._total}", *(f"{k} {v}" for k, v in shown.items())]
        if "perf/images_per_sec" in values:
            parts.append(f"{values['perf/images_per_sec']:.0f} img/s")
        pace = (time.monotonic() - self._began) / max(1, step - self._start)
        left = max(0, round((self._total - step) * pace))
        say("  ".join([*parts, f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"]))


class NullMetricsLog(MetricsLog):
    """The same methods for ranks other than 0: no file, no W&B, no output."""

    def __init__(self, config: Config) -> None:
        self.run_dir = Path(config.run.dir).expanduser()

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, grid: NDArray[np.uint8]) -> Path:
        return self.run_dir / "samples" / f"step_{step:07d}.png"

    def advance(self, step: int) -> None: ...

    def close(self, failed: bool = False) -> None: ...


def _rewind(path: Path, start_step: int) -> int:
    """Drop rows after ``start_step`` and torn lines; returns the last step kept, or -1.

    The file is replaced as a whole: a crash in the middle leaves the old one.
    """
    before = path.read_bytes() if path.exists() else b""
    kept, last = [], -1
    for line in before.splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            step = int(json.loads(line)["step"])
            if line.endswith(b"\n") and last < step <= start_step:
                kept.append(line)
                last = step
    after = b"".join(kept)
    if after != before:
        write_atomic(path, after)
    return last


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written: {error.strerror or error}. Free space, or set run.dir to "
            "a writable folder, and run the same command again: it resumes."
        ) from None
