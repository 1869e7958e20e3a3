"""Measure how sensitive an extractor is to damage: real images, damaged in known ways.

    python benchmarks/extractor.py --shards data/fashion-mnist-32        # about four minutes
    python benchmarks/extractor.py --shards data/fashion-mnist-32 --num-images 2600   # FD of 1280

Disjoint real images give the lowest scores. More noise, blur, dropped classes or repeated images
must raise the Frechet distance and KID. Prints Markdown for benchmarks/evaluation.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.config.schema import EvalConfig
from pipeline.data.cache import Cache
from pipeline.data.reader import Reader
from pipeline.data.shards import Index, read_index
from pipeline.evaluation.candidates import chosen_ids
from pipeline.evaluation.extraction import extract
from pipeline.evaluation.extractors import MOST_FEATURES, Extractor, load_extractor
from pipeline.evaluation.metrics import compute_scores
from pipeline.evaluation.moments import FeatureSet
from pipeline.evaluation.protocol import make_protocol
from pipeline.evaluation.references import make_reference
from pipeline.runtime.signals import Agreement

CPU = torch.device("cpu")

Pixels = np.ndarray
SERIES: dict[str, tuple[float, ...]] = {
    "noise of sigma": (5, 10, 20, 40),
    "blur of radius": (0.5, 0.8, 1.2, 2.0),
    "classes dropped": (1, 3, 5, 8),
    "distinct images, repeated": (200, 50, 20),
}


def read(index: Index, ids: np.ndarray) -> tuple[Pixels, np.ndarray]:
    out = np.empty((len(ids), *index.shape), np.uint8)
    labels = Reader(index, Cache(index, "unused")).read(ids, out)
    return out, labels


def blurred(images: Pixels, radius: float) -> Pixels:
    def one(pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels.squeeze())
        return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).reshape(pixels.shape)

    return np.stack([one(pixels) for pixels in images])


def damaged(kind: str, amount: float, index: Index, ids: np.ndarray, count: int) -> Pixels:
    """Return ``count`` damaged images made from the samples ``ids``."""
    if kind == "classes dropped":
        images, labels = read(index, ids)
        return images[labels >= amount][:count]
    images, _ = read(index, ids[:count])
    if kind == "noise of sigma":
        noise = np.random.default_rng(0).normal(0, amount, images.shape)
        return np.clip(images + noise, 0, 255).round().astype(np.uint8)
    if kind == "blur of radius":
        return blurred(images, amount)
    return np.resize(images[: int(amount)], images.shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", required=True)
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--layers", nargs="+", default=["320", "1280"])
    parser.add_argument("--num-images", type=int, default=700)
    options = parser.parse_args()
    count, accelerator = options.num_images, Accelerator()
    index = read_index(options.shards)
    extractors = {}
    for layer in options.layers:
        config = EvalConfig(
            extractor=options.extractor,
            layer=layer,
            num_images=count,
            reference_images=count,
            precision="auto",
        )
        extractor = load_extractor(config, accelerator)
        extractors[layer] = extractor, make_protocol(config, extractor, index)[0]
    widest = widest_of([extractor for extractor, _ in extractors.values()])

    def features(images: Pixels) -> dict[str, Tensor]:
        rounds: list[dict[str, Tensor]] = []
        extract(
            lambda a, b: images[a:b],
            len(images),
            [(widest, rounds.append)],
            accelerator,
            64,
            Agreement(1),
        )
        return {layer: torch.cat([part[layer] for part in rounds]) for layer in rounds[0]}

    def set_of(found: dict[str, Tensor], layer: str) -> FeatureSet:
        rows = FeatureSet(layer, MOST_FEATURES, with_statistics=True)
        rows.add(found)
        return rows

    # One permutation gives the reference, then disjoint images, enough to drop classes.
    ids = chosen_ids(index.num_samples, min(index.num_samples, 7 * count))
    real = features(read(index, ids[:count])[0])
    others = ids[count:]
    began = time.monotonic()
    rows = {("disjoint real images", ""): features(read(index, others[:count])[0])}
    for kind, amounts in SERIES.items():
        for amount in amounts:
            images = damaged(kind, amount, index, others, count)
            assert len(images) == count, f"{kind} {amount}: too few images"
            rows[kind, f"{amount:g}"] = features(images)
    seconds = time.monotonic() - began

    print(
        f"{options.extractor}, {widest.precision}, {count} images against {count} others; ", end=""
    )
    print(f"{len(rows) * count / seconds:.0f} images a second\n")
    columns = ["FD", "KD", "precision", "recall"]
    heads = [f"{column} {layer}" for layer in extractors for column in columns]
    print(f"| images | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    values: dict[str, dict[tuple[str, str], float]] = {head: {} for head in heads}
    for (kind, amount), found in rows.items():
        cells = []
        for layer, (_, protocol) in extractors.items():
            reference = make_reference(protocol.reference, set_of(real, layer), CPU)
            scores = compute_scores(set_of(found, layer), reference, protocol, CPU)
            for column, name in zip(columns, ("fid", "kid", "precision", "recall"), strict=True):
                value = scores.get(protocol.key(name))
                if value is not None:
                    values[f"{column} {layer}"][kind, amount] = value
                cells.append("-" if value is None else f"{value:.4g}")
        print(f"| {kind} {amount} | {' | '.join(cells)} |", flush=True)
    print()
    for head in heads:
        if head.startswith(("FD", "KD")) and values[head]:
            print(f"{head}: {verdict(values[head])}")


def widest_of(extractors: list[Extractor]) -> Extractor:
    """Extract several layers in one pass through the network."""
    first = extractors[0]
    first.network.features_list = [extractor.layer for extractor in extractors]
    return first


def verdict(values: dict[tuple[str, str], float]) -> str:
    """Say whether every series rises from the score of undamaged images on."""
    floor = values["disjoint real images", ""]
    rising: Callable[[list[float]], bool] = lambda v: all(a < b for a, b in itertools.pairwise(v))  # noqa: E731
    wrong = [
        kind
        for kind, amounts in SERIES.items()
        if not rising([floor, *(values[kind, f"{amount:g}"] for amount in amounts)])
    ]
    return "rises in every series" if not wrong else f"does NOT rise with {', '.join(wrong)}"


if __name__ == "__main__":
    main()
