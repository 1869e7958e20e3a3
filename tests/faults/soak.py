"""Training, and an evaluation that watches it, for many minutes: memory, files and disk stay flat.

In the first half nothing disturbs them. In the second half one of them is killed every few seconds
and started again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median

from base import Case, Process, Verdict, check_always, last_line
from world import World

minutes = 20.0
NAMES = ("train-soak", "evaluate-soak")
EVERY = 2.0
"""Seconds between two looks."""
SLACK = 24 << 20
"""Bytes by which memory and disk may grow, besides a twentieth."""


def cases(world: World) -> Iterator[Case]:
    yield Case("soak", "soak", "soak", run)


def run(world: World, random: Random) -> Verdict:
    world.restore()
    began = time.time()
    running = {name: world.start(name) for name in NAMES}
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in NAMES}
    disk: list[int] = []
    half, strike = time.monotonic() + minutes * 30, 0.0
    while time.monotonic() < half + minutes * 30:
        time.sleep(EVERY)
        disk.append(size_of(world.at / "soak"))
        disturbed = time.monotonic() > half
        if disturbed and time.monotonic() > strike:
            running[random.choice(NAMES)].kill()
            strike = time.monotonic() + random.uniform(2, 12)
        for name in NAMES:
            if running[name].poll():
                if (bad := ended_badly(world, running[name], began)) is not None:
                    return bad
                running[name] = world.start(name)
            elif not disturbed:
                rows[name].append(use_of(running[name].pid))
    for process in running.values():
        process.kill()
    for name, found in rows.items():
        for what, numbers in zip(
            ("bytes of memory", "open files"), zip(*found, strict=True), strict=True
        ):
            if (grown := growth(numbers)) is not None:
                return Verdict("hang, signal, memory", f"{name}: {what} grew {grown}")
    if (grown := growth(disk)) is not None:
        return Verdict("half-written", f"the disk grew {grown}")
    return Verdict("harmless", f"{len(disk)} looks; disk {disk[-1]} bytes")


def ended_badly(world: World, process: Process, began: float) -> Verdict | None:
    ended = process.wait()
    if ended.code == -9:  # this suite's
        return None
    bad = check_always(world.at, ended, began)
    return bad or (Verdict("names no file", last_line(ended.output)) if ended.code else None)


def growth(numbers: tuple[int, ...] | list[int]) -> str | None:
    """Return from and to what a series grew between its second and its last quarter."""
    quarter = len(numbers) // 4
    if quarter < 2:
        return None
    before, after = median(numbers[quarter : 2 * quarter]), median(numbers[-quarter:])
    slack = SLACK if after > 1 << 16 else 4
    return f"from {before:.0f} to {after:.0f}" if after > before * 1.05 + slack else None


def use_of(pid: int) -> tuple[int, int]:
    """Return the bytes in memory and the open files of a process and its children."""
    memory = files = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (str(pid), *children):
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            memory += pages * os.sysconf("SC_PAGE_SIZE")
            files += len(list(Path(f"/proc/{one}/fd").iterdir()))
    except OSError:  # it ended just now
        pass
    return memory, files


def size_of(folder: Path) -> int:
    """Return the bytes in a folder, without the logs that grow by design."""
    total = 0
    for path in folder.rglob("*"):
        if path.suffix not in (".jsonl", ".txt"):
            try:
                total += path.lstat().st_size
            except FileNotFoundError:
                continue
    return total
