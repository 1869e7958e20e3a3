"""Score the checkpoints of a run: FID, IS, KID, precision and recall.

    python -m pipeline.evaluate --run runs/x                            # the newest checkpoint
    accelerate launch pipeline/evaluate.py --run runs/x --pending       # every one without a score
    torchrun --nproc_per_node 8 -- pipeline/evaluate.py --run runs/x --watch   # as they appear
    python -m pipeline.evaluate --checkpoint runs/x/snapshots/step_00010000
    python -m pipeline.evaluate --checkpoint G.onnx --against B            # any G; no run
    python -m pipeline.evaluate --images A --against B         # any two sets of images; no run
    python -m pipeline.evaluate --run runs/x --images DIR      # any images, by the run's protocol
    python -m pipeline.evaluate --table runs/*       # the best scores of all runs side by side
    python -m pipeline.evaluate reference --config configs/dcgan_64.yaml --out FILE
    python -m pipeline.evaluate fetch-weights --to DIR         # Inception's, for offline nodes
    python -m pipeline.evaluate --run runs/x eval.extractor=efficientnet-lite0   # no download
    python -m pipeline.evaluate --run runs/x --metrics parzen eval.parzen_shards=DIR   # as in 2014
    python -m pipeline.evaluate probe --run runs/x --test DIR  # accuracy of an SVM on D's features

Without a command name the command is score. Its settings are the section eval of the run's
configuration; section.key=value on the command line overrides them. Each score is appended to
evaluations.jsonl in the run folder, then logged to W&B. A step that already has a score under the
same settings is skipped, so after an interruption run the same command again. Several evaluations
may work on one run at the same time.

A set of images is a folder, a zip archive, an npz, npy or HDF5 file, tars or shards; B may also be
an npz file with mu and sigma. Images are taken as they are stored. What was done to how many, and
which cannot be read, is said in one line.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

from pipeline.runtime import signals

if __name__ == "__main__":
    signals.install()  # before the seconds of imports, in which a signal would be lost

import argparse
import dataclasses
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.choices import OF_TORCH_FIDELITY
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.papers import probe
from pipeline.runs import score_tables
from pipeline.runs.step_folders import SNAPSHOTS, committed
from pipeline.runtime.arguments import (
    HelpFormatter,
    Once,
    adder,
    colour,
    integer,
    number,
    plain_overrides,
)
from pipeline.runtime.errors import EvaluationError, exit_on_user_error
from pipeline.runtime.files import exists

if TYPE_CHECKING:
    from pipeline.evaluation.pictures import Pictures
    from pipeline.evaluation.scorer import Scorer
    from pipeline.runs.score_tables import Line


def evaluate(options: argparse.Namespace, config: Config) -> bool:
    """Run ``score`` or ``reference``; returns False if a signal stopped it before the end."""
    making_reference = options.command == "reference"
    if options.run and not making_reference and not options.images:
        _check_for_checkpoints(options, config)
    # torch takes seconds to import. --help and a mistyped path are answered before that.
    from pipeline.runtime import hardware, launch

    accelerator = launch.make_accelerator("fp32")
    hardware.use_all_cores()  # on a GPU machine too: precision and recall are computed on the CPU
    launch.warn_about_missing_processes(accelerator)
    finished, scorer = True, None
    try:
        if making_reference:
            scorer = _scorer_class("fidelity")(config, accelerator)
            _say_on_rank_0(scorer)
            scorer.write_reference(options.out)
        else:
            from pipeline.evaluation import jobs, own_extractors, survey

            if options.metrics == "fidelity":
                own_extractors.require_asked(config.eval.extractor)
            channels = config.model.channels if options.metrics == "parzen" else 3
            asked = survey.Asked(options.size, options.background, options.subfolders, channels)
            config, scored, real = jobs.open_sets(
                options.images, options.against, asked, config,
                all_images=bool(options.against) and not _names(options, "eval.num_images"),
                accelerator=accelerator,
            )  # fmt: skip
            opened = None
            if options.checkpoint and not options.run and scored is None:
                where = str(options.checkpoint), options.weights
                config, opened = jobs.open_alone(*where, config, accelerator)
            scorer = _scorer_class(options.metrics)(config, accelerator, real)
            _say_on_rank_0(scorer)
            show = partial(_show, options, scorer, scored)
            if scored is not None:
                jobs.score_images(scorer, scored, show)
            elif opened is not None:
                jobs.score_generator(scorer, opened, show)
            else:
                all_steps, watch = options.pending or options.watch, options.every
                jobs.score_run(
                    scorer, options.run, options.checkpoint, all_steps=all_steps,
                    watch=watch if options.watch else None, show=show,
                )  # fmt: skip
    except signals.Stopped:
        finished = False
        if accelerator.is_main_process:
            reason = signals.received() or "another rank's signal"
            print(f"stopped by {reason}; run the same command again to go on", file=sys.stderr)
    if scorer is not None:
        scorer.close()
    # A launcher kills the other ranks as soon as one exits with a code other than 0.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return finished


def _say_on_rank_0(scorer: Scorer) -> None:
    if scorer.is_main:
        print(scorer.describe(), flush=True)


def _names(options: argparse.Namespace, key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in options.overrides)


def _scorer_class(metrics: str) -> type[Scorer]:
    if metrics == "parzen":
        from pipeline.evaluation.parzen import ParzenScorer

        return ParzenScorer
    from pipeline.evaluation.scorer import Scorer

    return Scorer


def _show(
    options: argparse.Namespace,
    scorer: Scorer,
    scored: Pictures | None,
    lines: list[Line],
    text: str,
) -> None:
    """Print scores, and write them to ``--csv``; rank 0 only."""
    from pipeline.evaluation.pictures import about

    facts = {"protocol": scorer.protocol.id, "settings": dataclasses.asdict(scorer.protocol)}
    if scored is not None:
        facts["images"] = about(scored)
    real = scorer.held_out if options.metrics == "parzen" else scorer.index
    facts["against"] = about(real or scorer.index)
    score_tables.show(lines, text, facts, as_json=options.json, csv_file=options.csv)


def _check_for_checkpoints(options: argparse.Namespace, config: Config) -> None:
    found = committed(options.run) or committed(options.run, SNAPSHOTS)
    if not options.watch and not options.checkpoint and not found:
        raise EvaluationError(
            f"--run {options.run}: this run has no checkpoint or snapshot yet. The first comes "
            f"after train.checkpoint_every ({config.train.checkpoint_every}) steps; wait for it "
            "with --watch."
        )


def parse(words: list[str]) -> argparse.Namespace:
    """Return the checked options; ``command`` is score, reference, fetch-weights or probe."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate",
        usage="%(prog)s [COMMAND] [OPTIONS] [section.key=value ...]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog=parser.prog)
    add_command = partial(commands.add_parser, formatter_class=HelpFormatter)
    score = add_command("score", prog=parser.prog, help="score checkpoints, or a set of images")
    reference = add_command("reference", help="compute the reference file of the real images")
    fetch = add_command("fetch-weights", help="download the weights of an extractor into a folder")
    choices = [name for name in OF_TORCH_FIDELITY if name != "inception-v3-compat"]
    which = f"download the weights of this extractor: {', '.join(choices)}"
    add = adder(fetch)
    add("--extractor NAME", which, choices=choices, default="inception")
    add("--to DIR", "put the weights file into this folder", type=Path, required=True)
    about_probe = "train a linear SVM on D's features and test it"
    probe.add_arguments(add_command("probe", help=about_probe, description=probe.__doc__))
    for command in (score, reference):
        add = partial(adder(command), action=Once)
        add("--run DIR", "use the run in this folder and its configuration", type=Path)
        add("--config FILE", "use this YAML configuration instead of that of the run")
    out = "copy the reference to this file (default: it is only put into eval.cache_dir)"
    adder(reference)("--out FILE", out, action=Once, type=Path)
    add = adder(score.add_mutually_exclusive_group())
    one = "score this G: a folder of snapshots/ or checkpoints/, a Hub folder, a .safetensors or "
    one += ".onnx file, or module:Class (default: the newest checkpoint of --run)"
    add("--checkpoint --snapshot G", one, action=Once, type=Path)
    images = "score this set of images: a folder, zip, npz, npy or HDF5 file, tars or shards"
    add("--images A", images, action=Once)
    add("--pending", "score every checkpoint that has no score yet", action="store_true")
    watch = "score checkpoints as they appear, until the training ends"
    add("--watch", watch, action="store_true")
    add = adder(score)
    against = "compare with these real images, or with mu and sigma of an npz file; needs no run"
    add("--against B", against, action=Once)
    own = "load the weights of --checkpoint module:Class from this file"
    add("--weights FILE", own, action=Once, default="")
    squares = "make central squares of N x N pixels of all images of A and B; 0 keeps their size"
    add("--size N", squares, type=integer(1, 65536), default=0)
    add("--background COLOUR", "put this colour behind transparent pixels", type=colour)
    subfolders = "take the images of all folders below A or B as one set, e.g. of class folders"
    add("--subfolders", subfolders, action="store_true")
    table = "print the best scores of these runs by protocol as Markdown, from their ledgers alone"
    add("--table DIR", table, nargs="+", type=Path)
    add("--json", "print the scores as JSON, and nothing else", action="store_true")
    add("--csv FILE", "also write the scores as CSV", action=Once, type=Path)
    seconds = "let --watch look at the run folder every S seconds"
    add("--every S", seconds, type=number(0, 86_400), default=30.0)
    metrics = "compute those of eval.metrics, or the log-likelihood of 2014"
    add("--metrics", metrics, choices=("fidelity", "parzen"), default="fidelity")
    for command in (score, reference):
        values = "values that replace those of the configuration, e.g. eval.num_images=10000"
        adder(command)("overrides section.key=value", values, nargs="*")
    parser.epilog = (
        "COMMAND --help shows the options of another command. Those of score, the default, are:\n"
        f"{score.format_help()}"
    )
    words = plain_overrides(words)
    if not words or words[0] not in (*commands.choices, "-h", "--help"):
        words = ["score", *words]
    options = parser.parse_args(words)
    if options.command == "reference" and not (options.run or options.config):
        reference.error("give --run DIR or --config FILE")
    if options.command == "score":
        if options.checkpoint and not options.run and not options.against:
            # The scores of runs/x/snapshots/step_N go to the ledger of runs/x.
            parents = Path(realpath(options.checkpoint)).parents
            if len(parents) > 1 and (parents[1] / "config.yaml").is_file():
                options.run = parents[1]
        if options.images and not (options.run or options.config or options.against):
            score.error("--images A: give also --against B, --run DIR or --config FILE")
        if not (options.run or options.checkpoint or options.images or options.table):
            score.error("give --run DIR, --checkpoint DIR, or --images A with --against B")
        if options.against and options.metrics == "parzen":
            score.error("--against: --metrics parzen compares with eval.parzen_shards instead")
        if options.against and options.run and not options.images:
            score.error("--against: the scores of a run are against its data.shards; give --images")
    return options


def configuration(options: argparse.Namespace) -> Config:
    """Return the configuration of ``--config``, else of the run, with the overrides applied.

    Raises:
        EvaluationError: the run folder has no configuration.
        ConfigError: a value is invalid.
    """
    folder: Path | None = options.run or getattr(options, "checkpoint", None)
    if folder is not None and folder.suffix == ".safetensors":
        folder = folder.parent
    if options.config or folder is None or not (options.run or exists(folder / "config.yaml")):
        return load(options.config, options.overrides)
    if not exists(folder / "config.yaml"):
        near = sorted(str(path.parent) for path in folder.parent.glob("*/config.yaml"))[:10]
        raise EvaluationError(
            f"--run {folder}: the folder has no config.yaml. Give a run folder; runs beside it: "
            f"{', '.join(near) or 'none'}."
        )
    config = load(folder / "config.yaml", options.overrides, saved=True)
    # The folder may have been moved or copied since the run wrote its configuration.
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


def main() -> None:
    """Run a command. Exit code 2 after a user's mistake."""
    options = parse(sys.argv[1:])
    with exit_on_user_error():
        if options.command == "probe":
            return probe.main(options)
        if options.command == "fetch-weights":
            from pipeline.evaluation.pretrained import fetch_weights

            with signals.exit_on_interrupt("interrupted: no file was written"):
                file = fetch_weights(options.extractor, options.to).resolve()
                print(f"eval.extractor_weights={file}")
            return
        if options.command == "score" and options.table:
            lines, text, facts = score_tables.best_of_runs(options.table)
            output = options.json, options.csv
            return score_tables.show(lines, text, facts, as_json=output[0], csv_file=output[1])
        config = configuration(options)
    size = config.eval.batch_size
    advice = f"eval.batch_size ({size}) images pass through the extractor at once; set it lower."
    as_json = options.command == "score" and options.json
    stdout = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with exit_on_user_error(advice), stdout:
        finished = evaluate(options, config)
    sys.exit(signals.exit_code(finished))


if __name__ == "__main__":
    main()
