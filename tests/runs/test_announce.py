"""What a run says of itself at its start."""

from __future__ import annotations

import pytest

from pipeline.config.loading import load
from pipeline.runs.announce import cautions

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
