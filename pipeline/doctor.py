"""Check a cluster before a run. Start this command exactly as you will start the training.

    python -m pipeline.doctor --config configs/dcgan_64.yaml
    torchrun --nnodes 2 --nproc_per_node 8 ... -m pipeline.doctor --config configs/dcgan_64.yaml
    sbatch --nodes=2 --gpus-per-node=8 slurm/preflight.sh      # the same on a Slurm allocation

It prints one table: software, devices, batch, all-reduce with its bandwidth, stop requests, clocks,
run folder, shards, disk, W&B. Exit code 0: READY; 1: NOT READY, with the checks that failed; 2: a
mistake in the command. It leaves no files behind, except remote shards in the node's cache.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
import os
import sys

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.runtime.arguments import HelpFormatter, adder, plain_overrides
from pipeline.runtime.errors import LaunchError, exit_on_user_error


def diagnose(config: Config) -> bool:
    """Run all checks and print the table on rank 0. Returns whether none failed, on every rank."""
    from pipeline.runs import preflight, run_folder
    from pipeline.runs.preflight import Finding, table
    from pipeline.runtime import hardware, launch

    precision = run_folder.saved_precision(config) or hardware.resolve_precision(
        config.train.precision
    )
    try:
        accelerator = launch.make_accelerator(precision)
    except LaunchError as error:  # without it the ranks cannot talk to each other
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(table([Finding("devices", "FAILED", str(error))]), flush=True)
        return False
    findings = preflight.examine(config, accelerator, precision)
    if accelerator.is_main_process:
        print(table(findings), flush=True)
    accelerator.end_training()
    return all(finding.verdict != "FAILED" for finding in findings)


def main() -> None:
    """Parse the command line, run the checks and exit."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doctor",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = adder(parser)
    add("--config FILE", "check for the run of this YAML configuration", required=True)
    add("overrides section.key=value", "values that replace those of the file", nargs="*")
    options = parser.parse_args(plain_overrides(sys.argv[1:]))
    with exit_on_user_error():
        ready = diagnose(load(options.config, options.overrides))
    sys.exit(0 if ready else 1)


if __name__ == "__main__":
    main()
