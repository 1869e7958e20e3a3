"""Count the floating-point operations of a training step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.schema import Config
from pipeline.models.dcgan import make_discriminator, make_generator
from pipeline.training.losses import PAIRED

ROWS = 2
"""Images that are counted: BatchNorm needs two."""


def flop_per_image(config: Config) -> float:
    """Return the floating-point operations per real image that a step of the run needs.

    Counted are the convolutions and matrix products of both updates, a multiplication and an
    addition as two, as in ``torch.utils.flop_counter``. BatchNorm, Adam, DiffAugment, the penalties
    R1 and R2, and what ``train.micro_batch`` makes G compute twice are not counted: these are the
    model's operations of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B). Nothing is computed:
    the networks are on the meta device.
    """
    model, d_steps = config.model, config.optim.d_steps
    if model.d_norm == "spectral":  # its products with one vector are not counted, either
        model = replace(model, d_norm="none")
    with torch.device("meta"):
        G, D = make_generator(model), make_discriminator(model)
        z = torch.empty(ROWS, model.z_dim + model.num_classes)
        y = torch.zeros(ROWS, dtype=torch.int64) if model.num_classes else None
        real = torch.empty(ROWS, model.channels, model.image_size, model.image_size)
    with FlopCounterMode(display=False) as counter:
        fake = G(z)
        (D(real, y).sum() + D(fake.detach(), y).sum()).backward()
        of_D = counter.get_total_flops()
        D.requires_grad_(False)
        if model.loss in PAIRED:
            D(real, y)
        D(fake, y).sum().backward()
        of_G = counter.get_total_flops() - of_D
    return float(d_steps * of_D + of_G) / (d_steps * ROWS)
