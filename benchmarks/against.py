"""Compare the loader's speed with that of another commit: what do checks of the data cost?

    python benchmarks/against.py --against c3a4210     # before shards were checked while read

Both read the same shards, which the other commit packs, with two workers, as uint8. Rounds
alternate; each is a fresh process. The first epoch is measured on its own, since shards are
compared with their checksums in it. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
ROUND = """
import json, sys, time
sys.path[:0] = ["benchmarks", "."]
import psutil, loader
index = loader.read_index(sys.argv[1])
batches = loader.our_batches(index, int(sys.argv[2]), floats=False)
for _ in range(loader.WARM_UP):
    next(batches)
busy = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = []
for images in (index.num_samples, int(sys.argv[3]) * index.num_samples):
    began, cpu = time.perf_counter(), loader.cpu_seconds(busy)
    for _ in range(images // loader.BATCH):
        next(batches)
    spent = time.perf_counter() - began
    found.append((images / spent, (loader.cpu_seconds(busy) - cpu) / images * 1e6))
print(json.dumps(found))
"""


def in_tree(tree: Path, *words: str) -> str:
    """Run Python in a checkout, with its own modules; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Return median (lowest to highest) of the ratios of the rounds, in percent."""
    found = [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    return f"{median(found):+.1f} % ({min(found):+.1f} to {max(found):+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="c3a4210", help="the other commit")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--epochs", type=int, default=20, help="after the first")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other, data = Path(folder, "other"), Path(folder, "data")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--quiet", "--detach", str(other), options.against], check=True
        )
        try:
            source = ["fashion-mnist", "--out", str(data), "--size", "64", "--channels", "3"]
            in_tree(other, "-m", "pipeline.prepare", *source, "--shard-mib", "64")
            words = ["-c", ROUND, str(data), str(options.workers), str(options.epochs)]
            rounds = []
            for number in range(options.rounds):
                rounds.append([json.loads(in_tree(tree, *words)) for tree in (ROOT, other)])
                print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    print(
        f"{commit} against {options.against}, {options.rounds} alternating rounds, npy 64x64x3.\n"
    )
    print("| | images/s | other commit | images/s, difference | CPU time an image, difference |")
    print("|---|---|---|---|---|")
    for k, name in enumerate(("first epoch", f"the next {options.epochs}")):
        (rates, costs), (their_rates, their_costs) = (
            zip(*(one[who][k] for one in rounds), strict=True) for who in (0, 1)
        )
        print(
            f"| {name} | {median(rates):,.0f} | {median(their_rates):,.0f} "
            f"| {ratio(list(rates), list(their_rates))} | {ratio(list(costs), list(their_costs))} |"
        )


if __name__ == "__main__":
    main()
