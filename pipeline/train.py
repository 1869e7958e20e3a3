"""Train a DCGAN on WebDataset shards.

    accelerate launch pipeline/train.py --config configs/dcgan_64.yaml
    accelerate launch pipeline/train.py --config configs/dcgan_64.yaml run.dir=runs/b
    accelerate launch --multi_gpu --num_processes 8 pipeline/train.py --config configs/dcgan_64.yaml

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
import os
import sys
from contextlib import closing

from pipeline.config.loading import load
from pipeline.config.schema import Config, micro_batch_advice, micro_batching
from pipeline.runtime.errors import exit_on_user_error


def train(config: Config) -> bool:
    """Run or resume the training that a configuration describes; False if it was stopped."""
    # torch takes seconds to import; --help and a mistyped key answer without it.
    import torch
    from torch import Tensor

    from pipeline.data.loader import Loader, ToDevice, make_order, normalise, open_data
    from pipeline.models.noise import append_classes, draw_z, rng
    from pipeline.runs import run_folder
    from pipeline.runtime import hardware, launch
    from pipeline.training.gan import GAN
    from pipeline.training.meter import IdLog
    from pipeline.training.run import Run

    precision = run_folder.saved_precision(config) or hardware.resolve_precision(
        config.train.precision
    )
    accelerator = launch.make_accelerator(precision)
    launch.require_equal_precision(accelerator, precision)
    launch.warn_about_missing_processes(accelerator)
    hardware.configure_kernels(accelerator.device, config.train.deterministic)
    device, rank = accelerator.device, accelerator.process_index
    world_size, d_steps = accelerator.num_processes, config.optim.d_steps
    batch_size, total_steps = config.data.batch_size, config.train.total_steps
    micro_batch, accumulation = micro_batching(config, world_size)
    rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    run = Run(config, accelerator, precision)
    try:
        index = open_data(config, accelerator)
    except signals.Stopped:
        return run.leave_early()
    order = make_order(config, index)
    gan = GAN(config, accelerator, accumulation)
    step = run.resume(gan, index, order, micro_batch)
    batches = Loader(config, index, order, rank, world_size).batches(step * d_steps)
    ids, to_device = IdLog(config, rank, world_size), ToDevice(device)

    def cut(local: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = local.split(micro_batch)
        return parts

    with closing(batches), run.start(step):
        while step < total_steps and not run.stopping:
            step += 1
            d_terms = torch.zeros(3, device=device)
            for turn in range(d_steps):
                # Data and noise of this turn: both drawn for the global batch and cut by rank.
                number = (step - 1) * d_steps + turn
                with run.meter.waiting():
                    batch = next(batches)
                ids.write(number + 1, batch)
                labels = torch.from_numpy(batch.labels)
                z = draw_z(config.model, batch_size, rng(config.run.seed, "z", number))[rows]
                z = append_classes(config.model, z, labels)
                images, z, labels = to_device(batch.images, z, labels)
                x = cut(normalise(images, device, config.train.channels_last))
                noise, y = cut(z), cut(labels) if config.model.num_classes else None

                # Update D: maximise log D(x) + log(1 - D(G(z))).
                d_terms += gan.update_D(x, noise, step, y, turn) / d_steps
            # Update G: maximise log D(G(z)).
            loss_G = gan.update_G(noise, step, y)
            gan.update_average()
            run.meter.add(loss_G, d_terms)

            # All ranks agree on stop requests here, and act alike below.
            run.agree(step)
            if run.due(step, config.train.log_every):
                run.log(step, gan)
            if run.due(step, config.train.sample_every):
                run.sample(step, gan)
            if run.save_due(step):
                run.save(step, gan)
        run.finish(step)
    # A launcher ends the other ranks as soon as one has left with another code than 0.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return step >= total_steps


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that win over the file"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_user_error():
        config = load(arguments.config, arguments.overrides)
    with exit_on_user_error(micro_batch_advice(config, int(os.environ.get("WORLD_SIZE", "1")))):
        finished = train(config)
    sys.exit(signals.exit_code(finished))


if __name__ == "__main__":
    main()
