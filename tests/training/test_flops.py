"""Floating-point operations of a step, and the share of the device's peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.schema import Config, DataConfig, ModelConfig, OptimConfig
from pipeline.models.noise import append_classes, draw_z, rng
from pipeline.runtime import launch
from pipeline.runtime.hardware import peak_of
from pipeline.training.flops import flop_per_image
from pipeline.training.gan import GAN

BATCH = 4
SMALL = ModelConfig(image_size=32, channels=1, z_dim=8, ngf=4, ndf=4)


@pytest.mark.parametrize(
    ("change", "d_steps"),
    [
        ({}, 1),
        ({"kernel_size": 5, "channels": 3, "image_size": 64}, 2),
        ({"num_classes": 3, "d_norm": "spectral", "loss": "hinge"}, 1),
        ({"loss": "relativistic", "d_norm": "none"}, 2),
        ({"architecture": "mlp", "image_size": 8, "maxout": 2, "num_classes": 3}, 3),
    ],
)
def test_the_flop_of_an_image_are_those_of_the_updates(
    change: dict[str, object], d_steps: int
) -> None:
    """Counted from the configuration alone = counted by PyTorch while the updates compute."""
    model = replace(SMALL, **change)  # type: ignore[arg-type]
    config = Config(
        model=model, data=DataConfig(batch_size=BATCH), optim=OptimConfig(d_steps=d_steps)
    )
    gan = GAN(config, launch.make_accelerator("fp32"), 1)
    real = torch.rand(BATCH, model.channels, model.image_size, model.image_size)
    labels = torch.arange(BATCH) % max(1, model.num_classes)
    z = append_classes(model, draw_z(model, BATCH, rng(0, "z")), labels)
    y = [labels] if model.num_classes else None
    with FlopCounterMode(display=False) as counter:
        for turn in range(d_steps):
            gan.update_D([real.clone()], [z], 1, y, turn)
        gan.update_G([z], 1, y, [real.clone()])
    assert flop_per_image(config) == counter.get_total_flops() / (d_steps * BATCH)


def test_the_flop_of_a_layer_are_those_of_its_formula() -> None:
    """An MLP without classes: 2 x inputs x outputs a layer, forward; counted by hand."""
    model = ModelConfig(architecture="mlp", image_size=8, channels=1, z_dim=5, ngf=6, ndf=7)
    layers_G, layers_D = (5 * 6, 6 * 6, 6 * 64), (64 * 7, 7 * 7, 7 * 1)
    inside_G, inside_D = sum(layers_G[1:]), sum(layers_D[1:])
    G, D = sum(layers_G), sum(layers_D)
    # D: G forward; D forward, weights' and inputs' gradients of real and generated images.
    # G: D forward and inputs' gradients; G's weights' gradients and inputs' gradients.
    of_D = G + 2 * (D + D + inside_D)
    of_G = D + D + G + inside_G
    assert flop_per_image(Config(model=model)) == 2 * (of_D + of_G)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_a_peak_is_that_of_the_device_or_unknown(
    name: str, precision: str, peak: float | None
) -> None:
    """Names as PyTorch gives them; what is not in the table has no peak, so no perf/mfu."""
    assert peak_of(name, precision) == peak
