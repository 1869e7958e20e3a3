"""What a run writes and where there is room for it."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.models import make_discriminator, make_generator
from pipeline.step_folders import CHECKPOINTS, SNAPSHOTS


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """(bytes of all checkpoints and snapshots of a whole run, bytes of one checkpoint)."""
    with torch.device("meta"):
        g, d = (
            sum(p.numel() for p in network.parameters())
            for network in (make_generator(config.model), make_discriminator(config.model))
        )
    one = 4 * (2 * g + d) + 8 * (g + d)  # G, G_ema, D; two moments of Adam for G and D
    train = config.train
    kept = train.keep + (train.total_steps // train.keep_every if train.keep_every else 0)
    snapshots = train.total_steps // train.checkpoint_every if train.checkpoint_every else 1
    return kept * one + snapshots * 4 * g, one


def written_bytes(run_dir: Path) -> int:
    """Bytes of the checkpoints and snapshots that a run holds already."""
    found = (path for kind in (CHECKPOINTS, SNAPSHOTS) for path in run_dir.glob(f"{kind}/*/*"))
    return sum(path.stat().st_size for path in found if path.is_file())


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if is_there(path))


def is_there(path: Path) -> bool:
    """Whether it exists, as far as one may look."""
    try:
        return path.exists()
    except OSError:  # below a folder that may not be looked into
        return False
