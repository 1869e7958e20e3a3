"""Make a small run folder with random weights, and evaluate it in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_shards
from launching import STATE
from torch import nn

from pipeline import evaluate
from pipeline.config.loading import dump
from pipeline.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
)
from pipeline.models.dcgan import Discriminator, Generator, init_weights
from pipeline.models.noise import rng
from pipeline.models.sampling import generator_id
from pipeline.runs import checkpoint, snapshot

MODEL = ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4)
TINY = "tiny_extractor:Tiny"


def make_config(folder: Path, **settings: object) -> Config:
    """Return a configuration whose shards, references and run folder lie in ``folder``."""
    small = {"extractor": TINY, "num_images": 100, "cache_dir": str(folder / "references")}
    return Config(
        run=RunConfig(dir=str(folder / "run")),
        model=MODEL,
        data=DataConfig(shards=str(folder / "shards")),
        tracking=TrackingConfig(wandb="disabled"),
        eval=EvalConfig(**small | settings),  # type: ignore[arg-type]
    )


def make_run(folder: Path, steps: tuple[int, ...] = (10, 20), **settings: object) -> Path:
    """Write shards of 130 noise images, and a run with the snapshot of another G at each step."""
    if not (folder / "shards").exists():
        write_shards(folder / "shards", [70, 60], (32, 32, 1))
    run, config = folder / "run", make_config(folder, **settings)
    run.mkdir(exist_ok=True)
    for step in steps:
        add_snapshot(run, config, step)
    (run / "run.json").write_text('{"id": "run-abc", "precision": "fp32"}')
    (run / "config.yaml").write_text(dump(config))  # the last file, as in a training
    return run


def generator_of(step: int) -> Generator:
    G = Generator(MODEL)
    init_weights(G, rng(step, "test"))
    with torch.no_grad():
        G.layers.to_image.weight.mul_(step)  # another contrast at each step, so that scores differ
    return G


def add_snapshot(run: Path, config: Config, step: int, G: nn.Module | None = None) -> Path:
    weights = (G or generator_of(step)).state_dict()
    return snapshot.export_snapshot(run, step, weights, config)


def add_checkpoint(run: Path, step: int) -> Path:
    G, G_ema = generator_of(step), generator_of(step + 1)
    networks = {"G": G, "D": Discriminator(MODEL), "G_ema": G_ema}
    ids = {
        "G": generator_id(MODEL, G.state_dict()),
        "G_ema": generator_id(MODEL, G_ema.state_dict()),
    }
    return checkpoint.save(run, step, networks, {}, STATE | {checkpoint.GENERATORS: ids})


def evaluated(*words: object) -> None:
    """Run ``evaluate`` in this process. Its errors are raised as exceptions.

    The command line asks for the tiny extractor if the configuration of the run has it.
    """
    options = evaluate.parse([str(word) for word in words])
    if evaluate.configuration(options).eval.extractor == TINY:
        options.overrides.append(f"eval.extractor={TINY}")
    evaluate.evaluate(options, evaluate.configuration(options))
