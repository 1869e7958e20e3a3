r"""Images from a snapshot: sets of any size, grids, films, arithmetic on z, exports.

    python -m pipeline.generate images --run runs/x --num 1000 --out images        # PNG files
    python -m pipeline.generate images --run runs/x --num 50000 --format npz --out images.npz
    torchrun --nproc_per_node 2 -- pipeline/generate.py images --run runs/x \
        --num 50000 --format shards --out data/drawn                   # or accelerate launch
    python -m pipeline.generate grid --run runs/x --numbers --out grid.png
    python -m pipeline.generate walk --run runs/x --rows 0-8 --out walk.gif        # and walk.png
    python -m pipeline.generate arithmetic --run runs/x --a 3,17,42 --b 5,9,11 --c 1,2,8 --out y.png
    python -m pipeline.generate onnx --run runs/x --out G.onnx
    python -m pipeline.generate hub --run runs/x --out hub

--snapshot DIR names one snapshot, and its folder is all that is needed; --run DIR takes the newest
of a run. Every image is a row of the noise of --seed: the same in each command, on any number of
processes, in a set of any size. After an interruption run the same command again: images goes on
where it was, the others begin anew. Nothing that exists is replaced unasked.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

from pipeline.runtime import signals

if __name__ == "__main__":
    signals.install()  # before the seconds of imports, in which a signal would be lost

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runs.run_folder import SNAPSHOTS, committed
from pipeline.runtime.errors import GenerationError, exit_on_user_error
from pipeline.runtime.files import check_output_path

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from pipeline.generation.latent import Table

MOST_IMAGES = 10**8  # eight digits name an image
KEPT = "finished parts are kept, the same command continues"
COMMANDS = {
    "images": "a set of images: PNG files, npz or WebDataset shards; on any number of processes",
    "grid": "one picture of many images",
    "walk": "a film (GIF) and a grid (PNG) of a smooth walk through z",
    "arithmetic": "mean(a) - mean(b) + mean(c) in z, as section 6.3.2 of Radford et al.",
    "onnx": "G as an ONNX file, compared with onnxruntime before it is written",
    "hub": "a folder for the Hugging Face Hub: model card, safetensors, configuration, a grid",
}


def generate(options: argparse.Namespace) -> None:
    """Make what the command line names."""
    path = _snapshot(options)
    _check_place(options)
    # torch takes seconds to import; --help and a mistyped path answer without it.
    from pipeline.generation.latent import Table
    from pipeline.runs.checkpoint import check_finite, load_snapshot
    from pipeline.runtime import launch, ranks

    accelerator = launch.make_accelerator("fp32")
    launch.warn_about_missing_processes(accelerator)
    path = ranks.on_rank_zero(accelerator, lambda: path)  # a newer one may have come since
    device = "cpu" if options.command == "onnx" else accelerator.device
    G, config = ranks.on_every_rank(accelerator, lambda: load_snapshot(path, device))
    check_finite(G, path)
    classes = config.model.num_classes
    if options.of_class is not None and not options.of_class < classes:
        there = f"classes 0 to {classes - 1}" if classes else "no classes (model.num_classes is 0)"
        raise GenerationError(f"--class ({options.of_class}): this G has {there}.")
    table = Table(config.model, options.seed, options.truncation, options.of_class)
    if options.command == "images":
        _images(options, path, G, table, accelerator)
    else:
        work = partial(_single, options, path, G, table)
        ranks.on_rank_zero(accelerator, work, lengthy=options.command == "hub")  # an upload
    accelerator.end_training()


def _images(
    options: argparse.Namespace, path: Path, G: nn.Module, table: Table, accelerator: Accelerator
) -> None:
    import torch

    from pipeline.generation.image_sets import ImageSet, write
    from pipeline.models import sampling
    from pipeline.runs.checkpoint import weights_file
    from pipeline.runtime.console import progress
    from pipeline.runtime.files import sha256_of

    model, is_main = table.model, accelerator.is_main_process
    record = {
        "source_kind": "generated",
        "num": options.num,
        "format": options.format,
        "seed": options.seed,
        "truncation": options.truncation,
        "class": options.of_class,
        "generator_sha256": sha256_of(weights_file(path)),
        "snapshot": path.resolve().name,
        "torch": torch.__version__,
        "device": accelerator.device.type,
    }
    record |= {name: getattr(model, name) for name in ("z_dim", "z_distribution", "num_classes")}
    if model.num_classes and options.format == "shards":
        record["labels"] = "cls"
    job = ImageSet(options.out, options.format, options.num, model.image_shape, record, table.label)
    silent: contextlib.AbstractContextManager[Callable[[int], None]] = contextlib.nullcontext(
        lambda _: None
    )
    with progress("generate", options.num) if is_main else silent as advance:
        outcome = write(
            job,
            lambda start, stop: sampling.draw_images(G, table.cut(start, stop)),
            accelerator,
            advance,
        )
    if outcome == "stopped":
        name = signals.received() or "SIGTERM"
        if is_main:
            print(f"stopped by {name}: {KEPT}.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.Signals[name])
    if is_main:
        said = "already complete, nothing to do" if outcome == "complete" else "written"
        print(f"{said}: {options.num} images of {record['snapshot']} in {options.out}", flush=True)


def _single(options: argparse.Namespace, path: Path, G: nn.Module, table: Table) -> None:
    """What one process makes; no file appears before all of them are ready."""
    from pipeline.generation import figures
    from pipeline.generation.latent import interpolation, parse_concept, parse_rows
    from pipeline.runtime.files import write_results

    out: Path = options.out
    files: dict[Path, bytes] = {}
    if options.command == "grid":
        rows = parse_rows(options.rows, "--rows")
        files[out] = figures.grid(G, table, rows, options.columns, options.scale, options.numbers)
    elif options.command == "walk":
        rows = parse_rows(options.rows, "--rows")
        files[out], files[out.with_suffix(".png")] = figures.walk(
            G,
            table,
            rows,
            steps=options.steps,
            closed=options.closed,
            scale=options.scale,
            fps=options.fps,
        )
        between = f"{table.model.z_distribution} z"
        print(f"{interpolation(table.model)} interpolation, the one for {between}")
    elif options.command == "arithmetic":
        concepts = [parse_concept(getattr(options, name), f"--{name}", table) for name in "abc"]
        files[out] = figures.arithmetic(G, table, concepts, options.noise, options.scale)
    elif options.command == "onnx":
        files[out] = _onnx(path, G, table)
    else:
        _hub(options, path, G, table)
    write_results(files, replace=options.overwrite)
    for file, content in files.items():
        print(f"written: {file} ({len(content) / 1024:.0f} KiB)", flush=True)


def _onnx(path: Path, G: nn.Module, table: Table) -> bytes:
    from pipeline.generation import export

    remedy = "pip install 'dcgan-pipeline[onnx]'"
    export.need(("onnx", "onnxscript", "onnxruntime"), "onnx", remedy)
    content = export.onnx_bytes(G, table.model, _facts(path, table))
    largest = export.onnx_difference(content, G, table.model, table.seed)
    print(f"largest difference between onnxruntime and torch on random z: {largest:.2g}")
    return content


def _hub(options: argparse.Namespace, path: Path, G: nn.Module, table: Table) -> None:
    from pipeline.generation import export
    from pipeline.models.sampling import GRID_IMAGES

    out = options.out
    if out.exists() and options.push:
        export.check_hub_folder(out, G, table.model, path)
        print(f"made before, uploaded as it is: {out}", flush=True)
    else:
        z = table.cut(0, GRID_IMAGES)
        of = f"rows 0-{GRID_IMAGES - 1} of seed {table.seed}"
        of += "" if table.truncation == 1 else f", z times {table.truncation:g}"
        of += "" if table.of_class is None else f", all of class {table.of_class}"
        facts = _facts(path, table) | {"grid": of}
        export.write_hub_folder(out, G, table.model, z, facts, options.license)
        print(f"written: {out}", flush=True)
    if options.push:
        print(f"uploaded: {export.push(out, options.push)}", flush=True)


def _facts(path: Path, table: Table) -> dict[str, str]:
    from pipeline.runs.checkpoint import weights_file
    from pipeline.runtime.files import sha256_of

    return {
        "snapshot": path.resolve().name,
        "sha256 of its weights": sha256_of(weights_file(path)),
        "z": f"{table.model.z_dim} numbers, {table.model.z_distribution}",
    }


def _check_place(options: argparse.Namespace) -> None:
    """Refuse an ``--out`` that cannot be written, or that would be replaced, before any work."""
    # A set of images and a folder to push look themselves, and go on with what is there.
    reuse = options.command == "images" or (options.command == "hub" and bool(options.push))
    option = "" if options.command in ("images", "hub") else "--overwrite"
    check = partial(check_output_path, replace=options.overwrite, option=option)
    options.out = check(options.out, reuse=reuse)
    if options.command == "walk":
        check(options.out.with_suffix(".png"))


def _snapshot(options: argparse.Namespace) -> Path:
    field, given = ("--snapshot", options.snapshot) if options.snapshot else ("--run", options.run)
    try:
        path: Path = given.expanduser()
        there = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, no such user, links in a circle
        raise GenerationError(f"{field} ({given}): cannot be read: {error}.") from None
    if options.snapshot:
        if not there:
            raise GenerationError(f"--snapshot ({path}): no such folder.")
        return path
    found = committed(path, SNAPSHOTS)
    if not found:
        near = sorted(str(p.parent) for p in path.parent.glob("*/snapshots"))[:10]
        raise GenerationError(
            f"--run ({path}): no snapshot there; training writes one with each checkpoint. "
            f"Runs with snapshots beside it: {', '.join(near) or 'none'}."
        )
    return found[-1]


def parse(words: list[str]) -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of = {name: commands.add_parser(name, help=said) for name, said in COMMANDS.items()}
    for name, command in of.items():
        add = command.add_argument
        source = command.add_mutually_exclusive_group(required=True)
        source.add_argument("--snapshot", type=Path, metavar="DIR", help="a snapshot folder")
        source.add_argument("--run", type=Path, metavar="DIR", help="the newest snapshot of a run")
        add("--out", type=Path, required=True, metavar="PATH", help="what to write")
        add("--seed", type=int, default=0, help="of the noise (0)")
        command.set_defaults(truncation=1.0, of_class=None, overwrite=False)
        if name != "onnx":  # whose z is the caller's
            add("--truncation", type=float, help="z is multiplied by it, 0 to 1 (1)")
            add("--class", dest="of_class", type=int, metavar="N", help="of one class (of all)")
        if name != "images" and name != "hub":
            add("--overwrite", action="store_true", help="replace a file that exists")
        if name in ("grid", "walk", "arithmetic"):
            add("--scale", type=int, default=1, help="side of the square a pixel becomes (1)")
    add = of["images"].add_argument
    add("--num", type=int, required=True, help="number of images")
    add("--format", choices=("png", "npz", "shards"), default="png", help="(png)")
    add = of["grid"].add_argument
    add("--rows", default="0-63", help="images to show, like 0-63 or 3,17 (0-63)")
    add("--columns", type=int, default=8, help="images side by side (8)")
    add("--numbers", action="store_true", help="write the row under each image")
    add = of["walk"].add_argument
    add("--rows", default="0-8", help="points of the walk, in this order (0-8)")
    add("--steps", type=int, default=10, help="steps from one to the next (10)")
    add("--closed", action="store_true", help="go back to the first: the film has no jump")
    add("--fps", type=float, default=20.0, help="frames per second of the film (20)")
    add = of["arithmetic"].add_argument
    for name, said in {"a": "first", "b": "subtracted", "c": "added"}.items():
        rows = f"rows of the {said} concept: 3,17,42, or class:2 for the first three of a class"
        add(f"--{name}", required=True, metavar="ROWS", help=rows)
    add("--noise", type=float, default=0.25, help="of the eight images around the result (0.25)")
    add = of["hub"].add_argument
    add("--license", default="", metavar="ID", help="of the weights, for the card: mit, ... (none)")
    add("--push", metavar="USER/NAME", help="upload the folder; a new repository is private")
    options = parser.parse_args(words)
    for name, low, high in (
        ("seed", 0, 2**63 - 1),
        ("of_class", 0, 2**31),
        ("truncation", 1e-6, 1),
        ("num", 1, MOST_IMAGES),
        ("scale", 1, 64),
        ("columns", 1, 10_000),
        ("steps", 1, 10_000),
        ("fps", 1, 50),
        ("noise", 0, 100),
    ):
        value = getattr(options, name, low)
        if value is not None and not low <= value <= high:
            word = name.removeprefix("of_")
            of[options.command].error(f"--{word} ({value}): must be between {low} and {high}")
    if not re.fullmatch(r"[A-Za-z0-9.-]*", getattr(options, "license", "")):
        of["hub"].error(f"--license ({options.license}): must be an identifier like apache-2.0")
    suffix = {"walk": ".gif", "grid": ".png", "arithmetic": ".png", "onnx": ".onnx"}.get(
        options.command, ".npz" if getattr(options, "format", "") == "npz" else ""
    )
    if suffix and options.out.suffix != suffix:
        of[options.command].error(f"--out ({options.out}): must end in {suffix}")
    return options


def main() -> None:
    """Run a command; exit code 2 on a user's mistake, 128 + n after signal n."""
    options = parse(sys.argv[1:])
    with exit_on_user_error():
        if options.command == "images":  # which has a state to leave behind, and ranks to agree
            try:
                generate(options)
            except KeyboardInterrupt:  # the second one
                print(f"interrupted: {KEPT}.", file=sys.stderr, flush=True)
                sys.exit(128 + signal.SIGINT)
        else:
            with signals.exit_on_interrupt("interrupted: nothing is half-written"):
                generate(options)


if __name__ == "__main__":
    main()
