"""Train a DCGAN on WebDataset shards.

    accelerate launch pipeline/train.py --config configs/dcgan_64.yaml
    accelerate launch pipeline/train.py --config configs/dcgan_64.yaml run.dir=runs/b
    accelerate launch --multi_gpu --num_processes 8 pipeline/train.py --config configs/dcgan_64.yaml

    python -m pipeline.train --config configs/photos_64.yaml --dry-run

To resume, run the same command again. SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C save a checkpoint and
leave. The state of a run is step + weights + optimizers; data order, noise and grids are functions
of (seed, step), so a resumed run computes what the uninterrupted one would have.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

from pipeline.runtime import signals

if __name__ == "__main__":
    signals.install()  # before the seconds of imports, in which a signal would be lost

import argparse
import logging
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING

from pipeline.config import keys
from pipeline.config.hints import hint
from pipeline.config.loading import dump, load
from pipeline.config.schema import Config
from pipeline.config.sizes import micro_batch_advice, micro_batching, require_memory
from pipeline.runtime.arguments import HelpFormatter, plain_overrides
from pipeline.runtime.console import printable
from pipeline.runtime.environment import world_size
from pipeline.runtime.errors import exit_on_user_error
from pipeline.runtime.host import memory
from pipeline.runtime.log_file import Printable, Recorder

if TYPE_CHECKING:
    from accelerate import Accelerator


def _launch(config: Config) -> tuple[Accelerator, str, int, int]:
    """Join the ranks; return (accelerator, precision, micro_batch, accumulation)."""
    from pipeline.runs import run_folder
    from pipeline.runtime import hardware, launch

    precision = run_folder.saved_precision(config)
    precision = precision or hardware.resolve_precision(config.train.precision)
    accelerator = launch.make_accelerator(precision, config.train.rank_timeout)
    launch.require_equal_precision(accelerator, precision)
    launch.warn_about_missing_processes(accelerator)
    kernels = config.train.deterministic, config.train.exact_sum
    hardware.configure_kernels(accelerator.device, *kernels)
    micro_batch, accumulation = micro_batching(config, accelerator.num_processes)
    node = hardware.local_world_size(), memory()
    require_memory(config, accelerator.num_processes, *node)
    return accelerator, precision, micro_batch, accumulation


def train(config: Config) -> bool:
    """Run or resume the training of a configuration.

    Returns:
        True if the run reached ``train.total_steps``, False if a signal stopped it.
    """
    # Imported here: torch takes seconds, and --help or a mistyped key must answer without it.
    from pipeline.data.loader import open_data
    from pipeline.data.preview import write_reals
    from pipeline.training.gan import GAN
    from pipeline.training.inputs import InputReader
    from pipeline.training.order_choice import order_of_run
    from pipeline.training.run import Run

    accelerator, precision, micro_batch, accumulation = _launch(config)
    d_steps, total_steps = config.optim.d_steps, config.train.total_steps

    run = Run(config, accelerator, precision)
    try:
        index = open_data(config, accelerator)
    except signals.Stopped:
        return run.leave_early()
    order = order_of_run(config, index, accelerator)
    gan = GAN(config, accelerator, accumulation)
    while True:
        step = run.resume(gan, index, order, micro_batch)
        inputs = InputReader(
            *(config, index, order, accelerator),
            micro_batch=micro_batch,
            meter=run.meter,
            start=step * d_steps,
            noise=run.noise,
        )

        with closing(inputs), run.start(step):
            if run.is_main and step < total_steps:
                write_reals(config, index, order)
            if step == 0:
                run.sample(step, gan)
            while step < total_steps and not run.leaving:
                step += 1
                run.profile.begin(step)
                # Update D: maximise log D(x) + log(1 - D(G(z))).
                d_terms = []
                for turn in range(d_steps):
                    real, z, y = next(inputs)
                    d_terms.append(gan.update_D(real, z, step, y, turn))
                # Update G: maximise log D(G(z)).
                loss_G = gan.update_G(z, step, y, real)
                gan.update_average(step)
                run.meter.add(loss_G, d_terms)

                # All ranks agree on stop requests here, so that they do the same below.
                run.agree(step)
                if run.due(step, config.train.log_every):
                    run.log(step, gan)
                if run.due(step, config.train.sample_every):
                    run.sample(step, gan)
                if step == total_steps:
                    inputs.finish_check()
                if run.save_due(step):
                    run.save(step, gan)
            finished = run.finish(step)
        if not run.healing:
            break
    # A launcher kills the other ranks as soon as one has left with an exit code other than 0.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    run.collapse.raise_if_stopped()
    return finished


def dry_run(config: Config, origins: Mapping[str, str]) -> bool:
    """Print what a run would take, without a file of it. Returns False if a signal stopped it."""
    from pipeline.training.rehearsal import rehearse

    return rehearse(config, origins, *_launch(config))


def main() -> None:
    """Parse the command line and train; exit with code 2 on a user's mistake, 3 on a collapse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file with the configuration; configs/ has some")
    add(
        "--keys",
        nargs="?",
        const="",
        metavar="WORD",
        help="print the keys whose name has WORD, with type, default and meaning, and exit; if no "
        "name has it, those whose meaning has; without WORD all",
    )
    add(
        "--print-config",
        action="store_true",
        help="print the configuration with all its keys as YAML, and exit",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print each value with its origin, check the data, time three steps, print how long "
        "the run would take and what it needs, and exit; writes nothing",
    )
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that replace those of the file, e.g. optim.g_lr=1e-4; --section.key=value is "
        "the same",
    )
    arguments, unknown = parser.parse_known_intermixed_args(plain_overrides(sys.argv[1:]))
    if arguments.keys is not None:
        with exit_on_user_error():
            sys.stdout.write(keys.print_keys(arguments.keys) + "\n")
        sys.exit(0)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        parser.error(f"{printable(unknown[0])}: no such option; {hint(name)}")
    if arguments.config is None:
        parser.error("--config FILE is missing; for example --config configs/dcgan_64.yaml")
    handlers = (logging.StreamHandler(), Recorder())
    for handler in handlers:
        handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    with exit_on_user_error():
        origins: dict[str, str] = {}
        config = load(arguments.config, arguments.overrides, origins=origins)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        sys.exit(0)
    with exit_on_user_error(micro_batch_advice(config, world_size())):
        finished = dry_run(config, origins) if arguments.dry_run else train(config)
    sys.exit(signals.exit_code(finished))


if __name__ == "__main__":
    main()
