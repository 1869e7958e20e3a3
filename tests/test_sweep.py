"""configs/sweep.yaml: what W&B's agent makes of it is a command that the trainer understands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from launching import REPO, environment
from wandb.sdk.launch.sweeps import utils

from pipeline.config.loading import load
from pipeline.config.schema import Config, flatten
from pipeline.evaluation.protocol import make_protocol

SWEEP = yaml.safe_load((REPO / "configs" / "sweep.yaml").read_text())


def test_the_sweep_has_the_form_that_wandb_documents() -> None:
    assert set(SWEEP) == {"program", "method", "metric", "parameters", "command"}
    assert SWEEP["method"] in ("grid", "random", "bayes")
    assert set(SWEEP["metric"]) == {"name", "goal"}
    assert (REPO / SWEEP["program"]).is_file()
    assert SWEEP["parameters"].keys() <= flatten(Config()).keys()
    for parameter in SWEEP["parameters"].values():
        assert set(parameter) in ({"values"}, {"distribution", "min", "max"})
        assert "values" in parameter or parameter["min"] < parameter["max"]


def words_of(chosen: dict[str, dict[str, Any]]) -> list[str]:
    """Return the command of a run; the macros are filled in by wandb's own code."""
    macros = utils.create_sweep_command_args({"args": chosen}) | {"program": [SWEEP["program"]]}
    macros["env"] = ["/usr/bin/env"]
    words = []
    for word in utils.create_sweep_command(list(SWEEP["command"])):
        macro = word.startswith("${") and word.endswith("}")
        words += macros[word[2:-1]] if macro else [word]
    return words


def test_a_command_of_the_sweep_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are read by the trainer's code, and the score that they lead to has its name."""
    chosen = {
        key: {"value": parameter["values"][0] if "values" in parameter else parameter["min"]}
        for key, parameter in SWEEP["parameters"].items()
    }
    words = words_of(chosen)
    _, config, *overrides = words[words.index("pipeline/train.py") + 1 :]

    monkeypatch.setenv("WANDB_RUN_ID", "q1w2e3r4")
    monkeypatch.setenv("SWEEP_DIR", "/shared/sweep")
    found = load(REPO / config, overrides)
    assert Path(found.run.dir) == Path("/shared/sweep/q1w2e3r4")
    assert {key: flatten(found)[key] for key in chosen} == {
        key: value["value"] for key, value in chosen.items()
    }
    extractor = SimpleNamespace(
        **dict.fromkeys(("sha256", "preprocessing"), ""),
        **{"name": found.eval.extractor, "layer": "2048", "dim": 2048, "precision": "fp32"},
        **{"logits": "logits_unbiased", "classes": 1008},
    )
    index = SimpleNamespace(num_samples=60_000, fingerprint="f", shape=(64, 64, 3), location="x")
    protocol, _ = make_protocol(found.eval, extractor, index)  # type: ignore[arg-type]
    assert protocol.headline == SWEEP["metric"]["name"]
    assert SWEEP["metric"]["goal"] == ("maximize" if protocol.higher_is_better else "minimize")


STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$SAID"
[ "$(basename "$0")" != accelerate ] || exec "$REAL" -c '
import os, signal, sys, time
folder = os.environ["SWEEP_DIR"] + "/" + os.environ["WANDB_RUN_ID"]
def stop(*_):
    sys.exit(9)
signal.signal(signal.SIGTERM, stop)
print("training", flush=True)
time.sleep(60) if os.environ["TRAINING"] == "endless" else None
os.makedirs(folder)
open(folder + "/FINISHED", "w")
sys.exit(int(os.environ["TRAINING"]))
'
"""


@pytest.mark.parametrize(("training", "scored"), [("0", True), ("3", False), ("endless", False)])
def test_a_run_of_the_sweep_is_trained_then_scored(
    training: str, scored: bool, tmp_path: Path
) -> None:
    """A failed training is not scored, and the agent's SIGTERM reaches the launcher.

    Programs that note their arguments stand in for the two.
    """
    for name in ("accelerate", "python"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    env = environment() | {"SWEEP_DIR": str(tmp_path / "sweep"), "WANDB_RUN_ID": "abc"}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRAINING": training}
    env |= {"SAID": str(tmp_path / "said"), "REAL": sys.executable}
    process = subprocess.Popen(words_of({"x": {"value": 1}}), env=env, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        if training == "endless":
            process.terminate()
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines[0].startswith("accelerate launch --main_process_port=0")
    assert "pipeline/train.py --config configs/dcgan_64.yaml" in lines[0]
    assert lines[0].endswith(" x=1")
    expected = [f"python -m pipeline.evaluate --run {tmp_path}/sweep/abc"] if scored else []
    assert lines[1:] == expected
    assert (process.returncode == 0) == scored
