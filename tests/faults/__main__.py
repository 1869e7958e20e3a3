"""Do real harm to the pipeline, and print what came of it: a table of harms and verdicts.

    python tests/faults                                    # a sample of every part
    python tests/faults --part mutations --sample 500 --seed 3
    python tests/faults --all --write                      # every case; docs/reliability.md
    python tests/faults --part soak --minutes 20
    python tests/faults --part hostile --only "zip: bomb:prepare-zip"    # one case, by its name

Exit code 1 if a verdict is bad. Each bad case is printed with the command that reproduces it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout's own pipeline

import base
import report
from base import BAD, Case, Verdict
from world import World, new_world

PARTS = {
    "mutations": 350,
    "hostile": 250,
    "fuzz": 200,
    "server": 24,
    "starvation": 90,
    "kills": 50,
    "rivals": 20,
    "soak": 0,
}
"""The parts, with the number of cases in a sample."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    add("--sample", type=int, help="number of cases of each part")
    add("--all", action="store_true", help="every case")
    add("--seed", type=int, default=0, help="seed of the sample and of every harm")
    add("--only", help="the case with this name")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="cases at the same time")
    add("--minutes", type=float, default=20.0, help="length of the soak")
    add("--write", action="store_true", help="write the table into docs/reliability.md")
    add("--verbose", action="store_true", help="print each case")
    options = parser.parse_args()
    parts = options.part or [part for part in PARTS if PARTS[part] or options.all]
    began = time.monotonic()
    base.warm_up()
    import_module("soak").minutes = options.minutes
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for job in range(1 if options.only else options.jobs):
            if (pid := os.fork()) == 0:
                work(job, parts, options, Path(folder, str(job)))
            workers.append(pid)
        failed = [os.waitpid(pid, 0)[1] for pid in workers]
        counts: Counter[tuple[str, str]] = Counter()
        for file in Path(folder).iterdir():
            counts.update(tuple(json.loads(line)) for line in file.read_text().splitlines())
    text = report.table(parts, counts)
    print(text)
    print(f"{counts.total()} cases in {time.monotonic() - began:.0f} s")
    if options.write:
        report.write(text, options.seed)
    bad = sum(counts[part, kind] for part in parts for kind in BAD)
    sys.exit(1 if bad or any(failed) or not counts else 0)


def work(job: int, parts: list[str], options: argparse.Namespace, file: Path) -> None:
    """Run every n-th of the chosen cases in a world of this process, and end it."""
    code = 1
    try:
        with new_world() as world, file.open("w", buffering=1) as out:
            for part in parts:
                every = list(import_module(part).cases(world))
                for case in chosen(every, options, PARTS[part])[job :: options.jobs]:
                    start = time.monotonic()
                    verdict = attempt(case, world, options.seed)
                    out.write(json.dumps([part, verdict.kind]) + "\n")
                    tell(case, verdict, options, time.monotonic() - start)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def chosen(cases: list[Case], options: argparse.Namespace, sample: int) -> list[Case]:
    """Return the cases to run: all, one by name, or a seeded sample with some of every harm."""
    if options.only:
        return [case for case in cases if case.name == options.only]
    order = Random(options.seed).sample(cases, len(cases))
    if options.all:
        return order
    turn: Counter[str] = Counter()
    ranked = []
    for place, case in enumerate(order):  # the first of each harm, the second of each, ...
        turn[case.harm] += 1
        ranked.append((turn[case.harm], place, case))
    ranked.sort(key=lambda one: one[:2])
    return [case for _, _, case in ranked[: options.sample or sample]]


def attempt(case: Case, world: World, seed: int) -> Verdict:
    try:
        return case.run(world, Random(f"{seed}:{case.name}"))
    except Exception as error:  # the suite's own: it must be mended, so it counts as bad
        traceback.print_exc()
        return Verdict("traceback", f"of the suite: {error!r}")


def tell(case: Case, verdict: Verdict, options: argparse.Namespace, seconds: float) -> None:
    lines = []
    if verdict.kind in BAD:
        again = f"python tests/faults --part {case.part} --seed {options.seed} --only"
        lines = [
            f"{verdict.kind.upper()}: {verdict.detail}",
            f"    {again} {shlex.quote(case.name)}",
        ]
    if options.verbose or options.only:
        lines.append(f"{seconds:5.2f} {case.name}: {verdict.kind}: {verdict.detail}")
    if lines:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
