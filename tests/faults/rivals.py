"""Two commands on one folder at once: one waits, is refused or shares the work; nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from random import Random

from base import Case, Verdict, check_always, last_line
from world import World

PAIRS = (
    ("train-on", "train-on"),
    ("train-new", "train-new"),
    ("train-on", "evaluate"),
    ("train-on", "generate-new"),
    ("train-on", "train-fork"),
    ("train-on", "doctor"),
    ("train-cached", "train-cached-too"),
    ("evaluate", "evaluate"),
    ("evaluate", "evaluate-raw"),
    ("evaluate-fresh", "evaluate-fresh"),
    ("generate-new", "generate-new"),
    ("generate-half-npz", "generate-half-npz"),
    ("generate-half-png", "generate-half-png"),
    ("prepare-made", "prepare-made"),
    ("prepare-rest", "prepare-rest"),
    ("prepare-made-0", "prepare-made-1"),
    ("index-tars", "index-tars"),
    ("verify", "prepare-new"),
    ("grid", "grid"),
)
TIMES = 4
BUSY = ("in use", "is being", "another", "exists already", "is working")


def cases(world: World) -> Iterator[Case]:
    for first, second in PAIRS:
        for k in range(TIMES):
            yield Case("rivals", first, f"{first} and {second}:{k}", partial(run, first, second))


def run(first: str, second: str, world: World, random: Random) -> Verdict:
    last = {"prepare-made-0": "prepare-made"}.get(first, first)
    world.baseline(last)
    world.restore()
    began = time.time()
    rivals = [world.start(first)]
    time.sleep(random.choice([0, 0.01, 0.05, random.uniform(0, 0.4)]))
    rivals.append(world.start(second))
    refused = 0
    for rival in rivals:
        ended = rival.wait()
        if (bad := check_always(world.at, ended, began)) is not None:
            return bad
        if ended.code:
            refused += 1
            if "error: " not in ended.output or not any(word in ended.output for word in BUSY):
                return Verdict("names no file", last_line(ended.output))
    if refused == 2:
        return Verdict("half-written", "both are refused")
    after = world.again(last)
    return Verdict("detected", "one is refused") if refused and after.kind == "harmless" else after
