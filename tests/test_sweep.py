"""configs/sweep.yaml: what W&B's agent makes of it is a command that the trainer understands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from launching import REPO
from wandb.sdk.launch.sweeps import utils

from pipeline.config.loading import load
from pipeline.config.schema import Config, flatten

SWEEP = yaml.safe_load((REPO / "configs" / "sweep.yaml").read_text())


def test_the_sweep_has_the_form_that_wandb_documents() -> None:
    assert set(SWEEP) == {"program", "method", "parameters", "command"}
    assert SWEEP["method"] in ("grid", "random", "bayes")
    assert (REPO / SWEEP["program"]).is_file()
    assert SWEEP["parameters"].keys() <= flatten(Config()).keys()
    for parameter in SWEEP["parameters"].values():
        assert set(parameter) in ({"values"}, {"distribution", "min", "max"})
        assert "values" in parameter or parameter["min"] < parameter["max"]


def test_a_command_of_the_sweep_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The macros are filled in by wandb's own code, the words read by the trainer's."""
    chosen = {
        key: {"value": parameter["values"][0] if "values" in parameter else parameter["min"]}
        for key, parameter in SWEEP["parameters"].items()
    }
    macros = utils.create_sweep_command_args({"args": chosen}) | {"program": [SWEEP["program"]]}
    macros["env"] = ["/usr/bin/env"]
    words = []
    for word in utils.create_sweep_command(SWEEP["command"]):
        macro = word.startswith("${") and word.endswith("}")
        words += macros[word[2:-1]] if macro else [word]
    assert words[:3] == ["/usr/bin/env", "accelerate", "launch"]
    _, config, *overrides = words[words.index("pipeline/train.py") + 1 :]

    monkeypatch.setenv("WANDB_RUN_ID", "q1w2e3r4")
    monkeypatch.setenv("SWEEP_DIR", "/shared/sweep")
    found = load(REPO / config, overrides)
    assert Path(found.run.dir) == Path("/shared/sweep/q1w2e3r4")
    assert {key: flatten(found)[key] for key in chosen} == {
        key: value["value"] for key, value in chosen.items()
    }
