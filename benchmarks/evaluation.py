"""Compare the evaluation with torch-fidelity, with a repetition, and measure its time.

    python benchmarks/evaluation.py                      # about two minutes
    python benchmarks/evaluation.py --run runs/demo --num-images 5000

Without --run it trains configs/demo.yaml for twenty steps. The samples are noise, but they take as
long as others and must get the same scores.

1. Parity: every score of a snapshot by the evaluation with 1 and with 2 processes, and by
   ``torch_fidelity.calculate_metrics`` on the same images, which computes the mean of FID, KID and
   distances in float32. The differences between 1 and 2 processes must be 0.
2. Repeat: the evaluation with 1 process a second time, to the last digit.
3. Time of one snapshot with 1 and 2 processes, and the share of it that is not the forward pass of
   the extractor (generating, gathering, scores). Start-up is listed apart, and so is the reference:
   ours is computed once per data set. ``calculate_metrics`` is given images that are ready, and
   extracts the features of both sides; start-up is not in its time either.

Prints Markdown for benchmarks/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from loader import machine
from pictures import fashion_mnist, prepare
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.runtime import launch

REPO = Path(__file__).resolve().parents[1]
STEPS = 20
NAMES = {
    "frechet_inception_distance": "fid",
    "inception_score_mean": "is",
    "inception_score_std": "is_std",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}


class Rows(Dataset[Tensor]):
    """Images (N, H, W, C) uint8 as a data set of torch-fidelity."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.images[row]).permute(2, 0, 1).expand(3, -1, -1).contiguous()

    def __len__(self) -> int:
        return len(self.images)


def short_run(folder: Path, images: int) -> Path:
    """Train the demo's network for a few steps on ``num_images`` images; return the run folder."""
    source, run = fashion_mnist(images, folder / "idx"), folder / "run"
    shards = prepare(source, folder / "shards", 32, "npy", channels=1).location
    settings = [f"data.shards={shards}", f"run.dir={run}", f"train.total_steps={STEPS}"]
    settings += ["train.sample_every=0", "tracking.wandb=disabled"]
    command = [sys.executable, "pipeline/train.py", "--config", "configs/demo.yaml", *settings]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    return run


def evaluate(run: Path, processes: int, words: list[str], threads: int) -> dict[str, Any]:
    """Run ``worker`` in processes with so many threads each; return the result of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", port, "--"]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [*launcher, __file__, "--worker", str(out), "--run", str(run), *words]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        found: dict[str, Any] = json.loads(out.read_text())
    found["start"] = found["began"] - began
    return found


def worker(out: Path, run: Path, words: list[str]) -> None:
    """Score the newest snapshot with the evaluation's own objects; rank 0 writes the result."""
    from pipeline.config.loading import load
    from pipeline.evaluation import candidates
    from pipeline.evaluation.extractors import Extractor
    from pipeline.evaluation.scorer import Scorer

    config = load(run / "config.yaml", words, saved=True)
    accelerator: Accelerator = launch.make_accelerator("fp32")
    evaluator = Scorer(config, accelerator)
    evaluator.load_reference()
    forward = [0.0]
    original = Extractor.__call__

    def timed(self: Extractor, *arguments: Any) -> dict[str, Tensor]:
        start = time.perf_counter()
        found = original(self, *arguments)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        forward[0] += time.perf_counter() - start
        return found

    Extractor.__call__ = timed  # type: ignore[method-assign]
    accelerator.wait_for_everyone()
    began, clock = time.time(), time.perf_counter()
    candidate = candidates.find_in_run(run, config.eval.weights)[-1]
    G, model = candidates.open_generator(candidate, run, config.eval.weights, accelerator.device)
    (scores,) = evaluator.score(
        candidates.generated_images(G, model, config.eval.seed), "benchmark"
    )
    seconds = time.perf_counter() - clock
    if accelerator.is_main_process:
        found = {"scores": scores, "seconds": seconds, "forward": forward[0], "began": began}
        out.write_text(json.dumps(found))
    evaluator.close()
    accelerator.end_training()


def by_torch_fidelity(run: Path, words: list[str]) -> tuple[dict[str, float], float]:
    """Time ``calculate_metrics`` on images of the newest snapshot and the real ones."""
    from torch_fidelity import calculate_metrics

    from pipeline.config.loading import load
    from pipeline.evaluation import candidates
    from pipeline.evaluation.scorer import Scorer

    config = load(run / "config.yaml", words, saved=True)
    evaluator = Scorer(config, launch.make_accelerator("fp32"))
    protocol, extractor = evaluator.protocol, evaluator.extractor
    count = protocol.reference.reference_images
    device = evaluator.accelerator.device
    candidate = candidates.find_in_run(run, config.eval.weights)[-1]
    G, model = candidates.open_generator(candidate, run, config.eval.weights, device)
    options: dict[str, Any] = {}
    if extractor.precision == "bf16":
        options["feature_extractor_internal_dtype"] = "bfloat16"
    if config.eval.extractor_weights:
        options["feature_extractor_weights_path"] = config.eval.extractor_weights
    fake = Rows(candidates.generated_images(G, model, config.eval.seed)(0, protocol.num_images))
    real = Rows(candidates.real_images(evaluator.index, config.data, count)(0, count))
    began = time.perf_counter()
    found = calculate_metrics(
        input1=fake,
        input2=real,
        cuda=device.type == "cuda",
        batch_size=config.eval.batch_size,
        isc="is" in protocol.metrics,
        fid="fid" in protocol.metrics,
        kid=True,
        prc=True,
        feature_extractor={"inception": "inception-v3-compat"}.get(extractor.name, extractor.name),
        kid_subset_size=protocol.kid_subset_size,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
        **{f"feature_layer_{metric}": extractor.layer for metric in ("fid", "kid", "prc")},
        **options,
    )
    seconds = time.perf_counter() - began
    return {protocol.key(NAMES[k]): v for k, v in found.items() if k in NAMES}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder; default: train a short run")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.run, options.overrides)
    with tempfile.TemporaryDirectory() as folder:
        run, overrides = options.run, options.overrides
        if run is None:
            run = short_run(Path(folder), options.num_images)
            overrides = [f"eval.cache_dir={folder}", *overrides]
        print(report(run, options.num_images, overrides))


def report(run: Path, count: int, overrides: list[str]) -> str:
    words = [f"eval.num_images={count}", f"eval.reference_images={count}", *overrides]
    cores = torch.get_num_threads()
    one = evaluate(run, 1, words, cores)  # computes the reference before its clock starts
    runs = {
        "1": evaluate(run, 1, words, cores),
        "2": evaluate(run, 2, words, max(1, cores // 2)),
    }
    # numpy's linear algebra rounds by its number of threads: compare equal numbers of threads.
    two = evaluate(run, 2, words, cores)
    theirs, seconds_of_theirs = by_torch_fidelity(run, words)
    shown = [
        machine(),
        f"{count} images against {count}.",
        "",
        "| score | calculate_metrics | 1 process | 2 processes | repeated |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, value in theirs.items():
        found = [which["scores"][name] for which in (runs["1"], two, one)]
        cells = " | ".join(f"{mine - value:+g}" for mine in found)
        shown.append(f"| {name} | {value!r} | {cells} |")
    shown += ["", "| processes | start, s | seconds | images/s | not the forward pass |"]
    shown += ["|---|---:|---:|---:|---:|"]
    for processes, found in runs.items():
        seconds, share = found["seconds"], 1 - found["forward"] / found["seconds"]
        pace = count / seconds
        shown.append(
            f"| {processes} | {found['start']:.1f} | {seconds:.1f} | {pace:.0f} | {share:.1%} |"
        )
    shown.append(f"| calculate_metrics | | {seconds_of_theirs:.1f} | | |")
    return "\n".join(shown)


if __name__ == "__main__":
    main()
