"""What a run says of itself at its start."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.loading import load
from pipeline.runs.announce import cautions, data_cautions, device_cautions

R3GAN = ("model.loss=relativistic", "model.d_norm=none", "stability.r1_gamma=0.05")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (R3GAN, []),
        ((*R3GAN, "stability.r1_every=16"), ["stability.r1_every (16): model.loss=relativistic"]),
        (("stability.r1_gamma=1", "stability.r1_every=16"), []),
        ((*R3GAN, "stability.penalty=random"), ["stability.penalty (random): noisy"]),
        ((*R3GAN, "stability.penalty=random", "data.batch_size=1024"), []),
        (("stability.penalty=random",), []),
        (("schedule.end=100001", "schedule.g_lr=0"), ["schedule.end (100001): beyond train.total"]),
        (("schedule.end=100000", "schedule.g_lr=0"), []),
    ],
)
def test_values_that_are_rarely_meant_are_said(
    overrides: tuple[str, ...], lines: list[str]
) -> None:
    """One line each; nothing for what a paper does."""
    found = cautions(load("configs/dcgan_64.yaml", overrides))
    assert [line[: len(start)] for line, start in zip(found, lines, strict=True)] == lines


@pytest.mark.parametrize(
    ("overrides", "images", "lines"),
    [
        ((), 128 * 100, []),
        ((), 127, ["data.batch_size (128): more than the 127 images"]),
        (("train.total_steps=100001",), 12800, ["train.total_steps (100001): 1000 epochs"]),
        (("train.total_steps=100000",), 12800, []),
    ],
)
def test_too_few_images_are_said(overrides: tuple[str, ...], images: int, lines: list[str]) -> None:
    """More in a batch than in the data; more than a thousand epochs, and the steps of so many."""
    config = load("configs/dcgan_64.yaml", ["train.total_steps=10", *overrides])
    found = data_cautions(config, images)
    assert all("Lower it to 100000, or" in line for line in found if "epochs" in line)
    assert [line[: len(start)] for line, start in zip(found, lines, strict=True)] == lines


@pytest.mark.parametrize(
    ("file", "device", "said"),
    [
        ("dcgan_64", "cpu", True),
        ("dcgan_64_stable", "cpu", True),
        ("dcgan_64", "cuda", False),
        ("photos_64", "cpu", False),
        ("photos_32", "cpu", False),
        ("demo", "cpu", False),
    ],
)
def test_the_networks_of_the_paper_on_a_cpu_are_said(file: str, device: str, said: bool) -> None:
    """The line names the configuration that a CPU can train."""
    found = device_cautions(load(f"configs/{file}.yaml"), torch.device(device))
    assert len(found) == said
    assert all("configs/photos_64.yaml" in line for line in found)
