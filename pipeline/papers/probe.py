"""How much did D learn? Use its features as input of a linear SVM (Radford et al., section 5.1).

    python -m pipeline.prepare fashion-mnist --split test --out data/test-32 --size 32 --channels 1
    python -m pipeline.evaluate probe --run runs/demo --test data/test-32
    python -m pipeline.evaluate probe --run runs/demo --test data/test-32 --num-train 0   # all

The SVM is trained on labelled images of data.shards and tested on other ones. This is done three
times: with the features of the trained D, with those of a D with random weights, and with the bare
pixels. D has learned something if its accuracy is the highest. Needs scikit-learn (extra probe).
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
from pipeline.runtime.arguments import HelpFormatter, integer, seed
from pipeline.runtime.errors import CheckpointError, EvaluationError, exit_on_user_error
from pipeline.runtime.files import exists

if TYPE_CHECKING:
    from torch import nn

    from pipeline.config.schema import Config, ModelConfig
    from pipeline.data.shards import Index
    from pipeline.runs.checkpoint import Checkpoint

MOST_IMAGES = 10**12


def probe(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Train and test the SVM on each kind of features.

    Returns:
        The table to print, and the numbers to write as JSON.

    Raises:
        UserError: run, checkpoint or shards that cannot be used, or scikit-learn is missing.
    """
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise EvaluationError(
            "probe: needs scikit-learn; install with: pip install 'dcgan-pipeline[probe]'"
        )
    # torch takes seconds to import. --help and a mistyped path are answered before that.
    from pipeline.papers.linear_probe import (
        ProbeResult,
        check_memory,
        conv_features,
        pixel_features,
        read_labelled_images,
        set_batchnorm_statistics,
        train_and_test,
    )
    from pipeline.runtime.files import check_output_path

    if options.out is not None:
        options.out = check_output_path(options.out)
    config, found, trained, random = load_discriminators(
        options.run, options.checkpoint, options.seed
    )
    sources = {
        "--train": read_index_for("--train", options.train or config.data.shards, config.model),
        "--test": read_index_for("--test", options.test, config.model),
    }
    training_data = found.state.get("stream", {}).get("fingerprint")
    if sources["--test"].fingerprint in (sources["--train"].fingerprint, training_data):
        raise EvaluationError(
            f"--test ({options.test}): these are training images of D or of the SVM. Prepare "
            "others, e.g. with: python -m pipeline.prepare fashion-mnist --split test"
        )
    counts = (options.num_train, options.num_test)
    (train, train_labels), (test, test_labels) = (
        read_labelled_images(index, count, options.seed, field, config.data)
        for (field, index), count in zip(sources.items(), counts, strict=True)
    )
    for network in (trained, random):
        set_batchnorm_statistics(network, train)
    check_memory(len(train), len(test), conv_features(trained, train[:1]).shape[1])
    results: list[ProbeResult] = []
    for name, D in (("D", trained), ("random D", random), ("pixels", None)):
        start = time.monotonic()
        train_features, test_features = (
            conv_features(D, images) if D is not None else pixel_features(images)
            for images in (train, test)
        )
        results.append(
            train_and_test(
                name, (train_features, train_labels), (test_features, test_labels), options.C
            )
        )
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    lines = [f"{'features':<10}{'numbers':>9}{'C':>8}{'accuracy':>10}{'s.e.':>8}"]
    for result in results:
        remark = "" if result.converged else "  (not converged)"
        error = (result.accuracy * (1 - result.accuracy) / len(test)) ** 0.5
        lines.append(
            f"{result.name:<10}{result.dim:>9}{result.C:>8g}{result.accuracy:>10.2%}{error:>8.2%}"
            f"{remark}"
        )
    lines.append(f"{found.path.name}; {len(train)} training, {len(test)} test images")
    document = {
        "checkpoint": str(found.path.name),
        "train_images": len(train),
        "test_images": len(test),
        "seed": options.seed,
        "outcomes": [vars(result) for result in results],
    }
    return "\n".join(lines), document


def read_index_for(field: str, location: str, model: ModelConfig) -> Index:
    """Read the index of shards and check that D takes their images.

    Args:
        field: option to name in errors.
        location: folder or URL of the shards.
        model: architecture of D.

    Raises:
        DataError: no shards at ``location``, or images of another shape.
    """
    from pipeline.data.shards import read_index

    options = f"--size {model.image_size} --channels {model.channels}"
    index = read_index(location, options, field)
    index.require_shape(model.image_shape, field)
    return index


def load_discriminators(
    run: Path, folder: Path | None, seed: int
) -> tuple[Config, Checkpoint, nn.Module, nn.Module]:
    """Load the trained D of a run, and make one with random weights for comparison.

    Args:
        run: run folder.
        folder: of the checkpoint; None = the newest of the run.
        seed: of the random weights.

    Returns:
        configuration of the run, checkpoint, trained D, random D; both networks on the CPU.

    Raises:
        EvaluationError: ``run`` is not a run folder, or its D is an MLP.
        CheckpointError: there is no usable checkpoint.
    """
    from pipeline.config.loading import load
    from pipeline.config.sizes import discriminator_size
    from pipeline.models.dcgan import init_weights, make_discriminator
    from pipeline.models.noise import rng
    from pipeline.runs import checkpoint

    if not exists(run / "config.yaml"):
        raise EvaluationError(f"--run ({run}): the folder has no config.yaml. Give a run folder.")
    config = load(run / "config.yaml", saved=True)
    if config.model.architecture != "dcgan":
        raise EvaluationError(
            f"--run ({run}): model.architecture is {config.model.architecture}, whose D has no "
            "convolutional layers. Give a run with model.architecture=dcgan."
        )
    found, damaged = (checkpoint.read(folder), {}) if folder else checkpoint.read_newest(run)
    for line in damaged.values():
        print(f"damaged checkpoint passed over: {line}", file=sys.stderr, flush=True)
    if found is None:
        raise CheckpointError(
            f"--run ({run}): the run has no checkpoint. (A snapshot does not contain D.) Training "
            f"writes one every train.checkpoint_every ({config.train.checkpoint_every}) steps."
        )
    if discriminator_size(config.model) > sum(
        v.numel() for v in found.weights.get("D", {}).values()
    ):
        raise CheckpointError(  # before memory is asked for
            f"{found.path}: D cannot be loaded: it is smaller than model in {run}/config.yaml says."
        )
    trained, random = make_discriminator(config.model), make_discriminator(config.model)
    try:
        trained.load_state_dict(found.weights["D"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{found.path}: D cannot be loaded: {error}.") from None
    init_weights(random, rng(seed, "probe"))
    return config, found, trained, random


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``load_discriminators`` and the choice of images need."""
    add = parser.add_argument
    newest = "folder in checkpoints/ to take D from; without it, the newest of the run"
    add("--run", type=Path, required=True, metavar="DIR", help="run folder")
    add("--checkpoint", type=Path, metavar="DIR", help=newest)
    seeded = "seed of the choice of images and of the weights of the random D"
    add("--seed", type=seed, default=0, metavar="N", help=seeded)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate probe``."""
    add_pair_arguments(parser)
    add, count = parser.add_argument, integer(0, MOST_IMAGES)
    add("--test", required=True, metavar="SHARDS", help="labelled shards to test the SVM on")
    train = "labelled shards to train the SVM on; without it, data.shards of the run"
    add("--train", metavar="SHARDS", help=train)
    number = "number of training images; 0 = all"
    add("--num-train", type=count, default=5000, metavar="N", help=number)
    add("--num-test", type=count, default=0, metavar="N", help="number of test images; 0 = all")
    strengths = (
        "inverse regularization strength of the SVM; the best of several on held-out training "
        "images is used"
    )
    add("--C", type=_positive_numbers, default="0.3,1,3,10", metavar="C,...", help=strengths)
    add("--out", type=Path, metavar="FILE", help="file to also write the results to, as JSON")


def _positive_numbers(text: str) -> list[float]:
    """Return the numbers of a comma-separated list; the type of ``--C``."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: must be positive numbers, like 1 or 0.3,1,3")
    return numbers


def main(options: argparse.Namespace) -> None:
    """Run ``evaluate probe`` with its parsed options."""
    with signals.exit_on_interrupt("interrupted: nothing was written"):
        table, document = probe(options)
        print(table, flush=True)
        if options.out is not None:
            from pipeline.runtime.files import write_results

            write_results({options.out: json.dumps(document, indent=1).encode()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.papers.probe", description=__doc__, formatter_class=HelpFormatter
    )
    add_arguments(parser)
    with exit_on_user_error():
        main(parser.parse_args())
