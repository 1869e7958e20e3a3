"""Time and memory of each metric at N against N images, and our values beside independent ones.

    python benchmarks/metrics.py                          # 50,000 against 50,000
    python benchmarks/metrics.py --num-images 2000 --random-features    # seconds
    python benchmarks/metrics.py --random-features --layer 2048 --metrics fid kid mind
    PYTHONPATH=/tmp/peers python benchmarks/metrics.py --num-images 2000 --random-features

Images are squares of random position and size on noise of two strengths: the values mean nothing,
but every computation takes as long as with other images. The features are those of
EfficientNet-Lite0; with --random-features they are correlated normal numbers instead, drawn in no
time. The memory is the largest resident size of the process during the step, with both sets of
features in it. The second table compares 800 rows with 800, in float64, with scipy, with
torch-fidelity's own functions, and with prdc and pytorch-fid where they are installed:

    pip install --no-deps --target /tmp/peers prdc pytorch-fid scikit-learn joblib threadpoolctl

Prints Markdown for benchmarks/evaluation.md.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.stats
import torch
from accelerate import Accelerator
from loader import machine
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.config.schema import EvalConfig
from pipeline.evaluation import memorization, neighbours
from pipeline.evaluation.extraction import extract
from pipeline.evaluation.extractors import MOST_FEATURES, load_extractor
from pipeline.evaluation.metrics import kid, mind
from pipeline.evaluation.moments import FeatureSet, frechet_distance, statistics_of
from pipeline.runtime.signals import Agreement

SIZE, COMPARED, BATCH = 32, 1600, 64
METRICS = ("fid", "kid", "prc", "mind", "memorization")
Values = dict[str, float]


def images(seed: int, noise: int) -> Callable[[int, int], NDArray[np.uint8]]:
    """Return a set of gray images of which each is a function of its number."""

    def one(row: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng([seed, row])
        pixels = rng.integers(0, noise, (SIZE, SIZE, 1), dtype=np.uint8)
        top, left, side = rng.integers(0, SIZE // 2, 3)
        pixels[top : top + side + 4, left : left + side + 4] += np.uint8(rng.integers(50, 150))
        return pixels

    return lambda start, stop: np.stack([one(row) for row in range(start, stop)])


class Clock:
    """Seconds of each step, and the largest memory of the process during it."""

    def __init__(self) -> None:
        self.lines = [
            "| step | seconds | CPU seconds | peak of the process, MiB |",
            "|---|---:|---:|---:|",
        ]

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        began, used = time.perf_counter(), time.process_time()
        found = work()
        seconds, used = time.perf_counter() - began, time.process_time() - used
        status = Path("/proc/self/status").read_text()
        peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024
        self.lines.append(f"| {name} | {seconds:.1f} | {used:.1f} | {peak:.0f} |")
        print(self.lines[-1], file=sys.stderr, flush=True)
        return found


def random_rows(seed: int, count: int, dim: int) -> dict[str, Tensor]:
    """Return correlated normal numbers as the features of a layer."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(9)
    mixing = same.normal(0, 0.3, (16, dim)).astype(np.float32)
    rows = rng.standard_normal((count, dim), np.float32) + np.float32(seed / 10)
    rows += rng.standard_normal((count, 16), np.float32) @ mixing
    return {str(dim): torch.from_numpy(rows)}


def time_all(
    count: int, layer: str, is_random: bool, metrics: Sequence[str]
) -> tuple[list[str], Tensor, Tensor]:
    """Run every step of an evaluation at ``count`` against ``count``; return also the features."""
    accelerator, clock = Accelerator(), Clock()
    device = accelerator.device
    config = EvalConfig(extractor="efficientnet-lite0", layer=layer, num_images=count)
    extractor: Any = None
    if not is_random:
        extractor = clock.run("load the extractor", lambda: load_extractor(config, accelerator))
    sets = []
    for seed, (name, noise) in enumerate((("real", 60), ("generated", 70))):
        found = FeatureSet(layer, MOST_FEATURES, with_statistics="fid" in metrics)
        step = f"features of {count} {name} images, with mean and covariance"
        parts = [(extractor, found.add)]
        source = images(seed, noise)
        work: Any = partial(extract, source, count, parts, accelerator, BATCH, Agreement(1))
        if is_random:
            step = f"mean and covariance of {count} rows" if "fid" in metrics else "keep the rows"
            work = partial(found.add, random_rows(seed, count, int(layer)))
        clock.run(step, work)
        sets.append(found)
    real, generated = sets[0].features, sets[1].features
    if "fid" in metrics:
        a, b = (found.statistics() for found in sets)
        clock.run("`fid`", lambda: frechet_distance(a, b))
    sets.clear()
    size = min(1000, len(real) // 2)
    if "kid" in metrics:
        clock.run("`kid`", lambda: kid(generated, real, size))
    if "prc" in metrics:
        radii = clock.run("radii of the real images", lambda: neighbours.radii(real, device))
        near = partial(neighbours.compare, generated, real, radii, device)
        clock.run("`prc` and `density_coverage`", near)
    if "mind" in metrics:
        clock.run("`mind`", lambda: mind(generated, real, device))
    if "memorization" in metrics:
        clock.run("`memorization`", lambda: memorization.nearest(generated, real, device))
    return clock.lines, real, generated


def ours(real: Tensor, generated: Tensor, held_out: Tensor) -> Values:
    cpu = torch.device("cpu")
    near = neighbours.compare(generated, real, neighbours.radii(real, cpu), cpu)
    matches = [memorization.nearest(x, real, cpu).distances[:, 0] for x in (generated, held_out)]
    mean, deviation = kid(generated, real, len(real) // 2)
    return {
        "FD": frechet_distance(statistics_of(real), statistics_of(generated)),
        "KD": mean,
        "KD, deviation": deviation,
        "precision": near.precision,
        "recall": near.recall,
        "density": near.density,
        "coverage": near.coverage,
        "memorization": memorization.memorization(*matches)["memorization"],
    }


def by_scipy(real: Tensor, generated: Tensor, held_out: Tensor) -> Values:
    x, y, h = (v.double().numpy() for v in (real, generated, held_out))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(a @ b))
    q, p = cdist(y, x).min(1), cdist(h, x).min(1)
    share = scipy.stats.mannwhitneyu(p, q).statistic / (len(p) * len(q))
    moved = np.square(x.mean(0) - y.mean(0)).sum()
    return {"FD": float(moved + np.trace(a + b - 2 * root)), "memorization": float(share)}


def by_torch_fidelity(real: Tensor, generated: Tensor, _: Tensor) -> Values:
    x, y = real.double(), generated.double()
    fid = fid_statistics_to_metric(
        fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False
    )
    options = {"kid_subsets": 100, "kid_subset_size": len(real) // 2, "verbose": False}
    mean, deviation = kid_features_to_metric(y, x, **options).values()
    prc = prc_features_to_metric(y, x, save_cpu_ram=True, verbose=False)
    values = [*fid.values(), mean, deviation, prc["precision"], prc["recall"]]
    names = ("FD", "KD", "KD, deviation", "precision", "recall")
    return dict(zip(names, map(float, values), strict=True))


def by_prdc(real: Tensor, generated: Tensor, _: Tensor) -> Values:
    compute: Any = import_module("prdc").compute_prdc
    x, y = real.double().numpy(), generated.double().numpy()
    three, five = (compute(x, y, nearest_k=k) for k in (3, 5))
    return {k: float(three[k]) for k in ("precision", "recall")} | {
        k: float(five[k]) for k in ("density", "coverage")
    }


def by_pytorch_fid(real: Tensor, generated: Tensor, _: Tensor) -> Values:
    distance: Any = import_module("pytorch_fid.fid_score").calculate_frechet_distance
    x, y = real.double().numpy(), generated.double().numpy()
    pairs = [(v.mean(0), np.cov(v, rowvar=False)) for v in (x, y)]
    return {"FD": float(distance(*pairs[0], *pairs[1]))}


PROGRAMS = {
    "scipy": by_scipy,
    "torch-fidelity": by_torch_fidelity,
    "prdc": by_prdc,
    "pytorch-fid": by_pytorch_fid,
}


def compare(real: Tensor, generated: Tensor) -> list[str]:
    """Return a table of our values and of the differences of others from them."""
    half = len(real) // 2
    sets = real[:half], generated[: 2 * half], real[half : 2 * half]
    mine, theirs, missing = ours(*sets), {}, []
    for name, work in PROGRAMS.items():
        try:
            theirs[name] = work(*sets)
        except ImportError:
            missing.append(name)
    lines = [f"| score | ours | {' | '.join(theirs)} |", f"|---|---:|{'---:|' * len(theirs)}"]
    for score, value in mine.items():
        cells = [f"{v[score] - value:+.1e}" if score in v else "" for v in theirs.values()]
        lines.append(f"| {score} | {value:.8g} | {' | '.join(cells)} |")
    return [*lines, "", f"Not installed: {', '.join(missing) or 'none'}."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=50_000, metavar="N", help="of each set")
    layer = "number of features; 2048, as Inception's, with --random-features only"
    parser.add_argument("--layer", default="320", choices=("320", "1280", "2048"), help=layer)
    random = "draw the features instead of extracting them"
    parser.add_argument("--random-features", action="store_true", help=random)
    parser.add_argument("--metrics", nargs="+", default=METRICS, choices=METRICS)
    options = parser.parse_args()
    count, layer = options.num_images, options.layer
    lines, real, generated = time_all(count, layer, options.random_features, options.metrics)
    print(machine(), f"{count} against {count}, layer {layer}.")
    print("", *lines, "", sep="\n", flush=True)
    if min(len(real), COMPARED) // 2 > int(
        layer
    ):  # otherwise covariances are singular, and scipy's root is coarse
        print(*compare(real[:COMPARED], generated[:COMPARED]), sep="\n")


if __name__ == "__main__":
    main()
