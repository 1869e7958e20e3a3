"""train.profile_steps: a trace and a table of some steps, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from launching import assert_bitwise_equal, state_of, train

from pipeline.config.loading import load
from pipeline.runtime.errors import ConfigError
from pipeline.training.meter import Meter
from pipeline.training.step_profile import StepProfile

STEPS = 6


@pytest.mark.slow
def test_steps_are_profiled_once_over_a_resume_and_the_bits_stay(
    tiny_config: Path, training_settings: list[str], tmp_path: Path
) -> None:
    """Steps 1 to 4 in two parts: steps and convolutions in the traces, the last state as usual."""
    words = [training_settings[0], "train.checkpoint_every=0", "train.log_every=2"]
    train(1, tiny_config, *words, f"train.total_steps={STEPS}", f"run.dir={tmp_path / 'plain'}")
    assert not (tmp_path / "plain" / "profile").exists()
    run_dir = tmp_path / "profiled"
    for total in (3, STEPS):
        settings = (f"train.total_steps={total}", "train.profile_steps=[1,4]")
        output = train(1, tiny_config, *words, *settings, f"run.dir={run_dir}")
        assert output.count("profile of steps ") == 1
        assert "ERROR" not in output
        assert "USDT" not in output
    names = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert names == ["steps_1-3.json", "steps_1-3.txt", "steps_4-4.json", "steps_4-4.txt"]
    for name, steps in (("steps_1-3", {"step 1", "step 2", "step 3"}), ("steps_4-4", {"step 4"})):
        trace = json.loads((run_dir / "profile" / f"{name}.json").read_text())
        found = {event.get("name", "") for event in trace["traceEvents"]}
        assert {event for event in found if event.startswith("step ")} == steps
        assert "aten::convolution_backward" in found
        table = (run_dir / "profile" / f"{name}.txt").read_text()
        assert "aten::convolution_backward" in table
    assert_bitwise_equal(state_of(run_dir, STEPS), state_of(tmp_path / "plain", STEPS))
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        assert row["perf/tflops"] > 0
        assert "perf/mfu" not in row  # the peak of a CPU is unknown


@pytest.mark.parametrize(("main", "done"), [(False, 0), (True, 4)])
def test_other_ranks_and_later_resumes_profile_nothing(
    main: bool, done: int, tiny_config: Path, tmp_path: Path
) -> None:
    """Rank 1 of a launch; a resume after the last of the steps."""
    config = load(tiny_config, [f"run.dir={tmp_path}", "train.profile_steps=[2,3]"])
    rank = SimpleNamespace(is_main_process=main, device=torch.device("cpu"))
    profile = StepProfile(config, rank, Meter(Accelerator(cpu=True), 1), done)  # type: ignore[arg-type]
    for step in range(done + 1, 7):
        profile.begin(step)
        profile.end(step)
    profile.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["[3]", "[0,2]", "[5,4]", "[1,101]"])
def test_a_span_that_is_none_is_refused(value: str, tiny_config: Path) -> None:
    """Two steps, in order, at most 100."""
    with pytest.raises(ConfigError, match=r"train.profile_steps .* must be \[\] or \[first,last\]"):
        load(tiny_config, [f"train.profile_steps={value}"])
