"""Scores of several runs side by side, and on the model card."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evaluating import evaluated, make_run
from launching import REPO, environment

from pipeline import generate
from pipeline.runs.alarms import Alarm, record
from pipeline.runs.announce import project_address, public_address
from pipeline.runs.results import Ledger, Row, best, read_rows

SETTINGS = {"num_images": 100, "weights": "ema", "seed": 0, "labels": "none",
            "reference": {"reference_images": 130, "extractor": "inception", "layer": "2048",
                          "precision": "fp32", "data": "0123456789abcdef"}}  # fmt: skip


def row(step: int, fid: float | None, protocol: str = "p", **more: float) -> Row:
    return {
        "step": step,
        "weights": "ema",
        "protocol": protocol,
        "generator": f"{step:016x}",
        "scores": {"eval/fid_100_full": fid} | more,
        "headline": "eval/fid_100_full",
        "settings": SETTINGS,
    }


def command(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline.evaluate", *map(str, words)],
        env=environment() | {"PYTHONPATH": str(REPO)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs with scores, one by another protocol too; one without, and a file."""
    rows = {
        "a": [row(10, 9.0), row(20, 5.0)],
        "b": [row(10, 4.0, **{"eval/is_100": 2.0}), row(10, 3.0, "q")],
        "c": [row(30, None)],
        "none": [],
    }
    for name, found in rows.items():
        (tmp_path / name).mkdir()
        ledger = Ledger(tmp_path / name)
        for one in found:
            ledger.append(one)
        ledger.close()
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def test_runs_stand_side_by_side_by_protocol(runs: Path) -> None:
    """Best first, with the best step of each run. Nothing but the ledgers is read: no torch."""
    done = command(runs, "--table", *sorted(path.name for path in runs.iterdir()))
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\| +(torch|torch_fidelity|accelerate)$", done.stderr, re.M)
    assert "without scores, left out: none, notes.txt" in done.stderr
    assert done.stdout.splitlines() == [
        "Protocol p: 100 images, against 130 real ones, inception layer 2048 fp32, G_ema, seed 0; "
        "real images 0123456789ab",
        "",
        "| run | best step | of | `fid_100_full` | `is_100` |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| b | 10 | 1 | 4 | 2 |",
        "| a | 20 | 2 | 5 |  |",
        "",
        "Protocol q: 100 images, against 130 real ones, inception layer 2048 fp32, G_ema, seed 0; "
        "real images 0123456789ab",
        "",
        "| run | best step | of | `fid_100_full` |",
        "| --- | ---: | ---: | ---: |",
        "| b | 10 | 1 | 3 |",
    ]


def test_a_table_shows_which_runs_looked_collapsed(runs: Path) -> None:
    record(runs / "a", Alarm(15, 10, "watch/loss_D", 1e-4, "warn"))
    done = command(runs, "--table", "a", "b")
    assert "| b | 10 | 1 | 4 | 2 |  |" in done.stdout
    assert "| a | 20 | 2 | 5 |  | D has won, and G hardly learns (step 15) |" in done.stdout
    assert "| b | 10 | 1 | 3 |\n" in done.stdout


def test_a_table_is_json_and_csv(runs: Path) -> None:
    done = command(runs, "--json", "--csv", "t.csv", "--table", "a", "b")
    document = json.loads(done.stdout)
    assert document["protocols"] == {"p": SETTINGS, "q": SETTINGS}
    found = [(line["name"], line["protocol"], line["step"]) for line in document["scores"]]
    assert found == [("b", "p", 10), ("a", "p", 20), ("b", "q", 10)]
    read = list(csv.DictReader(io.StringIO((runs / "t.csv").read_text())))
    assert [(one["name"], one["eval/fid_100_full"]) for one in read] == [
        ("b", "4.0"),
        ("a", "5.0"),
        ("b", "3.0"),
    ]


def test_runs_without_scores_are_one_message(runs: Path) -> None:
    done = command(runs, "--table", "none")
    assert done.returncode == 2
    assert "--table: none of 1 folders has a score" in done.stderr
    assert "Traceback" not in done.stderr


def test_real_ledgers_make_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of the table and JSON of a run's own scores."""
    run = make_run(tmp_path)
    evaluated("--run", run, "--pending", "--csv", tmp_path / "s.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text())))
    assert [line["step"] for line in lines] == ["10", "20"]
    first = best(read_rows(run))
    assert first is not None
    assert [line["step"] for line in lines if line["best"] == "True"] == [str(first["step"])]
    done = command(tmp_path, "--table", "run")
    value = first["scores"][first["headline"]]
    assert f"| run | {first['step']} | 2 | {value:.5g} |" in done.stdout
    assert "100 images, against 130 real ones, tiny_extractor:Tiny layer 16 fp32" in done.stdout


def test_the_model_card_states_scores_and_training(tmp_path: Path) -> None:
    """Scores of this G with their protocol; data, commit, program and settings; no path."""
    run = make_run(tmp_path)
    evaluated("--run", run, "--pending")
    (run / "log.txt").write_text(
        "commit abcdef123456, Python 3.11\ncommit 0123456789ab-dirty, Python 3.11\n"
    )
    words = ["hub", "--run", str(run), "--out", str(tmp_path / "hub")]
    generate.generate(generate.parse(words))
    card = (tmp_path / "hub" / "README.md").read_text()
    (mine,) = (row for row in read_rows(run) if row["step"] == 20)
    for key, value in mine["scores"].items():
        assert f"| `{key}` | {value:.5g} |" in card
    (other,) = (row for row in read_rows(run) if row["step"] == 10)
    assert f"{other['scores'][other['headline']]:.5g}" not in card
    assert f"Protocol {mine['protocol']}: 100 images, against 130 real ones" in card
    assert "| commit | abcdef123456, 0123456789ab-dirty |" in card
    assert "| data | shards, 130 images |" in card
    assert mine["settings"]["reference"]["data"] in card
    assert "| `optim.g_lr` | 0.0002 |" in card
    assert "| program | dcgan-pipeline " in card
    assert project_address() in card
    assert str(tmp_path) not in card
    alone = (run / "snapshots" / "step_00000020").rename(tmp_path / "step_00000020")
    words = ["hub", "--snapshot", str(alone), "--out", str(tmp_path / "other")]
    generate.generate(generate.parse(words))
    assert "## Scores" not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://host.org/me/x.git", "https://host.org/me/x"),
        ("https://me:secret@host.org/me/x", "https://host.org/me/x"),
        ("git@host.org:me/x.git", "https://host.org/me/x"),
        ("/home/me/x", ""),
        ("file:///home/me/x.git", ""),
    ],
)
def test_the_address_of_the_project_has_no_login_and_no_path(remote: str, address: str) -> None:
    assert public_address(remote) == address
