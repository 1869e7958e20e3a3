"""How much D learned: its features as input of a linear classifier (Radford et al., section 5.1).

    python -m pipeline.prepare fashion-mnist --split test --out data/test-32 --size 32 --channels 1
    python -m pipeline.evaluate probe --run runs/demo --test data/test-32
    python -m pipeline.evaluate probe --run runs/demo --test data/test-32 --num-train 0   # all

A linear SVM is trained on the labelled images of data.shards and tested on others, with the
features of D, with those of a D that was never trained, and with bare pixels. The difference of
the rows is what the adversarial training brought. Needs scikit-learn (extra ``probe``).
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime import signals
from pipeline.runtime.errors import CheckpointError, EvaluationError, exit_on_user_error

if TYPE_CHECKING:
    from torch import nn

    from pipeline.config.schema import Config, ModelConfig
    from pipeline.data.shards import Index
    from pipeline.runs.checkpoint import Checkpoint


def probe(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure what the command line names; returns the table and the figures as JSON."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise EvaluationError(
            "probe: needs scikit-learn; install with: pip install 'dcgan-pipeline[probe]'"
        )
    # torch takes seconds to import; --help and a mistyped path answer without it.
    from pipeline.papers.linear_probe import (
        Outcome,
        check_memory,
        conv_features,
        labelled,
        pixels,
        set_batchnorm_statistics,
    )
    from pipeline.papers.linear_probe import probe as measure
    from pipeline.runtime.files import check_output_path

    if options.out is not None:
        options.out = check_output_path(options.out)
    config, found, trained, random = open_pair(options.run, options.checkpoint, options.seed)
    sources = {
        "--train": open_shards("--train", options.train or config.data.shards, config.model),
        "--test": open_shards("--test", options.test, config.model),
    }
    seen = found.state.get("stream", {}).get("fingerprint")
    if sources["--test"].fingerprint in (sources["--train"].fingerprint, seen):
        raise EvaluationError(
            f"--test ({options.test}): must hold images that neither D nor the SVM learns from, "
            "but these are the training images; prepare others, like fashion-mnist --split test."
        )
    counts = (options.num_train, options.num_test)
    (train, train_labels), (test, test_labels) = (
        labelled(index, count, options.seed, field, config.data)
        for (field, index), count in zip(sources.items(), counts, strict=True)
    )
    for network in (trained, random):
        set_batchnorm_statistics(network, train)
    check_memory(len(train), len(test), conv_features(trained, train[:1]).shape[1])
    outcomes: list[Outcome] = []
    for name, D in (("D", trained), ("random D", random), ("pixels", None)):
        begun = time.monotonic()
        features = [
            conv_features(D, images) if D is not None else pixels(images)
            for images in (train, test)
        ]
        ready = (features[0], train_labels), (features[1], test_labels)
        outcomes.append(measure(name, *ready, options.C))
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    lines = [f"{'features':<10}{'numbers':>9}{'C':>8}{'accuracy':>10}{'s.e.':>8}"]
    for one in outcomes:
        late = "" if one.converged else "  (not converged)"
        error = (one.accuracy * (1 - one.accuracy) / len(test)) ** 0.5
        lines.append(
            f"{one.name:<10}{one.dim:>9}{one.C:>8g}{one.accuracy:>10.2%}{error:>8.2%}{late}"
        )
    lines.append(f"{found.path.name}; {len(train)} training, {len(test)} test images")
    document = {
        "checkpoint": str(found.path.name),
        "train_images": len(train),
        "test_images": len(test),
        "seed": options.seed,
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    return "\n".join(lines), document


def open_shards(field: str, location: str, model: ModelConfig) -> Index:
    """The index of shards whose images D takes.

    Raises:
        DataError: no shards there, or images of another shape.
    """
    from pipeline.data.shards import read_index

    index = read_index(location, field=field)
    index.require_shape(model.image_shape, field)
    return index


def open_pair(
    run: Path, folder: Path | None, seed: int
) -> tuple[Config, Checkpoint, nn.Module, nn.Module]:
    """(configuration, checkpoint, its D, a D with first weights), the networks on the CPU.

    Args:
        run: the run folder.
        folder: of the checkpoint; None = the newest.
        seed: of the first weights.

    Raises:
        EvaluationError: no run there, or one of an MLP.
        CheckpointError: no checkpoint, or one that cannot be used.
    """
    from pipeline.config.loading import load
    from pipeline.models.dcgan import init_weights, make_discriminator
    from pipeline.models.noise import rng
    from pipeline.runs import checkpoint

    if not (run / "config.yaml").is_file():
        raise EvaluationError(f"--run ({run}): holds no config.yaml; give a run folder.")
    config = load(run / "config.yaml")
    if config.model.architecture != "dcgan":
        raise EvaluationError(f"--run ({run}): this run's D has no convolutional layers.")
    found, damaged = (checkpoint.read(folder), []) if folder else checkpoint.read_newest(run)
    for line in damaged:
        print(f"damaged checkpoint passed over: {line}", file=sys.stderr, flush=True)
    if found is None:
        raise CheckpointError(
            f"--run ({run}): no checkpoint there; D is not in a snapshot. Training writes one "
            "after train.checkpoint_every steps."
        )
    trained, random = make_discriminator(config.model), make_discriminator(config.model)
    try:
        trained.load_state_dict(found.weights["D"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{found.path}: D cannot be used: {error}.") from None
    init_weights(random, rng(seed, "probe"))
    return config, found, trained, random


def parse(words: list[str]) -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="run folder")
    add("--checkpoint", type=Path, metavar="DIR", help="this one of checkpoints/ (the newest)")
    add("--test", required=True, metavar="SHARDS", help="labelled shards to test on")
    add("--train", metavar="SHARDS", help="labelled shards to learn from (data.shards)")
    add("--num-train", type=int, default=5000, help="training images, 0 = all (5000)")
    add("--num-test", type=int, default=0, help="test images, 0 = all (0)")
    add(
        "--C",
        default="0.3,1,3,10",
        metavar="C,...",
        help="the SVM's, (0.3,1,3,10); of several, held-out images choose",
    )
    add("--seed", type=int, default=0, help="of the choice of images and of the random D (0)")
    add("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args(words)
    for name, low, high in (
        ("num_train", 0, 2**40),
        ("num_test", 0, 2**40),
        ("seed", 0, 2**63 - 1),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            field = name.replace("_", "-")
            parser.error(f"--{field} ({value}): must be between {low} and {high}")
    try:
        options.C = [float(word) for word in options.C.split(",")]
    except ValueError:
        options.C = []
    if not options.C or not all(0 < C < float("inf") for C in options.C):
        parser.error("--C: must be positive numbers, like 1 or 0.3,1,3")
    return options


def main(words: list[str]) -> None:
    """Parse the command line and probe; exit code 2 on a user's mistake."""
    options = parse(words)
    with exit_on_user_error(), signals.exit_on_interrupt("interrupted: nothing was written"):
        table, figures = probe(options)
        print(table, flush=True)
        if options.out is not None:
            from pipeline.runtime.files import write_results

            write_results({options.out: json.dumps(figures, indent=1).encode()})


if __name__ == "__main__":
    main(sys.argv[1:])
