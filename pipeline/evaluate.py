"""Score the checkpoints of a run: FID, IS, KID, precision and recall, in a job of its own.

    python -m pipeline.evaluate --run runs/x                            # the newest checkpoint
    accelerate launch pipeline/evaluate.py --run runs/x --pending       # all that lack a score
    torchrun --nproc_per_node 8 -- pipeline/evaluate.py --run runs/x --watch   # to its end
    python -m pipeline.evaluate --checkpoint runs/x/snapshots/step_00010000
    python -m pipeline.evaluate --run runs/x --images DIR      # other samples, the same protocol
    python -m pipeline.evaluate reference --config configs/dcgan_64.yaml --out FILE
    python -m pipeline.evaluate fetch-weights --to DIR         # Inception's, for offline nodes
    python -m pipeline.evaluate --run runs/x eval.extractor=efficientnet-lite0   # no download
    python -m pipeline.evaluate --run runs/x --metrics parzen eval.parzen_shards=DIR   # as in 2014
    python -m pipeline.evaluate probe --run runs/x --test DIR  # what D learned

Settings are the section eval: of the run's configuration; the command line wins over it. Rows go to
evaluations.jsonl in the run folder, then to W&B. What is there already is not computed again, so
after a kill run the same command again; any number of evaluators may work on one run.
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
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.loading import load
from pipeline.config.schema import Config, ModelConfig
from pipeline.runs.run_folder import SNAPSHOTS, committed
from pipeline.runtime.errors import EvaluationError, exit_on_user_error

if TYPE_CHECKING:
    from torch import nn

    from pipeline.evaluation.candidates import Candidate
    from pipeline.evaluation.run_scores import RunScores
    from pipeline.evaluation.scorer import Scorer


METRICS = ("fidelity", "parzen")


def evaluate(options: argparse.Namespace, config: Config) -> bool:
    """Score what the command line names; False if it was stopped before the end."""
    if options.run and not options.images:
        _something_to_evaluate(options, config)
    # torch takes seconds to import; --help and a mistyped path answer without it.
    from pipeline.runtime import hardware, launch

    accelerator = launch.make_accelerator("fp32")
    hardware.use_all_cores()  # of a GPU machine too: precision and recall are computed on CPUs
    launch.warn_about_missing_processes(accelerator)
    evaluator = _evaluator(options.metrics)(config, accelerator)
    if accelerator.is_main_process:
        print(evaluator.describe(), flush=True)
    finished = True
    try:
        if options.command == "reference":
            evaluator.write_reference(options.out)
        elif options.images:
            _score_images(options.images, evaluator)
        elif options.run:
            _score_run(options, evaluator)
        else:
            _score_detached(options.checkpoint, evaluator)
    except signals.Stopped:
        finished = False
        if accelerator.is_main_process:
            reason = signals.received() or "another rank's signal"
            print(f"stopped by {reason}; run the same command again to go on", file=sys.stderr)
    evaluator.close()
    # A launcher ends the other ranks as soon as one has left with another code than 0.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return finished


def _evaluator(metrics: str) -> type[Scorer]:
    if metrics == "parzen":
        from pipeline.evaluation.parzen import ParzenScorer

        return ParzenScorer
    from pipeline.evaluation.scorer import Scorer

    return Scorer


def _score_run(options: argparse.Namespace, evaluator: Scorer) -> None:
    from pipeline.evaluation import candidates
    from pipeline.evaluation.run_scores import RunScores

    weights = evaluator.config.eval.weights

    def find() -> list[Candidate]:
        if options.checkpoint:
            return [candidates.open_folder(options.checkpoint, weights)]
        found = candidates.find_in_run(options.run, weights)
        return found if options.pending or options.watch else found[-1:]

    with closing(RunScores(evaluator, options.run)) as evaluation:
        evaluator.load_reference()
        while True:
            # Looked at first: what was written before the marker is found after it.
            finished = evaluation.training_has_ended()
            evaluation.evaluate(find)
            evaluation.send()
            if not options.watch or finished:
                break
            evaluator.wait(options.every)
        _print_table(evaluation)
        evaluation.raise_if_any_failed()


def _print_table(evaluation: RunScores) -> None:
    if evaluation.evaluator.is_main:
        from pipeline.evaluation.metrics import table
        from pipeline.runs.results import best

        rows = evaluation.rows()
        found = best(rows)
        print(table(rows, evaluation.protocol, found["step"] if found else None), flush=True)


def _score_images(name: str, evaluator: Scorer) -> None:
    from pipeline.evaluation import candidates
    from pipeline.runtime.ranks import on_every_rank

    shape, count = evaluator.index.shape, evaluator.protocol.num_images
    images = on_every_rank(
        evaluator.accelerator, lambda: candidates.images_in_folder(name, shape, count)
    )
    evaluator.load_reference()
    _print_scores(evaluator.score(images, "images"))


def _score_detached(path: Path, evaluator: Scorer) -> None:
    from pipeline.evaluation import candidates
    from pipeline.runtime.ranks import on_every_rank

    config, accelerator = evaluator.config.eval, evaluator.accelerator

    def opened() -> tuple[nn.Module, ModelConfig]:
        candidate = candidates.open_folder(path, config.weights)
        return candidates.open_generator(candidate, path, config.weights, accelerator.device)

    G, model = on_every_rank(accelerator, opened)
    evaluator.load_reference()
    _print_scores(evaluator.score(candidates.generated_images(G, model, config.seed), path.name))


def _print_scores(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name:<50} {value:.5g}", flush=True)


def _something_to_evaluate(options: argparse.Namespace, config: Config) -> None:
    there = committed(options.run) or committed(options.run, SNAPSHOTS)
    if not options.watch and not options.checkpoint and not there:
        raise EvaluationError(
            f"--run {options.run}: no checkpoint or snapshot there yet; the first comes after "
            f"train.checkpoint_every ({config.train.checkpoint_every}) steps. --watch waits for it."
        )


def parse(words: list[str]) -> argparse.Namespace:
    """The command line, its parts checked against each other."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = ("reference", "fetch-weights")  # and probe, which has a command line of its own
    command = words.pop(0) if words[:1] and words[0] in commands else ""
    add = parser.add_argument
    if command == "fetch-weights":
        add("--to", type=Path, required=True, metavar="DIR", help="folder for the weights file")
        return argparse.Namespace(command=command, **vars(parser.parse_args(words)))
    add("--run", type=Path, metavar="DIR", help="run folder")
    add("--config", metavar="FILE", help="YAML configuration, where there is no run")
    if command == "reference":
        add("--out", type=Path, metavar="FILE", help="default: eval.cache_dir")
    else:
        add(
            "--checkpoint",
            type=Path,
            metavar="DIR",
            help="this folder of snapshots/ or checkpoints/",
        )
        add("--images", metavar="DIR", help="score a folder, zip or tars of images instead")
        add("--metrics", choices=METRICS, default=METRICS[0], help="what to compute (fidelity)")
        add("--pending", action="store_true", help="every step that has no score yet")
        add("--watch", action="store_true", help="as --pending, until the training has finished")
        add("--every", type=float, default=30.0, metavar="S", help="seconds between looks (30)")
    add("overrides", nargs="*", metavar="section.key=value", help="values that win over the file")
    options = parser.parse_args(words)
    options.command = command
    for name in ("checkpoint", "images", "pending", "watch", "out", "metrics"):
        setattr(options, name, getattr(options, name, None))
    if options.checkpoint and not options.run:
        # runs/x/snapshots/step_N: the run's ledger gets the row; elsewhere the scores are printed.
        parent = options.checkpoint.resolve().parents
        if len(parent) > 1 and (parent[1] / "config.yaml").is_file():
            options.run = parent[1]
    several = [n for n in ("checkpoint", "images", "pending", "watch") if getattr(options, n)]
    if len(several) > 1:
        parser.error(f"give only one of {', '.join('--' + name for name in several)}")
    if not (options.run or options.config or options.checkpoint):
        parser.error("give --run DIR, or --config FILE" + ("" if command else " with --images DIR"))
    if not options.run and not command and not (options.images or options.checkpoint):
        parser.error("--config names no checkpoints: give --run DIR, or --images DIR with it")
    return options


def configuration(options: argparse.Namespace) -> Config:
    """The run's own configuration, or that of ``--config``, under the command line's overrides."""
    if options.config:
        return load(options.config, options.overrides)
    folder: Path = options.run or options.checkpoint
    if not (folder / "config.yaml").is_file():
        what = "--run" if options.run else "--checkpoint"
        near = sorted(str(path.parent) for path in folder.parent.glob("*/config.yaml"))[:10]
        raise EvaluationError(
            f"{what} {folder}: holds no config.yaml; runs beside it: {', '.join(near) or 'none'}."
        )
    config = load(folder / "config.yaml", options.overrides)
    # The folder may have been moved or copied since the run wrote its configuration.
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


def main() -> None:
    """Parse the command line and evaluate."""
    if sys.argv[1:2] == ["probe"]:
        from pipeline.papers import probe

        return probe.main(sys.argv[2:])
    options = parse(sys.argv[1:])
    with exit_on_user_error():
        if options.command == "fetch-weights":
            from pipeline.evaluation.pretrained import fetch_inception

            with signals.exit_on_interrupt("interrupted: nothing was kept"):
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
