"""What the commands of ``generate`` do with an opened G; ``options`` is the command line."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.data.shards import read_index
from pipeline.generation import export, figures
from pipeline.generation.image_set import ImageSet
from pipeline.generation.image_sets import write
from pipeline.generation.latent import Table, interpolation, parse_concept, parse_rows
from pipeline.generation.model_card import provenance
from pipeline.models import sampling
from pipeline.models.sampling import GRID_IMAGES
from pipeline.runs.generators import Opened, best_in_run
from pipeline.runs.scored_images import PURPOSE, classes_like
from pipeline.runtime import signals
from pipeline.runtime.console import progress
from pipeline.runtime.errors import GenerationError
from pipeline.runtime.files import write_results
from pipeline.runtime.tensor_files import tensors_sha256
from pipeline.runtime.work_folder import CONTINUE


def find_best(options: argparse.Namespace) -> str:
    """Return the folder of the best scored G of --run."""
    path, row = best_in_run(Path(options.run).expanduser())
    score = f"{row['headline']} {row['scores'][row['headline']]:.5g}"
    print(f"best: step {row['step']}, {score} (protocol {row['protocol']})", flush=True)
    return str(path)


def make_table(options: argparse.Namespace, opened: Opened) -> Table:
    """Return the inputs of G: of the table of this command, or with --scored of ``evaluate``."""
    model = opened.model
    if not getattr(options, "scored", False):
        return Table(model, options.seed, options.truncation, options.of_class)
    shards, config, classes = options.labels_of, opened.config, None
    if not shards and config is not None:
        shards = "uniform" if config.eval.labels == "uniform" else config.data.shards
    if model.num_classes and shards != "uniform":
        if not shards:
            raise GenerationError(
                "--labels-of (empty): the shards that G was scored against are unknown. Name them."
            )
        index = read_index(shards, field="--labels-of")
        classes = classes_like(index, model.num_classes, options.num)
    return Table(model, options.seed, purpose=PURPOSE, classes=classes)


def draw_images(
    options: argparse.Namespace, opened: Opened, table: Table, accelerator: Accelerator
) -> None:
    """Write a set of images with all ranks. Exit with 128 + n after signal n."""
    model, is_main = table.model, accelerator.is_main_process
    record = {
        "source_kind": "generated",
        "num": options.num,
        "format": options.format,
        "seed": options.seed,
        "truncation": options.truncation,
        "class": options.of_class,
        "generator_sha256": opened.sha256,
        "snapshot": opened.name,
        "torch": torch.__version__,
        "device": accelerator.device.type,
    }
    record |= {name: getattr(model, name) for name in ("z_dim", "z_distribution", "num_classes")}
    if options.scored:
        record["table"] = table.purpose
        if table.classes is not None:
            record["classes_sha256"] = tensors_sha256({"classes": table.classes})
    if model.num_classes and options.format == "shards":
        record["labels"] = "cls"
    job = ImageSet(options.out, options.format, options.num, model.image_shape, record, table.label)
    with contextlib.ExitStack() as stack:
        outcome = write(
            job,
            lambda start, stop: sampling.draw_images(opened.G, table.cut(start, stop)),
            accelerator,
            stack.enter_context(progress("generate", options.num)) if is_main else lambda _: None,
        )
    if outcome == "stopped":
        name = signals.received() or "SIGTERM"
        if is_main:
            print(f"stopped by {name}. {CONTINUE}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.Signals[name])
    if is_main:
        state = "already complete" if outcome == "complete" else "written"
        print(f"{state}: {options.num} images of {record['snapshot']} in {options.out}", flush=True)


def write_files(options: argparse.Namespace, opened: Opened, table: Table) -> None:
    """Write the files of grid, walk, arithmetic or onnx, all of them or none."""
    out, G = options.out, opened.G
    files: dict[Path, bytes] = {}
    if options.command == "grid":
        rows = parse_rows(options.rows, "--rows")
        files[out] = figures.grid(G, table, rows, options.columns, options.scale, options.numbers)
    elif options.command == "walk":
        files[out], files[out.with_suffix(".png")] = figures.walk(
            G,
            table,
            parse_rows(options.rows, "--rows"),
            steps=options.steps,
            closed=options.closed,
            scale=options.scale,
            fps=options.fps,
        )
        print(f"interpolation: {interpolation(table.model)}, for {table.model.z_distribution} z")
    elif options.command == "arithmetic":
        concepts = [parse_concept(getattr(options, name), f"--{name}", table) for name in "abc"]
        files[out] = figures.arithmetic(G, table, concepts, options.noise, options.scale)
    else:
        files[out] = export.onnx_bytes(G, table.model, export.describe(opened))
        largest = export.onnx_difference(files[out], G, table.model, table.seed)
        print(f"largest difference between onnxruntime and torch on random z: {largest:.2g}")
    write_results(files, replace=options.overwrite)
    for file, content in files.items():
        print(f"written: {file} ({len(content) / 1024:.0f} KiB)", flush=True)


def write_hub(options: argparse.Namespace, opened: Opened, table: Table) -> None:
    """Write the folder for the Hub, unless --push finds it complete. Upload it with --push."""
    out, G = options.out, opened.G
    if out.exists() and options.push:
        export.check_hub_folder(out, G, table.model, opened.location)
        print(
            f"already complete: {out}: model.safetensors, config.yaml and config.json are those of "
            "this G; README.md and grid.png may have been edited and are uploaded as they are",
            flush=True,
        )
    else:
        rows = f"rows 0-{GRID_IMAGES - 1} of seed {table.seed}"
        rows += "" if table.truncation == 1 else f", z times {table.truncation:g}"
        rows += "" if table.of_class is None else f", all of class {table.of_class}"
        facts = export.describe(opened) | {"grid": rows}
        z = table.cut(0, GRID_IMAGES)
        export.write_hub_folder(out, G, table.model, z, facts, options.license, provenance(opened))
        print(f"written: {out}", flush=True)
    if options.push:
        print(f"uploaded: {export.push(out, options.push)}", flush=True)
