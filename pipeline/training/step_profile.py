"""Profile steps of a run: a trace for chrome://tracing or Perfetto, and a table of operators."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.config.schema import Config
from pipeline.runtime.console import say
from pipeline.runtime.errors import RunFolderError
from pipeline.runtime.files import write_atomic
from pipeline.training.meter import Meter

FOLDER = "profile"
"""Folder of the files, in the run folder."""
ROWS = 40
"""Operators in the table."""


class StepProfile:
    """The profile of ``train.profile_steps`` on rank 0. It changes nothing that is computed.

    The time that the profiler needs to start and to write its files counts as upkeep.

    Args:
        config: names the steps and the run folder.
        accelerator: the ranks.
        meter: counts the upkeep.
        step: steps done: none of them is profiled. A resume after the last one profiles nothing.
    """

    def __init__(self, config: Config, accelerator: Accelerator, meter: Meter, step: int) -> None:
        first, last = config.train.profile_steps or (0, 0)
        self._first = max(first, step + 1)
        self._last = min(last, config.train.total_steps) if accelerator.is_main_process else 0
        self._folder = Path(config.run.dir).expanduser() / FOLDER
        self._on_gpu, self._meter = accelerator.device.type == "cuda", meter
        self._profiler: profile | None = None
        self._mark: record_function | None = None

    def begin(self, step: int) -> None:
        """Note that a step begins: the profiler starts before the first of the steps."""
        if self._profiler is None and step == self._first <= self._last:
            with self._meter.upkeep():
                if not self._on_gpu:  # else the profiler says in two lines that there is no GPU
                    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
                gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
                self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
                self._profiler.start()
        if self._profiler is not None:
            self._mark = record_function(f"step {step}")
            self._mark.__enter__()

    def end(self, step: int, *, stopping: bool = False) -> None:
        """Note that a step has ended: the files are written after the last.

        Args:
            step: its number.
            stopping: whether no step follows: what was profiled so far is written.

        Raises:
            RunFolderError: the trace is incomplete.
            OSError: a file cannot be written.
        """
        self._unmark()
        if self._profiler is not None and (stopping or step >= self._last):
            with self._meter.upkeep():
                self._write(step)

    def close(self) -> None:
        """End the profiler of a run that failed, without files."""
        self._unmark()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _unmark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _write(self, step: int) -> None:
        assert self._profiler is not None
        done, self._profiler = self._profiler, None
        done.stop()
        path = self._folder / f"steps_{self._first}-{step}.json"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / path.name
            done.export_chrome_trace(str(file))
            trace = file.read_bytes()
        if not trace.rstrip().endswith(b"}"):  # the exporter raises nothing on a full disk
            raise RunFolderError(
                f"train.profile_steps: the trace of steps {self._first} to {step} did not fit into "
                f"{tempfile.gettempdir()}. Make room there, or set TMPDIR to another folder; then "
                "run the same command again."
            )
        sums = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=sums, row_limit=ROWS)
        self._folder.mkdir(exist_ok=True)
        write_atomic(path.with_suffix(".txt"), table.encode())
        write_atomic(path, trace)
        say(f"profile of steps {self._first} to {step}: {path}, and a table in {path.stem}.txt")
