"""Estimate and count the bytes that the checkpoints and snapshots of a run take."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config.schema import Config
from pipeline.models.dcgan import make_discriminator, make_generator
from pipeline.runs.step_folders import CHECKPOINTS, SNAPSHOTS


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """Estimate bytes of tensors: (all checkpoints and snapshots of a run, one checkpoint)."""
    with torch.device("meta"):
        g, d = (
            sum(p.numel() for p in network.parameters())
            for network in (make_generator(config.model), make_discriminator(config.model))
        )
    one = 4 * (2 * g + d) + 8 * (g + d)  # fp32: G, G_ema, D; Adam's two moments of G and D
    train = config.train
    kept = train.keep + (train.total_steps // train.keep_every if train.keep_every else 0)
    snapshots = train.total_steps // train.checkpoint_every if train.checkpoint_every else 1
    return kept * one + snapshots * 4 * g, one


def written_bytes(run_dir: Path) -> int:
    """Return the bytes of the checkpoints and snapshots that a run has written."""
    files = (path for kind in (CHECKPOINTS, SNAPSHOTS) for path in run_dir.glob(f"{kind}/*/*"))
    return sum(path.stat().st_size for path in files if path.is_file())
