"""Measure what large batches do to quality: equal images, with three rules for the learning rates.

    python benchmarks/batches.py --work runs/batches                  # hours on two cores

The demo's networks and images. A batch k times that of ``configs/demo.yaml`` takes a k-th of the
steps, with its rates as they are, times the square root of k (Malladi et al. 2022, arXiv
2205.10287, for Adam) or times k. BatchNorm always sees 64 images, as with 64 a GPU, and the average
of G has the same half-life in images. The last snapshot is scored. Finished runs are not repeated.
Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ablation import CONFIG, experiments, said, score, shards
from loader import machine

from pipeline.config.loading import load
from pipeline.data.shards import read_index

BATCHES = (64, 512, 4096)
RULES = {"as they are": 0.0, "x square root of k": 0.5, "x k": 1.0}
EMA_KIMG = 4.4  # the half-life of the demo's decay of 0.99 at its batch of 64


def variants(images: int) -> dict[str, list[str]]:
    """Return the options of each run, by batch and rule."""
    base, found = load(CONFIG), {}
    for batch in BATCHES:
        k = batch / BATCHES[0]
        for rule, power in RULES.items() if k > 1 else [("as they are", 0.0)]:
            rates = base.optim.g_lr * k**power, base.optim.d_lr * k**power
            found[f"{batch} | {rule}"] = [
                *(f"data.batch_size={batch}", f"train.total_steps={max(1, images // batch)}"),
                *(f"optim.g_lr={rates[0]:.4g}", f"optim.d_lr={rates[1]:.4g}"),
                *(f"train.micro_batch={BATCHES[0]}", f"train.ema_kimg={EMA_KIMG}"),
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="folder of data and runs; kept")
    add("--images", type=int, default=114688, help="images of a run (114688: 28 steps of 4096)")
    add("--seeds", type=int, default=2)
    add("--jobs", type=int, default=2, help="runs at a time, of one thread each (2)")
    add("--only", nargs="*", type=int, default=BATCHES, metavar="BATCH")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    reference = read_index(str(shards(work, "train"))).fingerprint
    chosen = variants(options.images)
    chosen = {k: v for k, v in chosen.items() if int(k.partition(" ")[0]) in options.only}
    budget = {"seeds": options.seeds, "steps": options.images, "jobs": options.jobs}
    folders = experiments(work, chosen, set(), **budget)
    print(machine())
    print(f"{options.images} images, {options.seeds} seeds, mean ± std; 2,000 images against")
    print("10,000, features of the demo's `eval.extractor`.\n")
    print("| batch | rates | steps | FD | KID |\n|---|---|---|---|---|")
    for name in chosen:
        scores = [score(folders[name, seed], "ema", reference) for seed in range(options.seeds)]
        fd, kid = said([one.fd for one in scores]), said([one.kid for one in scores], 3)
        print(f"| {name} | {options.images // int(name.partition(' ')[0])} | {fd} | {kid} |")


if __name__ == "__main__":
    main()
