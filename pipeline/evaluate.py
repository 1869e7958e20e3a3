"""Score the checkpoints of a run: FID, IS, KID, precision and recall.

    python -m pipeline.evaluate --run runs/x                            # the newest checkpoint
    accelerate launch pipeline/evaluate.py --run runs/x --pending       # every one without a score
    torchrun --nproc_per_node 8 -- pipeline/evaluate.py --run runs/x --watch   # as they appear
    python -m pipeline.evaluate --checkpoint runs/x/snapshots/step_00010000
    python -m pipeline.evaluate --run runs/x --images DIR      # any images, by the run's protocol
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
from contextlib import closing
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.loading import load
from pipeline.config.schema import Config, ModelConfig
from pipeline.papers import probe
from pipeline.runs.step_folders import SNAPSHOTS, committed
from pipeline.runtime.arguments import HelpFormatter, Once, number
from pipeline.runtime.errors import EvaluationError, exit_on_user_error
from pipeline.runtime.files import exists

if TYPE_CHECKING:
    from torch import nn

    from pipeline.evaluation.candidates import Candidate
    from pipeline.evaluation.run_scores import RunScores
    from pipeline.evaluation.scorer import Scorer


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
    scorer = _scorer_class("fidelity" if making_reference else options.metrics)(config, accelerator)
    if accelerator.is_main_process:
        print(scorer.describe(), flush=True)
    finished = True
    try:
        if making_reference:
            scorer.write_reference(options.out)
        elif options.images:
            _score_images(options.images, scorer)
        elif options.run:
            _score_run(options, scorer)
        else:
            _score_without_run(options.checkpoint, scorer)
    except signals.Stopped:
        finished = False
        if accelerator.is_main_process:
            reason = signals.received() or "another rank's signal"
            print(f"stopped by {reason}; run the same command again to go on", file=sys.stderr)
    scorer.close()
    # A launcher kills the other ranks as soon as one exits with a code other than 0.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return finished


def _scorer_class(metrics: str) -> type[Scorer]:
    if metrics == "parzen":
        from pipeline.evaluation.parzen import ParzenScorer

        return ParzenScorer
    from pipeline.evaluation.scorer import Scorer

    return Scorer


def _score_run(options: argparse.Namespace, scorer: Scorer) -> None:
    from pipeline.evaluation import candidates
    from pipeline.evaluation.run_scores import RunScores

    weights = scorer.config.eval.weights

    def find() -> list[Candidate]:
        if options.checkpoint:
            return [candidates.open_folder(options.checkpoint, weights)]
        found = candidates.find_in_run(options.run, weights)
        return found if options.pending or options.watch else found[-1:]

    with closing(RunScores(scorer, options.run)) as run_scores:
        scorer.load_reference()
        while True:
            # Read before ``find``, so that the last checkpoint of the training is still found.
            training_ended = run_scores.training_has_ended()
            run_scores.score_all(find)
            run_scores.log_to_wandb()
            if not options.watch or training_ended:
                break
            scorer.wait(options.every)
        _print_table(run_scores)
        run_scores.raise_if_any_failed()


def _print_table(run_scores: RunScores) -> None:
    if run_scores.scorer.is_main:
        from pipeline.evaluation.metrics import table
        from pipeline.runs.results import best

        rows = run_scores.rows()
        best_row = best(rows)
        print(table(rows, run_scores.protocol, best_row["step"] if best_row else None), flush=True)


def _score_images(location: str, scorer: Scorer) -> None:
    from pipeline.evaluation import candidates
    from pipeline.runtime.ranks import on_every_rank

    shape, count = scorer.index.shape, scorer.protocol.num_images
    open_images = partial(candidates.images_in_folder, location, shape, count)
    images = on_every_rank(scorer.accelerator, open_images)
    scorer.load_reference()
    _print_scores(scorer.score(images, "images"))


def _score_without_run(path: Path, scorer: Scorer) -> None:
    """Print the scores of a snapshot or checkpoint that lies outside a run folder."""
    from pipeline.evaluation import candidates
    from pipeline.runtime.ranks import on_every_rank

    config, accelerator = scorer.config.eval, scorer.accelerator

    def open_generator() -> tuple[nn.Module, ModelConfig]:
        candidate = candidates.open_folder(path, config.weights)
        return candidates.open_generator(candidate, path, config.weights, accelerator.device)

    G, model = on_every_rank(accelerator, open_generator)
    scorer.load_reference()
    _print_scores(scorer.score(scorer.generated_images(G, model), path.name))


def _print_scores(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name:<50} {value:.5g}", flush=True)


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
    fetch = add_command("fetch-weights", help="download the weights of Inception into a folder")
    fetch.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="folder to put the weights file into"
    )
    about_probe = "train a linear SVM on D's features and test it"
    probe.add_arguments(add_command("probe", help=about_probe, description=probe.__doc__))
    for command in (score, reference):
        add = command.add_argument
        add(
            "--run",
            action=Once,
            type=Path,
            metavar="DIR",
            help="run folder; its configuration is used",
        )
        add(
            "--config",
            action=Once,
            metavar="FILE",
            help="YAML configuration to use instead of the run's",
        )
    out = "file to copy the reference to; without it, it is only put into eval.cache_dir"
    reference.add_argument("--out", action=Once, type=Path, metavar="FILE", help=out)
    add = score.add_mutually_exclusive_group().add_argument
    one = "score one folder of snapshots/ or checkpoints/ instead of the newest of the run"
    add("--checkpoint", action=Once, type=Path, metavar="DIR", help=one)
    add(
        "--images",
        action=Once,
        metavar="DIR",
        help="score a folder, zip archive or tar files of images",
    )
    add("--pending", action="store_true", help="score every step that has no score yet")
    add("--watch", action="store_true", help="as --pending, repeatedly until the training ends")
    add = score.add_argument
    seconds = "seconds between two looks of --watch at the run folder"
    add("--every", type=number(0, 86_400), default=30.0, metavar="S", help=seconds)
    metrics = "fidelity: those of eval.metrics; parzen: log-likelihood (2014)"
    add("--metrics", choices=("fidelity", "parzen"), default="fidelity", help=metrics)
    for command in (score, reference):
        overrides = "override a value of the configuration"
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
    parser.epilog = (
        "COMMAND --help shows the options of another command. Those of score, the default, are:\n"
        f"{score.format_help()}"
    )
    if not words or words[0] not in (*commands.choices, "-h", "--help"):
        words = ["score", *words]
    options = parser.parse_args(words)
    if options.command == "reference" and not (options.run or options.config):
        reference.error("give --run DIR or --config FILE")
    if options.command == "score":
        if options.checkpoint and not options.run:
            # The scores of runs/x/snapshots/step_N go to the ledger of runs/x.
            parents = Path(realpath(options.checkpoint)).parents
            if len(parents) > 1 and (parents[1] / "config.yaml").is_file():
                options.run = parents[1]
        if not (options.run or options.checkpoint or (options.config and options.images)):
            score.error("give --run DIR or --checkpoint DIR, or --config FILE with --images DIR")
    return options


def configuration(options: argparse.Namespace) -> Config:
    """Return the configuration of ``--config``, else of the run, with the overrides applied.

    Raises:
        EvaluationError: the run folder has no configuration.
        ConfigError: a value is invalid.
    """
    if options.config:
        return load(options.config, options.overrides)
    folder: Path = options.run or options.checkpoint
    if not exists(folder / "config.yaml"):
        field = "--run" if options.run else "--checkpoint"
        near = sorted(str(path.parent) for path in folder.parent.glob("*/config.yaml"))[:10]
        raise EvaluationError(
            f"{field} {folder}: the folder has no config.yaml. Give a run folder; runs beside it: "
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
            from pipeline.evaluation.pretrained import fetch_inception

            with signals.exit_on_interrupt("interrupted: no file was written"):
                print(f"eval.extractor_weights={fetch_inception(options.to).resolve()}")
            return
        config = configuration(options)
    size = config.eval.batch_size
    advice = f"eval.batch_size ({size}) images pass through the extractor at once; set it lower."
    with exit_on_user_error(advice):
        finished = evaluate(options, config)
    sys.exit(signals.exit_code(finished))


if __name__ == "__main__":
    main()
