"""Run a command of the pipeline: `dcgan COMMAND ...` is `python -m pipeline.COMMAND ...`.

    dcgan prepare ~/photos --out data/photos-64 --size 64
    dcgan train --config configs/photos_64.yaml
    dcgan evaluate --run runs/photos_64 --pending
    dcgan train --help                     # each command has a help of its own

This is one process. A launcher starts several, with the module in place of `dcgan train`:

    accelerate launch --multi_gpu --num_processes 8 -m pipeline.train --config configs/dcgan_64.yaml
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from pipeline.runtime.arguments import HelpFormatter

COMMANDS = ("prepare", "train", "evaluate", "generate", "report", "doctor")


def main() -> None:
    """Hand the other words over to the command that the first one names."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.argv[1:] = words[1:]
        # As __main__, so that the command sees the same as under python -m.
        runpy.run_module(f"pipeline.{words[0]}", run_name="__main__", alter_sys=True)
        return
    parser = argparse.ArgumentParser(
        prog="dcgan", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=version("dcgan-pipeline"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        commands.add_parser(name, help=_purpose(name))
    parser.parse_args(words or ["--help"])


def _purpose(name: str) -> str:
    """Return the first line of a command's docstring, without the seconds of its import."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
