r"""Draw images from a snapshot: sets of any size, grids, walks, arithmetic on z, and exports of G.

    python -m pipeline.generate images --run runs/x --num 1000 --out images        # PNG files
    python -m pipeline.generate images --run runs/x --num 50000 --format npz --out images.npz
    torchrun --nproc_per_node 2 -- pipeline/generate.py images --run runs/x \
        --num 50000 --format shards --out data/drawn                   # or accelerate launch
    python -m pipeline.generate grid --run runs/x --numbers --out grid.png
    python -m pipeline.generate walk --run runs/x --rows 0-8 --out walk.gif        # and walk.png
    python -m pipeline.generate arithmetic --run runs/x --a 3,17,42 --b 5,9,11 --c 1,2,8 --out y.png
    python -m pipeline.generate images --run runs/x --best --scored --num 50000 --out scored
    python -m pipeline.generate onnx --run runs/x --out G.onnx
    python -m pipeline.generate hub --run runs/x --out hub

--run takes the newest snapshot of a run, with --best the one with the best score. --snapshot (or
--checkpoint) takes what evaluate takes: a folder of snapshots/ or checkpoints/, one made for the
Hub, a .safetensors or .onnx file, or module:Class with --weights FILE. Image i is drawn from row i
of the noise table of --seed. It is the same in every command, on any number of processes and in a
set of any size. With --scored the table is that of evaluate. After an interruption run the same
command again: images continues with the missing parts, the other commands start anew. Existing
files are replaced with --overwrite only.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

from pipeline.runtime import signals

if __name__ == "__main__":
    signals.install()  # before the slow imports, so that no signal is lost meanwhile

import argparse
import re
import signal
import sys
from functools import partial
from pathlib import Path

from pipeline.runs.step_folders import CHECKPOINTS, SNAPSHOTS, committed
from pipeline.runtime.arguments import HelpFormatter, adder, file_ending_in, integer, number, seed
from pipeline.runtime.errors import GenerationError, exit_on_user_error
from pipeline.runtime.files import check_output_path
from pipeline.runtime.work_folder import CONTINUE

MAX_IMAGES = 10**8  # file names have eight digits
COMMANDS = {
    "images": "write a set of images as PNG files, npz or WebDataset shards, on all processes",
    "grid": "write a PNG with many images",
    "walk": "write a GIF and a PNG of a smooth walk through z (Radford et al. 2016, section 6.1)",
    "arithmetic": "write a PNG of mean(a) - mean(b) + mean(c) in z (section 6.3.2)",
    "onnx": "write G as an ONNX file, after a comparison of onnxruntime with torch",
    "hub": "write a folder for the Hugging Face Hub: model card, safetensors, config, a grid",
}
SUFFIXES = {"grid": ".png", "walk": ".gif", "arithmetic": ".png", "onnx": ".onnx"}


def generate(options: argparse.Namespace) -> None:
    """Run the command that ``options`` names, on every rank.

    Raises:
        UserError: snapshot, output or launch are not usable.
    """
    path = _find_snapshot(options)
    _check_output(options)
    # Importing torch takes seconds. --help and the checks above do without it.
    from pipeline.generation import commands
    from pipeline.runs.generators import open_generator
    from pipeline.runtime import launch, ranks

    accelerator = launch.make_accelerator("fp32")
    launch.warn_about_missing_processes(accelerator)
    # All ranks take the snapshot that rank 0 found: a newer one may have appeared since.
    path = ranks.on_rank_zero(
        accelerator, lambda: commands.find_best(options) if options.best else path
    )
    device = "cpu" if options.command == "onnx" else accelerator.device
    opened = ranks.on_every_rank(
        accelerator, lambda: open_generator(path, options.weights, device=device)
    )
    classes = opened.model.num_classes
    if options.of_class is not None and not options.of_class < classes:
        has = f"classes 0 to {classes - 1}; give one" if classes else "no classes; omit --class"
        raise GenerationError(f"--class ({options.of_class}): this G has {has}.")
    table = ranks.on_every_rank(accelerator, lambda: commands.make_table(options, opened))
    if options.command == "images":
        commands.draw_images(options, opened, table, accelerator)
    else:
        if options.command in ("onnx", "hub") and not opened.is_ours:
            raise GenerationError(f"--snapshot ({path}): {options.command} needs a G of a run.")
        is_hub = options.command == "hub"
        work = partial(
            commands.write_hub if is_hub else commands.write_files, options, opened, table
        )
        ranks.on_rank_zero(accelerator, work, lengthy=is_hub)  # an upload may take long
    accelerator.end_training()


def _check_output(options: argparse.Namespace) -> None:
    """Make ``options.out`` absolute. Refuse an output that exists or cannot be written."""
    # A set of images, and a folder to push, may exist: they are compared with the request later.
    reuse = options.command == "images" or (options.command == "hub" and bool(options.push))
    option = "" if options.command in ("images", "hub") else "--overwrite"
    check = partial(check_output_path, replace=options.overwrite, option=option)
    options.out = check(options.out, reuse=reuse)
    if options.command == "walk":
        check(options.out.with_suffix(".png"))


def _find_snapshot(options: argparse.Namespace) -> str:
    """Return what --snapshot names, or the newest snapshot of --run."""
    given = options.snapshot or options.run
    if options.snapshot and ":" in given:  # module:Class
        return str(given)
    field = "--snapshot" if options.snapshot else "--run"
    try:
        path = Path(given).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:  # name too long, unknown user, circle of links
        raise GenerationError(f"{field} ({given}): cannot be read: {error}.") from None
    if options.snapshot:
        if not there:
            raise GenerationError(f"--snapshot ({path}): no such folder; see RUN/snapshots.")
        return str(path)
    snapshots = committed(path, SNAPSHOTS)
    if not snapshots and not options.best:
        if checkpoints := committed(path, CHECKPOINTS):
            raise GenerationError(
                f"--run ({path}): has no snapshot yet; training writes one every "
                f"train.checkpoint_every steps. Use its checkpoint: --checkpoint {checkpoints[-1]}"
            )
        near = sorted(str(p.parent) for p in path.parent.glob("*/snapshots"))[:10]
        raise GenerationError(
            f"--run ({path}): has no snapshot; training writes one with each checkpoint. "
            f"Runs beside it that have snapshots: {', '.join(near) or 'none'}."
        )
    return str(path if options.best else snapshots[-1])


def parse(words: list[str]) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generate", description=__doc__, formatter_class=HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of: dict[str, argparse.ArgumentParser] = {}
    for name, line in COMMANDS.items():
        description = f"{line[0].upper()}{line[1:]}."
        command = of[name] = commands.add_parser(
            name, help=line, description=description, formatter_class=HelpFormatter
        )
        add = adder(command)
        source = adder(command.add_mutually_exclusive_group(required=True))
        source("--snapshot --checkpoint G", "load this G; see above")
        source("--run DIR", "load the newest snapshot of the run in this folder")
        add("--best", "load the snapshot of --run with the best score", action="store_true")
        own = "load the weights of --snapshot module:Class from this file"
        add("--weights FILE", own, default="")
        out_type = file_ending_in(SUFFIXES[name]) if name in SUFFIXES else Path
        out_name = "FILE" + SUFFIXES[name] if name in SUFFIXES else "PATH"
        add(f"--out {out_name}", "write this file or folder", type=out_type, required=True)
        add("--seed N", "draw from the noise table of this seed", type=seed, default=0)
        command.set_defaults(truncation=1.0, of_class=None, overwrite=False)
        if name != "onnx":  # the z of an ONNX file is its user's
            one_class = "draw this class only (default: row i has class i mod num_classes)"
            shrink = "multiply z by this number in (0, 1]: fewer failures, less variety"
            add("--truncation X", shrink, type=number(1e-6, 1))
            add("--class N", one_class, type=integer(0, 2**31), dest="of_class")
        if name in SUFFIXES:
            add("--overwrite", "replace an existing file", action="store_true")
        if name in ("grid", "walk", "arithmetic"):
            add("--scale N", "enlarge each pixel to N x N", type=integer(1, 64), default=1)
    whole = integer(1, 10_000)
    add = adder(of["images"])
    add("--num N", "draw N images", type=integer(1, MAX_IMAGES), required=True)
    formats = "write the set as PNG files, as one npz file, or as WebDataset shards"
    add("--format", formats, choices=("png", "npz", "shards"), default="png")
    scored = "draw the images that evaluate scores; give its eval.num_images and eval.seed as "
    add("--scored", scored + "--num and --seed", action="store_true")
    labels = "take the classes of --scored from these shards, those that G was scored against; "
    add("--labels-of SHARDS", labels + "uniform: equally many of each", default="")
    add = adder(of["grid"])
    add("--rows ROWS", "draw these rows of the table, like 0-63 or 3,17", default="0-63")
    add("--columns N", "put N images side by side", type=whole, default=8)
    add("--numbers", "write the row number under each image", action="store_true")
    add = adder(of["walk"])
    add("--rows ROWS", "walk through these rows of the table, in this order", default="0-8")
    add("--steps N", "take N steps from one row to the next", type=whole, default=10)
    closed = "return to the first row, so that the film repeats without a jump"
    add("--closed", closed, action="store_true")
    add("--fps N", "show N frames of the film a second", type=number(1, 50), default=20.0)
    add = adder(of["arithmetic"])
    for name, concept in {"a": "first", "b": "subtracted", "c": "added"}.items():
        rows = f"take these rows for the {concept} concept, like 3,17,42; class:2: three of class 2"
        add(f"--{name} ROWS", rows, required=True)
    variations = "add uniform noise in [-X, X] for the eight variations around the result"
    add("--noise X", variations, type=number(0, 100), default=0.25)
    add = adder(of["hub"])
    terms = "name this license of the weights in the model card, like apache-2.0"
    add("--license ID", terms, type=_licence)
    add("--push USER/NAME", "upload the folder; a new repository is private")
    options = parser.parse_args(words)
    if getattr(options, "format", "") == "npz" and options.out.suffix != ".npz":
        of["images"].error(f"--out ({options.out}): must end in .npz with --format npz")
    if options.best and not options.run:
        of[options.command].error("--best belongs to --run")
    others = options.truncation != 1 or options.of_class is not None
    if options.command == "images" and options.scored and others:
        of["images"].error("--scored: --truncation and --class would draw other images")
    return options


def _licence(text: str) -> str:
    """Check a license identifier, the argparse type of --license."""
    if not re.fullmatch(r"[A-Za-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(f"{text}: must be an identifier like apache-2.0")
    return text


def main() -> None:
    """Run a command. Exit with 2 on a user's mistake, and with 128 + n after signal n."""
    options = parse(sys.argv[1:])
    with exit_on_user_error():
        if options.command == "images":  # stops between blocks, on all ranks at once
            try:
                generate(options)
            except KeyboardInterrupt:  # the second SIGINT
                print(f"interrupted. {CONTINUE}", file=sys.stderr, flush=True)
                sys.exit(128 + signal.SIGINT)
        else:
            with signals.exit_on_interrupt("interrupted: no file is incomplete"):
                generate(options)


if __name__ == "__main__":
    main()
