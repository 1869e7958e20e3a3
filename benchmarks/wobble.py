"""How much do scores wobble with the choice of images, and what does N change?

    python benchmarks/wobble.py --shards data/fashion-mnist-32                  # two minutes
    python benchmarks/wobble.py --shards data/fashion-mnist-32 --checkpoint SNAPSHOT

Compares sets of N real images with --reference other real ones: a G that has learnt the data scores
like this. With --checkpoint the sets are of a G, one for each seed. Mean and standard deviation are
over --repeats disjoint sets, or seeds. The features are EfficientNet-Lite0's, layer of 320 numbers.

Prints Markdown for docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from accelerate import Accelerator
from loader import machine
from torch import Tensor

from pipeline.config.schema import DataConfig, EvalConfig
from pipeline.data.shards import read_index
from pipeline.evaluation import neighbours
from pipeline.evaluation.candidates import generated_images, real_images
from pipeline.evaluation.extraction import extract
from pipeline.evaluation.extractors import MOST_FEATURES, load_extractor
from pipeline.evaluation.metrics import kid, mind
from pipeline.evaluation.moments import FeatureSet, frechet_distance, statistics_of
from pipeline.models.sampling import Images
from pipeline.runs.generators import open_generator
from pipeline.runtime.signals import Agreement

LAYER, BATCH, CPU = "320", 64, torch.device("cpu")


def scores_of(real: Tensor, found: Tensor, radii: Tensor) -> dict[str, float]:
    """Compute the scores of a set of features, (N, 320), against the real ones."""
    near = neighbours.compare(found, real, radii, CPU)
    return {
        "FD": frechet_distance(statistics_of(real), statistics_of(found)),
        "KD": kid(found, real, min(1000, len(found) // 2))[0],
        "MIND": mind(found, real, CPU),
        "precision": near.precision,
        "recall": near.recall,
        "coverage": near.coverage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True)
    parser.add_argument("--checkpoint", default="", help="G to score instead of real images")
    parser.add_argument("--reference", type=int, default=4000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    accelerator, largest = Accelerator(cpu=True), max(options.sizes)
    settings = EvalConfig(extractor="efficientnet-lite0", layer=LAYER, precision="auto")
    extractor = load_extractor(settings, accelerator)

    def features(images: Images, count: int, first: int = 0) -> Tensor:
        rows, agreement = FeatureSet(LAYER, MOST_FEATURES), Agreement(1)
        parts = [(extractor, rows.add)]
        extract(
            lambda a, b: images(first + a, first + b), count, parts, accelerator, BATCH, agreement
        )
        print(f"{count} images", file=sys.stderr, flush=True)
        return rows.features

    index = read_index(options.shards)
    total = options.reference + options.repeats * largest
    images = real_images(index, DataConfig(), total)
    real = features(images, options.reference)
    if options.checkpoint:
        opened = open_generator(options.checkpoint)
        sets = [
            features(generated_images(opened.G, opened.model, seed), largest)
            for seed in range(options.repeats)
        ]
    else:
        starts = range(options.reference, total, largest)
        sets = [features(images, largest, start) for start in starts]
    radii = neighbours.radii(real, CPU)

    print(machine(), f"{options.repeats} sets against {options.reference} real images.\n")
    lines = []
    for size in options.sizes:
        found = [scores_of(real, rows[:size], radii) for rows in sets]
        cells = []
        for name in found[0]:
            values = [scores[name] for scores in found]
            cells.append(f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    print(f"| N | {' | '.join(found[0])} |\n|---:|{'---:|' * len(found[0])}", *lines, sep="\n")


if __name__ == "__main__":
    main()
