"""Read what a report says of a run from the files of its folder, also while the run writes them."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.loading import load
from pipeline.config.schema import Config, flatten
from pipeline.runs.alarms import ENDS, read_alarms
from pipeline.runs.identity import read_identity
from pipeline.runs.results import Row, read_rows
from pipeline.runtime.documents import DamagedFile, parse_rows, read_bytes
from pipeline.runtime.errors import ConfigError, RunFolderError

STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)", re.S)
ROUTINE = re.compile(r"step \d+[/:]|command: |commit |host |Traceback| ")
"""Lines of log.txt that are no events: metrics, scores, what was started, details."""
HARDWARE = re.compile(r"  (.+?), \w+; batch of \d+ = (\d+) rank")
MOST_EVENTS, LONGEST_EVENT = 60, 500


@dataclass(frozen=True)
class Series:
    """One value of a run over its steps, in order.

    Args:
        steps: the steps.
        hours: wall time since the run's first row, in hours; gaps between its parts count.
        values: the values, finite.
    """

    steps: list[int]
    hours: list[float]
    values: list[float]


@dataclass(frozen=True)
class RunFacts:
    """What a report says of a run.

    Args:
        name: what the report calls it.
        path: the folder.
        config: the configuration.
        status: ``finished``, ``preempted``, ``collapsed`` or "", in which case it runs or was
            killed.
        rows: the rows of metrics.jsonl by step, without damaged ones.
        scores: the rows of evaluations.jsonl that count, by step.
        hardware: devices and ranks of the last start; "" = unknown.
        events: (time, text) of starts, resumes, accepted changes, damage, errors, ends.
        alarms: of ``train.watch``, each in a few words.
    """

    name: str
    path: Path
    config: Config
    status: str
    rows: list[dict[str, Any]]
    scores: list[Row]
    hardware: str
    events: list[tuple[str, str]] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Return the last step with a row; 0 without any."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def keys(self) -> dict[str, Any]:
        """Return the configuration as ``{"section.key": value}``, without the folder."""
        return {key: v for key, v in flatten(self.config).items() if key != "run.dir"}

    def throughput(self) -> float | None:
        """Return the median of the real images per second over all rows; None = not measured."""
        found = [row["perf/images_per_sec"] for row in self.rows if _is_number(row, SPEED)]
        return statistics.median(found) if found else None

    def series(self) -> dict[str, Series]:
        """Return the curve of each value in metrics.jsonl and evaluations.jsonl by its key.

        A score's key has its protocol, for scores of different protocols are not compared.
        """
        begin = next((row["time"] for row in self.rows if _is_number(row, "time")), 0.0)
        found: dict[str, Series] = {}

        def add(key: str, step: int, seconds: float, value: float) -> None:
            curve = found.setdefault(key, Series([], [], []))
            curve.steps.append(step)
            curve.hours.append(max(0.0, seconds - begin) / 3600)
            curve.values.append(value)

        times = {row["step"]: row["time"] for row in self.rows if _is_number(row, "time")}
        for row in self.rows:
            for key in row:
                if key not in ("step", "time", "progress/kimg") and _is_number(row, key):
                    add(key, row["step"], times.get(row["step"], begin), float(row[key]))
        for row in self.scores:
            before = [step for step in times if step <= row["step"]]
            seconds = times[max(before)] if before else begin
            for key, value in row["scores"].items():
                if value is not None:
                    add(f"{key} [{row['protocol'][:8]}]", row["step"], seconds, float(value))
        return found


SPEED = "perf/images_per_sec"


def read_run(path: Path, name: str) -> RunFacts:
    """Return what the files of a run's folder say; ``name`` is what the report calls it.

    A damaged or half-written line of a file is left out.

    Raises:
        RunFolderError: it is not the folder of a run.
        UserError: one of its files cannot be read.
    """
    try:
        if not (path / "config.yaml").is_file():
            raise RunFolderError(
                f"RUN ({path}): is not the folder of a run: it has no config.yaml. Give folders "
                "that pipeline.train wrote, such as runs/*."
            )
        rows = _metrics(path / "metrics.jsonl")
        events, hardware = _read_log(path / "log.txt")
        marks = [mark for mark in ENDS if (path / mark).exists()]
        alarms = [alarm.title for alarm in read_alarms(path)]
    except OSError as error:
        raise RunFolderError(
            f"RUN ({path}): cannot be read: {error.strerror or error}. Give read permission."
        ) from None
    try:
        config = load(path / "config.yaml", saved=True)
    except ConfigError as error:
        raise RunFolderError(f"RUN ({path}): its configuration cannot be used: {error}") from None
    identity = read_identity(path)
    if identity is not None and identity.origin is not None:
        events.insert(0, ("", f"copied or forked from run {identity.origin.id}"))
    for set_aside in sorted(path.glob("checkpoints/*.damaged*")):
        events.append(("", f"damaged checkpoint set aside: {set_aside.name}"))
    return RunFacts(
        name=name,
        path=path,
        config=config,
        status=marks[0].lower() if marks else "",
        rows=rows,
        scores=sorted(read_rows(path), key=lambda row: int(row["step"])),
        hardware=hardware,
        events=events,
        alarms=alarms,
    )


def differing(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Return the configuration keys that differ, each with its value in every run.

    Of one run, these are the keys that differ from their defaults.
    """
    trees: list[Mapping[str, Any]] = [run.keys for run in runs]
    compared = [*trees, flatten(Config())] if len(trees) == 1 else trees
    return {
        key: [tree[key] for tree in trees]
        for key in trees[0]
        if any(tree[key] != trees[0][key] for tree in compared)
    }


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the undamaged rows of metrics.jsonl by step; [] without the file."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return []
    found = (row for _, _, row in parse_rows(content, {"step": int}, path))
    by_step = {row["step"]: row for row in found if not isinstance(row, DamagedFile)}
    return [by_step[step] for step in sorted(by_step)]


def _read_log(path: Path) -> tuple[list[tuple[str, str]], str]:
    """Return the events in log.txt, and the hardware of the last start; both empty without it."""
    try:
        lines = read_bytes(path).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return [], ""
    entries: list[tuple[str, str]] = []
    for line in lines:
        if match := STAMP.fullmatch(line):
            entries.append((match[1], match[2]))
        elif entries:  # a message of several lines
            entries[-1] = (entries[-1][0], f"{entries[-1][1]}\n{line}")
    started = [match for _, text in entries if (match := HARDWARE.match(text))]
    hardware = f"{started[-1][2]} x {started[-1][1]}" if started else ""
    events = [
        (at, text[:LONGEST_EVENT].rstrip(":")) for at, text in entries if not ROUTINE.match(text)
    ]
    return events[-MOST_EVENTS:], hardware


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e300  # no NaN either


def written_at(run: RunFacts) -> str:
    """Return the local time of the last row, for a reader who asks whether the run still runs."""
    if not run.rows or not _is_number(run.rows[-1], "time"):
        return ""
    with suppress(OverflowError, OSError, ValueError):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.rows[-1]["time"]))
    return ""
