"""train.watch: which rows give an alarm, what a healing changes, and that kills change neither."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import STATE, assert_bitwise_equal, kill, run, start, state_of, train, wait_for
from launching import command as training
from torch import nn

from pipeline.config.recipe import ScheduleConfig, StabilityConfig
from pipeline.config.schema import Config, OptimConfig, TrainConfig
from pipeline.runs import alarms, checkpoint
from pipeline.runs.alarms import Alarm, read_alarms, record, rewind_alarms
from pipeline.runs.healing import finish_healing
from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.documents import read_document
from pipeline.training.collapse import Collapse
from pipeline.training.schedules import Schedules

HEALTHY = {"watch/loss_D": 1e-3, "watch/diversity": 0.1}
WON = HEALTHY | {"watch/loss_D": 9e-4}
ONE_IMAGE = HEALTHY | {"watch/diversity": 0.0}


def config(watch: str, **train: Any) -> Config:
    train = {"log_every": 50, "checkpoint_every": 200} | train
    return Config(train=TrainConfig(watch=watch, **train))  # type: ignore[arg-type]


def judged(collapse: Collapse, rows: dict[int, dict[str, float]]) -> list[Alarm]:
    """The alarms of some rows, up to the one that ends the loop."""
    found: list[Alarm] = []
    for step, row in rows.items():
        found += collapse.judge(step, row)
        if collapse.alarm is not None:
            break
    return found


def test_a_collapse_is_said_once_and_only_after_it_has_lasted() -> None:
    """500 steps below the limit in every row; a row above it, or one without a number, resets. The
    first 500 steps do not count.
    """
    first = judged(Collapse(config("warn")), dict.fromkeys(range(50, 3000, 50), WON))
    assert first == [Alarm(1000, 500, "watch/loss_D", 9e-4, "warn")]
    nan = HEALTHY | {"watch/loss_D": float("nan")}
    rows = {step: {300: HEALTHY, 700: nan}.get(step, WON) for step in range(50, 3000, 50)}
    collapse = Collapse(config("warn"))
    assert judged(collapse, rows) == [Alarm(1250, 750, "watch/loss_D", 9e-4, "warn")]
    assert collapse.alarm is None
    later = dict.fromkeys((3000, 3400, 3500, 3600), ONE_IMAGE) | {4000: {}}
    (alarm,) = judged(collapse, later)
    assert (alarm.step, alarm.sign) == (3500, "watch/diversity")
    assert alarm.text.startswith(
        "collapse at step 3500: watch/diversity (0) has been below 0.1 since step 3000: G makes "
        "almost one image. Lower optim.d_lr"
    )


def test_a_row_that_only_the_end_of_a_run_brought_decides_nothing() -> None:
    """A run of 520 steps that is trained on to 2,000 judges the rows that one of 2,000 has."""
    longer, shorter = (Collapse(config("stop", watch_steps=480)) for _ in range(2))
    rows = dict.fromkeys(range(50, 2000, 50), WON)
    assert judged(shorter, {20: WON} | rows) == judged(longer, rows)
    assert longer.alarm == Alarm(1000, 500, "watch/loss_D", 9e-4, "stop")  # at 980, without a row


def test_off_says_nothing() -> None:
    assert judged(Collapse(config("off")), dict.fromkeys(range(50, 2000, 50), WON)) == []


@pytest.mark.parametrize("at", range(50, 1300, 200))
@pytest.mark.parametrize("watch", ["warn", "stop", "heal"])
def test_a_resume_at_any_row_goes_on_counting(watch: str, at: int) -> None:
    """What a checkpoint keeps of the rows, through JSON, is all that later decisions need."""
    rows = {step: WON if step > 620 else HEALTHY for step in range(50, 1300, 50)}
    whole = judged(Collapse(config(watch)), rows)
    first, second = (Collapse(config(watch)) for _ in range(2))
    before = judged(first, {step: row for step, row in rows.items() if step <= at})
    if not (watch != "warn" and before):  # the loop has not ended
        state = json.loads(json.dumps({"step": at, "watch": first.state()}))
        assert second.load(state, [], changed=False) == []
        before += judged(second, {step: row for step, row in rows.items() if step > at})
    assert before == whole[: len(before)]
    assert len(whole) >= 1


def test_other_settings_count_anew() -> None:
    """After an accepted change the sign must last as long as before."""
    collapse = Collapse(config("stop"))
    judged(collapse, dict.fromkeys(range(50, 850, 50), WON))
    state = {"step": 800, "watch": collapse.state()}
    changed, same = Collapse(config("stop")), Collapse(config("stop"))
    changed.load(state, [], changed=True)
    same.load(state, [], changed=False)
    rows = dict.fromkeys(range(850, 2000, 50), WON)
    assert [next(iter(judged(one, rows))).step for one in (same, changed)] == [1000, 1350]


# -- healing --------------------------------------------------------------------------------------


def healed(step: int, since: int, number: int, back_to: int, **other: Any) -> Alarm:
    keys, factor = ("optim.d_lr",), 0.25
    return Alarm(step, since, "watch/loss_D", 9e-4, "heal", number, back_to, keys, factor, **other)


def test_healing_goes_back_to_a_regular_checkpoint_from_well_before_the_sign() -> None:
    """At least watch_steps before it; never before the last healing; then it stops. Checkpoints
    that it will need are among those it asks to keep at every step on the way.
    """
    collapse = Collapse(config("heal", watch_healings=2))
    won_from = 1320
    for step in range(50, 1851, 50):
        found = list(collapse.judge(step, WON if step > won_from else HEALTHY))
        assert not found or step == 1850
        if 800 <= step < 1850:
            assert collapse.kept(step) == [(min(step + 1, 1350) - 500) // 200 * 200]
    assert found == [healed(1850, 1350, 1, 800)]
    state = {"step": 800, "watch": Collapse(config("heal")).state()}
    events = collapse.load(state, found, changed=False)
    assert [(event["step"], event["healed"]["number"]) for event in events] == [(800, 1)]
    assert collapse.factors() == {"optim.d_lr": 0.25}
    rows = dict.fromkeys(range(850, 3000, 50), WON)
    assert judged(collapse, {step: rows[step] for step in range(850, 1351, 50)}) == [
        healed(1350, 850, 2, 800)  # not 200: that checkpoint may be gone
    ]
    both = [*found, healed(1350, 850, 2, 800)]
    assert len(collapse.load(state, both, changed=False)) == 2
    assert collapse.factors() == {"optim.d_lr": 0.0625}
    (alarm,) = judged(collapse, {step: rows[step] for step in range(850, 1351, 50)})
    assert alarm == Alarm(1350, 850, "watch/loss_D", 9e-4, "stop", 2)
    assert "2 healings did not help" in alarm.text


def test_gamma_is_raised_where_there_is_a_penalty() -> None:
    """R1 and R2, also one that only the end of the schedule has; D's rate without both."""
    base = config("heal")
    cases: list[tuple[Config, tuple[str, ...]]] = [
        (base, ("optim.d_lr",)),
        (replace(base, stability=StabilityConfig(r2_gamma=1.0)), ("stability.r2_gamma",)),
        (
            replace(
                base,
                stability=StabilityConfig(r1_gamma=1.0),
                schedule=ScheduleConfig(end=9, r2_gamma=1.0),
            ),
            ("stability.r1_gamma", "stability.r2_gamma"),
        ),
    ]
    for one, keys in cases:
        (alarm,) = judged(Collapse(one), dict.fromkeys(range(50, 1001, 50), WON))
        assert alarm.keys == keys
        assert alarm.factor == (0.25 if keys == ("optim.d_lr",) else 4.0)


def test_a_factor_multiplies_the_value_in_every_step_and_is_said() -> None:
    """Also during a warm-up; other keys keep their bits; rows and the start of a run say it."""
    schedules = Schedules(
        Config(optim=OptimConfig(g_lr=3e-4, d_lr=1e-4), schedule=ScheduleConfig(warmup=10))
    )
    before = [(schedules.at("optim.d_lr", s), schedules.at("optim.g_lr", s)) for s in (1, 5, 50)]
    schedules.multiply({"optim.d_lr": 0.25})
    after = [(schedules.at("optim.d_lr", s), schedules.at("optim.g_lr", s)) for s in (1, 5, 50)]
    assert after == [(d / 4, g) for d, g in before]
    assert schedules.row(50)["lr/D"] == 0.25e-4
    assert "optim.d_lr times 0.25 (healed)" in schedules.describe()
    plain = Schedules(Config())
    plain.multiply({"stability.r1_gamma": 4.0})
    assert plain.row(1) == {"gamma/R1": 0.0}


def saved(folder: Path, *steps: int, healings: int = 0) -> None:
    done = [healed(9, 5, n + 1, 4) for n in range(healings)]
    watch = json.loads(json.dumps({"healings": [one.__dict__ for one in done]}))
    for step in steps:
        networks = {name: nn.Linear(1, 1) for name in ("G", "D", "G_ema")}
        checkpoint.save(folder, step, networks, {}, STATE | {"watch": watch})


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in committed(folder)]


@pytest.mark.parametrize("gone", range(3))
def test_a_healing_that_was_killed_is_finished(tmp_path: Path, gone: int) -> None:
    """Whatever part of the later checkpoints was removed: the rest goes, the file progress says
    where the run is, and checkpoints that were made after the healing stay.
    """
    saved(tmp_path, 2, 4, 6, 8)
    (tmp_path / "progress").write_text("8" if not gone else "4")
    assert record(tmp_path, healed(9, 5, 1, 5)).back_to == 4  # there is no checkpoint 5
    for step in (8, 6)[:gone]:
        shutil.rmtree(tmp_path / f"checkpoints/step_{step:08d}")
    assert finish_healing(tmp_path) == [healed(9, 5, 1, 4)]
    assert steps_in(tmp_path) == [2, 4]
    assert (tmp_path / "progress").read_text() == "4"
    saved(tmp_path, 6, healings=1)
    (tmp_path / "progress").write_text("6")
    finish_healing(tmp_path)
    assert steps_in(tmp_path) == [2, 4, 6]
    assert (tmp_path / "progress").read_text() == "6"


def test_alarms_of_later_steps_are_forgotten_by_a_resume_and_healings_are_not(
    tmp_path: Path,
) -> None:
    """They come again. A damaged file is none, with a line."""
    saved(tmp_path, 4)
    warned = [Alarm(step, 1, "watch/diversity", 0.0, "warn") for step in (3, 12)]
    for alarm in (*warned, healed(9, 5, 1, 4), warned[0]):
        record(tmp_path, alarm)
    rewind_alarms(tmp_path, 5)
    assert read_alarms(tmp_path) == [healed(9, 5, 1, 4), warned[0]]
    ended = Alarm(9, 5, "watch/loss_D", 9e-4, "stop", 1)  # at the step of the healing
    record(tmp_path, ended)
    assert read_alarms(tmp_path) == [healed(9, 5, 1, 4), warned[0], ended]
    path = tmp_path / alarms.FILE
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35"))
    assert read_alarms(tmp_path) == []


# -- real runs ------------------------------------------------------------------------------------

SETTINGS = ("model.loss=hinge", "optim.d_lr=1e-2", "optim.g_lr=1e-9", "train.exact_sum=true",
            "train.log_every=2", "train.watch_steps=4", "train.checkpoint_every=4",
            "train.sample_every=0")  # fmt: skip
"""A G that never learns: D's hinge loss is 0 from step 4 or 6 on, or soon after."""


@pytest.mark.slow
def test_a_killed_healing_ends_in_the_same_bits(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """SIGKILL to two ranks as soon as the healing is written, and the rest on one rank, against one
    process that heals and ends by itself: equal decisions, alarms and bits; exit code 3.
    """
    words = [*training_settings, *SETTINGS]
    train(1, tiny_config, *words, f"run.dir={tmp_path / 'a'}", "train.total_steps=12")
    (warned,) = read_alarms(tmp_path / "a")
    assert (warned.action, warned.step) == ("warn", warned.since + 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    heal = [*words, "train.watch=heal", "train.watch_healings=1"]

    code, output = run(1, tiny_config, *heal, f"run.dir={tmp_path / 'a'}")
    assert code == 3, output
    assert f"(step 18, stopped): train.watch=heal ended the run {tmp_path / 'a'}" in output

    process = start(training(2, tiny_config, *heal, f"run.dir={tmp_path / 'b'}"))
    wait_for(lambda: len(read_alarms(tmp_path / "b")) == 2, "healing")
    kill(process)
    assert not (tmp_path / "b" / "COLLAPSED").exists()
    code, output = run(1, tiny_config, *heal, f"run.dir={tmp_path / 'b'}")
    assert code == 3, output

    for folder in (tmp_path / "a", tmp_path / "b"):
        assert (folder / "COLLAPSED").read_text() == "18"
        assert not (folder / "FINISHED").exists()
        assert steps_in(folder)[-1] == 16
        *_, event = read_document(folder / "checkpoints/step_00000016/state.json")["events"]
        found = [(a.step, a.since, a.action, a.back_to, a.keys) for a in read_alarms(folder)]
        assert found == [
            (warned.step, warned.since, "warn", 0, ()),
            (14, warned.since, "heal", 12, ("optim.d_lr",)),
            (18, 14, "stop", 0, ()),
        ]
        assert event["healed"]["factor"] == 0.25
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(2, 19, 2))
        assert [row.get("lr/D") for row in rows] == [None] * 6 + [0.25e-2] * 3
    assert_bitwise_equal(*(state_of(tmp_path / name, 16) for name in "ab"))


@pytest.mark.slow
def test_a_healing_may_lead_back_to_the_first_step(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Once, in the same process; then train.watch=warn trains the rest at the lowered rate: the
    bits of a run that had this rate from the first step on.
    """
    words = [*training_settings, *SETTINGS, "train.total_steps=16"]
    heal = [*words, f"run.dir={tmp_path / 'a'}", "train.watch_healings=1"]
    code, output = run(1, tiny_config, *heal, "train.watch=heal")
    assert code == 3, output
    assert [alarm.back_to for alarm in read_alarms(tmp_path / "a")] == [0, 0]
    train(1, tiny_config, *heal)
    assert (tmp_path / "a" / "FINISHED").read_text() == "16"
    assert not (tmp_path / "a" / "COLLAPSED").exists()
    train(1, tiny_config, *words, f"run.dir={tmp_path / 'b'}", "optim.d_lr=2.5e-3")
    assert_bitwise_equal(*(state_of(tmp_path / name, 16) for name in "ab"))
