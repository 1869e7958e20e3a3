"""Values that change during a run: what they are at each step, and that updates use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import assert_bitwise_equal, kill_at_step, started, state_of, train

from pipeline.config.recipe import ScheduleConfig, StabilityConfig
from pipeline.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.models.noise import draw_z, rng
from pipeline.runtime import launch
from pipeline.training.gan import GAN
from pipeline.training.schedules import METRICS, Curve, Schedules

PLAN = ScheduleConfig(
    shape="linear", start=2, end=6, warmup=4, g_lr=2e-4, beta2=0.9, r1_gamma=4.0, r2_gamma=0.0
)
CONFIG = Config(
    model=ModelConfig(architecture="mlp", image_size=8, channels=1, z_dim=8, ngf=8, ndf=8),
    data=DataConfig(batch_size=50),
    optim=OptimConfig(g_lr=1e-3, d_lr=3e-3, beta1=0.4, beta2=0.5),
    train=TrainConfig(precision="fp32", ema_kimg=1.0, ema_rampup=0.1),
    stability=StabilityConfig(r1_gamma=2.0, r2_gamma=8.0),
    schedule=PLAN,
)


@pytest.mark.parametrize(
    ("curve", "values"),
    [
        (Curve(1.0, 3.0, "linear", 2, 6), [1, 1, 1.5, 2, 2.5, 3, 3]),
        (Curve(1.0, 3.0, "cosine", 2, 6), [1, 1, 1.2928932, 2, 2.7071068, 3, 3]),
        (Curve(0.3, 0.1, "cosine", 0, 1), [0.1] * 4),
        (Curve(8.0, 8.0, warmup=4), [2, 4, 6, 8, 8]),
        (Curve(8.0, 0.0, "linear", 0, 8, warmup=4), [1.75, 3, 3.75, 4, 3, 2, 1, 0, 0]),
    ],
)
def test_a_curve_is_its_formula(curve: Curve, values: list[float]) -> None:
    """Steps from 1; the first and the last value are met exactly."""
    found = [curve.at(step) for step in range(1, len(values) + 1)]
    assert found == pytest.approx(values, abs=1e-7)
    assert found[-1] == curve.last


def test_without_a_schedule_every_value_is_that_of_its_key() -> None:
    """To the last bit, at any step; nothing is logged or said."""
    schedules = Schedules(Config(stability=StabilityConfig(r1_gamma=0.1, r2_gamma=0.3)))
    for step in (1, 7, 10**6):
        values = [schedules.at(key, step) for key in METRICS]
        assert values == [2e-4, 2e-4, 0.999, 0.1, 0.3]
        assert schedules.ema_decay(step) == 0.999
        assert schedules.row(step) == {}
    assert schedules.describe() == ""


def test_the_average_halves_in_its_number_of_images() -> None:
    """1,000 images are 20 steps of 50; before step 200 a tenth of the images seen."""
    schedules = Schedules(CONFIG)
    assert schedules.ema_decay(200) ** 20 == pytest.approx(0.5)
    assert schedules.ema_decay(10**6) == schedules.ema_decay(200)
    assert schedules.ema_decay(100) ** 10 == pytest.approx(0.5)
    assert schedules.ema_decay(1) == pytest.approx(0.5**10)


def test_rows_and_the_first_line_say_what_varies() -> None:
    schedules = Schedules(CONFIG)
    assert schedules.row(4) == pytest.approx(
        {
            "lr/G": 6e-4,
            "lr/D": 3e-3,
            "adam/beta2": 0.7,
            "gamma/R1": 3.0,
            "gamma/R2": 4.0,
            "ema/decay": 0.5**2.5,
        }
    )
    assert schedules.describe() == (
        "optim.g_lr 0.001 to 0.0002, optim.beta2 0.5 to 0.9, stability.r1_gamma 2 to 4, "
        "stability.r2_gamma 8 to 0: linear, steps 2 to 6; learning rates grow from 0 over 4 steps; "
        "half-life of G_ema 1 kimg, at most 0.1 of the images seen"
    )


@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_update_uses_the_values_of_its_step(step: int) -> None:
    """The update of a step is bitwise that of a run whose constant values are those of the step."""
    real = [torch.rand(4, 1, 8, 8, generator=rng(0, "x")) * 2 - 1]
    z = [draw_z(CONFIG.model, 4, rng(0, "z"))]
    schedules = Schedules(CONFIG)
    now = {key.partition(".")[2]: schedules.at(key, step) for key in METRICS}
    gammas = {key: now.pop(key) for key in ("r1_gamma", "r2_gamma")}
    constant = replace(
        CONFIG,
        optim=replace(CONFIG.optim, **now),
        stability=replace(CONFIG.stability, **gammas),
        train=replace(CONFIG.train, ema_kimg=0.0, ema_decay=schedules.ema_decay(step)),
        schedule=ScheduleConfig(),
    )
    found = []
    for config in (CONFIG, constant):
        gan = GAN(config, launch.make_accelerator("fp32"), 1)
        for _ in range(2):  # beta2 is seen in the second update of the moments
            gan.update_D(real, z, step)
            gan.update_G(z, step)
            gan.update_average(step)
        found.append(
            {
                f"{n}.{k}": v
                for n, net in gan.networks().items()
                for k, v in net.state_dict().items()
            }
        )
    assert_bitwise_equal(*found)


SETTINGS = (
    *("schedule.end=7", "schedule.start=1", "schedule.warmup=4", "schedule.g_lr=1e-4"),
    *("schedule.d_lr=0", "schedule.beta2=0.9", "stability.r1_gamma=1", "schedule.r1_gamma=0.1"),
    *("train.ema_kimg=0.1", "train.ema_rampup=0.5", "train.total_steps=8", "train.log_every=1"),
)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_schedule_ends_bitwise_equal(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """With accumulation: weights, moments and the logged values; another total changes none."""
    settings = [*training_settings, *SETTINGS]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = train(1, tiny_config, *settings, f"run.dir={whole}")
    assert "schedule: optim.g_lr 0.001 to 0.0001, optim.d_lr 0.001 to 0, optim.beta2" in output
    with started(1, tiny_config, *settings, "train.total_steps=99", f"run.dir={cut}") as process:
        kill_at_step(process, cut, 6)
    train(1, tiny_config, *settings, f"run.dir={cut}")
    assert_bitwise_equal(state_of(cut, 8), state_of(whole, 8))
    logged = []
    for folder in (cut, whole):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        logged.append(
            [{k: row[k] for k in (*METRICS.values(), "ema/decay") if k in row} for row in rows]
        )
    assert logged[0] == logged[1]
    assert [len(row) for row in logged[0]] == [5] * 8
    assert [row["lr/D"] for row in logged[0][-2:]] == [0, 0]
