"""The command ``evaluate``: what it scores, interruptions, several at once, W&B, wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import (
    MODEL,
    TINY,
    add_checkpoint,
    add_snapshot,
    evaluated,
    generator_of,
    make_config,
    make_run,
)
from launching import REPO, STATE, environment, free_port, rank_process
from PIL import Image
from ranks import on_ranks
from safetensors.torch import save_file

from pipeline import evaluate
from pipeline.config.loading import dump
from pipeline.config.schema import flatten
from pipeline.evaluation import candidates, run_scores
from pipeline.models.dcgan import Discriminator
from pipeline.runs import checkpoint, snapshot
from pipeline.runs.results import Key, Ledger, kept_steps, read_rows
from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.errors import CheckpointError, DataError, EvaluationError, RunFolderError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: several are slower for small networks on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with snapshots of steps 10 and 20."""
    return make_run(tmp_path)


@contextmanager
def process(*words: object, ranks: int = 1, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in its own process group, which is killed when the block ends.

    It asks for the tiny extractor: the configuration of a run cannot.
    """
    script = str(REPO / "pipeline" / "evaluate.py")
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--master_port", str(free_port()), "--"]
    tests = {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    running = subprocess.Popen(
        [*launcher, script, *map(str, words), f"eval.extractor={TINY}"],
        env=environment() | tests | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield running
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
        if running.stdout and not running.stdout.closed:
            running.communicate()


def finished(running: subprocess.Popen[str]) -> str:
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output
    return output


def wait_for(running: subprocess.Popen[str], met: Any) -> None:
    deadline = time.monotonic() + 90
    while not met():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scores(run: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row["scores"] for row in read_rows(run)}


# -- what is evaluated --------------------------------------------------------------------------


def test_pending_scores_what_the_ledger_lacks_and_nothing_twice(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First the newest, then the others, then nothing. Each step gets a grid and a row."""
    evaluated("--run", run)
    assert list(scores(run)) == [20]
    evaluated("--run", run, "--pending")
    assert sorted(scores(run)) == [10, 20]
    before = (run / "evaluations.jsonl").read_bytes()
    capsys.readouterr()
    evaluated("--run", run, "--pending")
    assert (run / "evaluations.jsonl").read_bytes() == before
    out = capsys.readouterr().out.splitlines()
    assert out[-3].split() == ["step", "FD", "IS", "KD", "PRECISION", "RECALL"]
    assert [line.split()[0] for line in out[-2:]] == ["10", "20"]
    assert sum(line.endswith("best") for line in out) == 1
    assert sorted(p.name for p in (run / "evaluations").iterdir()) == [
        "step_00000010.png",
        "step_00000020.png",
    ]


def test_a_score_is_of_weights_not_of_a_step_number(run: Path, tmp_path: Path) -> None:
    """A step that was trained anew is scored anew; the old score returns with the old weights."""
    evaluated("--run", run, "--pending")
    (old,) = (row for row in read_rows(run) if row["step"] == 20)
    first = (run / "snapshots" / "step_00000020").rename(tmp_path / "step_00000020")
    add_snapshot(run, make_config(tmp_path), 20, generator_of(3))
    evaluated("--run", run, "--pending")
    (new,) = (row for row in read_rows(run) if row["step"] == 20)
    assert new["scores"] != old["scores"]
    assert new["generator"] != old["generator"]
    shutil.rmtree(run / "snapshots" / "step_00000020")
    first.rename(run / "snapshots" / "step_00000020")
    evaluated("--run", run, "--pending")
    assert next(row for row in read_rows(run) if row["step"] == 20) == old


def test_a_checkpoint_is_scored_with_the_architecture_it_was_trained_with(tmp_path: Path) -> None:
    """The run's config.yaml may be of a later training in the same folder."""
    run = make_run(tmp_path, ())
    state = STATE | {"config": flatten(make_config(tmp_path))}
    networks = {"G": generator_of(5), "D": Discriminator(MODEL), "G_ema": generator_of(6)}
    checkpoint.save(run, 5, networks, {}, state)
    config = make_config(tmp_path)
    later = replace(config, model=replace(MODEL, ngf=8, z_distribution="normal"))
    (run / "config.yaml").write_text(dump(later))
    evaluated("--run", run)
    add_snapshot(run, config, 6)
    evaluated("--checkpoint", run / "snapshots" / "step_00000006")
    assert scores(run)[5] == scores(run)[6]


def test_the_same_evaluation_gives_the_same_numbers(tmp_path: Path) -> None:
    """All digits are the same in two runs with the same weights, each with its own reference."""
    first, second = make_run(tmp_path / "a", (10,)), make_run(tmp_path / "b", (10,))
    evaluated("--run", first)
    evaluated("--run", second)
    assert scores(first) == scores(second)
    assert read_rows(first)[0]["protocol"] == read_rows(second)[0]["protocol"]


def test_another_setting_is_another_row(run: Path) -> None:
    """Scores with another N or seed get another protocol id, so they are not compared."""
    evaluated("--run", run)
    evaluated("--run", run, "eval.seed=1")
    evaluated("--run", run, "eval.num_images=90")
    assert len({row["protocol"] for row in read_rows(run)}) == 3


def test_a_step_without_a_snapshot_is_scored_from_its_checkpoint(run: Path) -> None:
    """Checkpoints written by the clock or after a signal have no snapshot. Their G_ema is used."""
    add_checkpoint(run, 15)
    add_checkpoint(run, 20)
    found = candidates.find_in_run(run, "ema")
    assert [(c.step, c.path.parent.name) for c in found] == [
        (10, "snapshots"),
        (15, "checkpoints"),
        (20, "snapshots"),
    ]
    evaluated("--checkpoint", run / "checkpoints" / "step_00000015")
    evaluated("--run", run, "--pending", "eval.weights=raw")
    rows = {(row["step"], row["weights"]) for row in read_rows(run)}
    assert rows == {(15, "ema"), (15, "raw"), (20, "raw")}


def test_a_snapshot_scores_as_its_checkpoint(tmp_path: Path) -> None:
    """BatchNorm statistics depend on the weights only, not on the file they were read from."""
    run = make_run(tmp_path, ())
    path = add_checkpoint(run, 15)  # its G_ema is that of step 16
    evaluated("--checkpoint", path)
    add_snapshot(run, make_config(tmp_path), 16)
    evaluated("--run", run)
    assert scores(run)[15] == scores(run)[16]


def test_a_folder_of_images_is_scored_by_the_same_protocol(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images of a snapshot, written as PNG files, have the scores of the snapshot."""
    evaluated("--run", run)
    G, model = candidates.open_generator(
        candidates.find_in_run(run, "ema")[-1], run, "ema", torch.device("cpu")
    )
    folder = tmp_path / "png"
    folder.mkdir()
    for k, pixels in enumerate(candidates.generated_images(G, model, 0)(0, 100)):
        Image.fromarray(pixels[:, :, 0]).save(folder / f"{k:04d}.png")
    capsys.readouterr()
    evaluated("--run", run, "--images", folder)
    printed = dict(re.findall(r"^(eval/\S+) +(\S+)$", capsys.readouterr().out, re.M))
    assert printed == {key: f"{value:.5g}" for key, value in scores(run)[20].items()}


def test_a_snapshot_alone_is_scored_and_printed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A snapshot outside a run folder has no ledger, and none is created."""
    alone = (run / "snapshots" / "step_00000010").rename(tmp_path / "step_00000010")
    evaluated("--checkpoint", alone)
    assert "eval/fd_tiny-extractor-Tiny_16_100_full " in capsys.readouterr().out
    assert not list(tmp_path.glob("evaluations*"))


def test_a_reference_file_can_be_made_moved_and_named(run: Path, tmp_path: Path) -> None:
    """``eval.reference`` gives the same scores as the cache, which is then not used."""
    evaluated("--run", run)
    other = tmp_path / "elsewhere.safetensors"
    evaluated("reference", "--run", run, "--out", other)
    before = scores(run)
    (run / "evaluations.jsonl").unlink()
    evaluated("--run", run, f"eval.reference={other}", f"eval.cache_dir={tmp_path / 'unused'}")
    assert scores(run) == before
    assert not (tmp_path / "unused").exists()


def test_a_run_without_checkpoints_can_have_a_reference(tmp_path: Path) -> None:
    """The reference needs the run's configuration only, so it can be made before the training."""
    run, out = make_run(tmp_path, ()), tmp_path / "r.safetensors"
    evaluated("reference", "--run", run, "--out", out)
    assert out.is_file()


def test_a_damaged_reference_of_the_cache_is_computed_anew(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A truncated file is replaced by one with the same bytes as before."""
    evaluated("--run", run)
    (cached,) = (tmp_path / "references").glob("*.safetensors")
    content = cached.read_bytes()
    cached.write_bytes(content[:-7])
    evaluated("--run", run, "--pending")
    assert f"set aside as {cached.name}.damaged; computing it anew" in capsys.readouterr().err
    assert cached.read_bytes() == content


# -- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run evaluated by two processes, with W&B offline."""
    run = make_run(tmp_path_factory.mktemp("by_two"))
    offline = ("tracking.wandb=offline", "tracking.timeout=30")
    with process("--run", run, "--pending", "eval.batch_size=32", *offline, ranks=2) as running:
        output = finished(running)
    assert output.count("protocol ") == 1  # one rank prints
    return run


@pytest.mark.slow
def test_two_processes_compute_the_same_scores_as_one(by_two: Path, run: Path) -> None:
    """All bits are the same; with 100 and 130 images last batches are short or missing."""
    evaluated("--run", run, "--pending", "eval.batch_size=32")
    assert scores(run) == scores(by_two)
    assert {row["processes"] for row in read_rows(by_two)} == {2}


@pytest.mark.slow
@pytest.mark.faults
def test_two_evaluations_share_the_steps_and_a_killed_one_loses_only_its_own(
    tmp_path: Path,
) -> None:
    """After kill -9 of one of them, each step is recorded exactly once."""
    run = make_run(tmp_path, (10, 20, 30, 40))
    words = ("--run", run, "--pending", "eval.batch_size=10")
    with (
        process(*words, TINY_DELAY="0.1") as doomed,
        process(*words, TINY_DELAY="0.1") as survivor,
    ):
        wait_for(doomed, lambda: (run / "evaluations.jsonl").exists())
        time.sleep(0.3)  # each is in the middle of a step now
        os.killpg(doomed.pid, signal.SIGKILL)
        lost = doomed.communicate()[0]
        output = finished(survivor)
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["step"] for line in lines) == [10, 20, 30, 40]
    # Each was also computed only once. (The killed one may not have printed its last line.)
    done = re.findall(r"^step (\d+): ", output + lost, re.M)
    assert len(done) == len(set(done)) >= 3


@pytest.mark.slow
def test_watch_waits_for_snapshots_and_leaves_in_order_on_a_signal(tmp_path: Path) -> None:
    """New snapshots are scored; SIGTERM ends the wait with STOPPED_EXIT_CODE."""
    run, config = make_run(tmp_path, ()), make_config(tmp_path)
    with process("--run", run, "--watch", "--every", "1", STOPPED_EXIT_CODE="75") as running:
        wait_for(running, lambda: list((tmp_path / "references").glob("*.safetensors")))
        for step in (10, 20):
            add_snapshot(run, config, step)
            wait_for(running, lambda step=step: step in scores(run))
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 75, output
    assert "stopped by SIGTERM; run the same command again" in output


@pytest.mark.slow
@pytest.mark.faults
def test_a_stopped_evaluation_on_two_processes_is_no_success_for_a_scheduler(run: Path) -> None:
    """The exit code is not 0, and no rank exits before rank 0 has closed the ledger and W&B."""
    offline = ("tracking.wandb=offline", "tracking.timeout=30")
    words = ("--run", run, "--watch", *offline)
    with process(*words, ranks=2, STOPPED_EXIT_CODE="75") as running:
        wait_for(running, lambda: sorted(scores(run)) == [10, 20])
        rank_process(running, 1).send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 1, output  # the launcher's for any code but 0
    assert "exitcode  : 75" in output
    assert "stopped by another rank's signal; run the same command again" in output
    assert len((run / ".evaluations.sent").read_text().splitlines()) == 2


@pytest.mark.slow
def test_watch_goes_on_past_a_damaged_snapshot(tmp_path: Path) -> None:
    """It continues to the end of the training, then exits with 2 and a line about the snapshot."""
    run, config = make_run(tmp_path, (10, 20)), make_config(tmp_path)
    (run / "snapshots" / "step_00000010" / "generator.safetensors").write_bytes(b"no tensors")
    with process("--run", run, "--watch", "--every", "1") as running:
        wait_for(running, lambda: 20 in scores(run))
        time.sleep(2)
        add_snapshot(run, config, 30)
        wait_for(running, lambda: 30 in scores(run))
        (run / "FINISHED").write_text("30")
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 2, output
    assert sorted(scores(run)) == [20, 30]
    assert output.count("step 10 passed over") == 1
    assert "error: " in output.splitlines()[-1]


def test_a_checkpoint_that_the_training_removes_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint may vanish after it was listed. The others are scored, without an error."""
    run = make_run(tmp_path, ())
    for step in (10, 20):
        add_checkpoint(run, step)
    open_generator = candidates.open_generator

    def remove_and_open(candidate: candidates.Candidate, *rest: Any) -> Any:
        if candidate.step == 10:
            shutil.rmtree(candidate.path)
        return open_generator(candidate, *rest)

    monkeypatch.setattr(candidates, "open_generator", remove_and_open)
    evaluated("--run", run, "--pending", "eval.weights=raw")
    assert [row["step"] for row in read_rows(run)] == [20]
    assert "step 10 passed over: removed meanwhile" in capsys.readouterr().err


def two_nodes_evaluate(folder: str) -> None:
    """Evaluate with each rank in its own folder, like nodes that do not see the same files."""
    os.chdir(Path(folder) / os.environ["RANK"])
    run_scores.VISIBLE_SECONDS = 0.1
    try:
        evaluated("--run", "run", "--pending")
    except CheckpointError as error:
        Path("error").write_text(str(error))


@pytest.mark.slow
def test_a_candidate_that_one_node_does_not_see_is_skipped_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the ranks would wait for each other in different collectives."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        monkeypatch.chdir(tmp_path / rank)
        make_run(Path())
    shutil.rmtree(tmp_path / "1" / "run" / "snapshots" / "step_00000010")
    on_ranks(2, two_nodes_evaluate, str(tmp_path))
    assert sorted(scores(tmp_path / "0" / "run")) == [20]
    for rank in ("0", "1"):
        assert (
            "step_00000010: not seen here within 0.1 s" in (tmp_path / rank / "error").read_text()
        )


@pytest.mark.slow
@pytest.mark.faults
def test_an_error_of_all_ranks_is_printed_once(run: Path, tmp_path: Path, make_shards: Any) -> None:
    """Shards of another shape are found by every rank; rank 0 prints the message."""
    make_shards(tmp_path / "rgb", [20], (64, 64, 3))
    with process("--run", run, f"data.shards={tmp_path / 'rgb'}", ranks=2) as running:
        output, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert output.count("images of 64x64 with 3 channels") == 1, output


@pytest.mark.parametrize("end", ["FINISHED", "COLLAPSED"])
def test_watch_ends_with_the_training(run: Path, end: str) -> None:
    """It scores all steps and returns when the run has the file that says how it ended."""
    (run / end).write_text("20")
    evaluated("--run", run, "--watch")
    assert sorted(scores(run)) == [10, 20]


def test_help_and_mistakes_do_not_import_torch(tmp_path: Path) -> None:
    """So the answer comes at once: exit code 0 or 2, without a traceback."""
    code = (
        "import sys; from pipeline import evaluate\n"
        "try: evaluate.main()\n"
        "finally: print(sorted({'torch', 'torch_fidelity', 'wandb'} & set(sys.modules)))"
    )
    helps = [[*command, "--help"] for command in ([], ["score"], ["reference"], ["probe"])]
    mistakes = [[], ["--run", str(tmp_path / "x")], ["--run", "x" * 300], ["--every", "nan"]]
    for words, status in [(words, 0) for words in helps] + [(words, 2) for words in mistakes]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        assert "Traceback" not in done.stderr


def test_score_is_the_command_without_a_name() -> None:
    """The same options, whether the name is given or not; a value is no command."""
    words = ["--run", "runs/x", "--pending", "eval.seed=1"]
    assert vars(evaluate.parse(words)) == vars(evaluate.parse(["score", *words]))
    assert evaluate.parse(["--config", "probe", "--images", "reference"]).command == "score"


def test_the_first_help_page_names_every_command_and_the_options_of_score(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    text = capsys.readouterr().out
    for word in ("reference", "fetch-weights", "probe", "--pending", "--watch", "--every S"):
        assert word in text


def test_training_imports_nothing_of_the_evaluation() -> None:
    """A training starts without torch-fidelity, even where it is not installed."""
    code = (
        "import sys\n"
        "import pipeline.train, pipeline.training.run, pipeline.training.gan\n"
        "import pipeline.data.loader, pipeline.runtime.launch\n"
        "heavy = ('torch_fidelity', 'pipeline.evaluation')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the ledger ---------------------------------------------------------------------------------


def row(step: int, value: float | None, protocol: str = "p") -> dict[str, Any]:
    return {
        "step": step,
        "weights": "ema",
        "protocol": protocol,
        "scores": {"eval/fid": value},
        "headline": "eval/fid",
    }


def test_a_row_is_added_once_and_survives_a_torn_line(tmp_path: Path) -> None:
    """After a crash the last line may be incomplete. The next row starts on a new line."""
    ledger = Ledger(tmp_path)
    assert ledger.append(row(10, 3.0))
    assert not ledger.append(row(10, 4.0))
    with ledger.path.open("a") as file:
        file.write('{"step": 20, "wei')
    assert [r["step"] for r in ledger.rows()] == [10]
    assert ledger.append(row(20, 2.0))
    assert [r["scores"]["eval/fid"] for r in ledger.rows()] == [3.0, 2.0]
    ledger.close()


def test_a_claim_excludes_other_processes_until_it_is_released(tmp_path: Path) -> None:
    """Appending a row, which locks the same file, does not end the claim."""
    code = (
        "import sys; from pathlib import Path; from pipeline.runs.results import Key, Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "print([ledger.claim(Key(step, 'ema', 'p')) for step in (10, 20)])"
    )

    def other() -> str:
        words = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    ledger = Ledger(tmp_path)
    assert ledger.claim(Key(10, "ema", "p"))
    ledger.append(row(5, 1.0))
    assert other() == "[False, True]"
    ledger.release(Key(10, "ema", "p"))
    assert other() == "[True, True]"
    ledger.close()


def test_keep_best_keeps_the_best_and_the_unscored_checkpoints(tmp_path: Path) -> None:
    """The best by each protocol of the ledger. Without keep_best the ledger has no influence."""
    for step in range(1, 8):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    ledger = Ledger(tmp_path)
    for step, fid in ((1, 9.0), (2, 5.0), (3, 7.0), (5, 8.0)):  # 4, 6 and 7 have no score
        ledger.append(row(step, fid))
    ledger.append(row(3, 1.0, "q"))
    ledger.close()
    checkpoint.prune(tmp_path, 7, keep=1, keep_every=0, keep_best=True)
    assert [step_of(p) for p in committed(tmp_path)] == [2, 3, 4, 6, 7]
    assert kept_steps(tmp_path, {1: {""}, 5: {""}}) == {5}  # the best of those that are left
    checkpoint.prune(tmp_path, 7, keep=1, keep_every=0)
    assert [step_of(p) for p in committed(tmp_path)] == [7]


# -- W&B ----------------------------------------------------------------------------------------


def records(run: Path) -> list[list[dict[str, Any]]]:
    """Return the records of each offline W&B run in the folder, oldest first."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json"]
    return [
        [
            json.loads(line)
            for line in subprocess.run(
                [*command, path], capture_output=True, text=True, check=True
            ).stdout.splitlines()
        ]
        for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))
    ]


@pytest.mark.slow
def test_wandb_gets_a_run_of_its_own_beside_the_training(by_two: Path) -> None:
    """``<id>-eval``, in the group of the training, has scores, best scores and grids by step."""
    run = by_two
    evaluated("--run", run, "--pending", "eval.batch_size=32", "tracking.wandb=offline")
    # The second evaluation had nothing to log, so it made no W&B run.
    (found,) = records(run)
    (opened,) = [r["run"] for r in found if r["type"] == "run"][:1]
    assert (opened["run_id"], opened["run_group"], opened["job_type"]) == (
        "run-abc-eval",
        "run-abc",
        "eval",
    )
    rows = [r["history"]["item"] for r in found if r["type"] == "history"]
    assert [item["train/step"] for item in rows] == [10, 20]
    key = "eval/fd_tiny-extractor-Tiny_16_100_full"
    expected = {step: values[key] for step, values in scores(run).items()}
    assert {item["train/step"]: item[key] for item in rows} == pytest.approx(expected)
    best = min(expected, key=lambda step: expected[step])
    assert (rows[-1][f"{key}_best"], rows[-1][f"{key}_best_step"]) == (
        pytest.approx(expected[best]),
        best,
    )
    assert "samples/grid" in json.dumps(rows[-1])
    metrics = json.dumps([r for r in found if r["type"] == "metric"])
    assert "eval/*" in metrics
    assert "train/step" in metrics


# -- wrong input --------------------------------------------------------------------------------


def refusal(*words: object, kind: type[Exception] = EvaluationError) -> str:
    """Return the message of the error that the command raises."""
    with pytest.raises(kind) as caught:
        evaluated(*words)
    return str(caught.value)


def test_an_empty_run_says_when_the_first_checkpoint_comes(tmp_path: Path) -> None:
    """The message names train.checkpoint_every and its value."""
    run = make_run(tmp_path, ())
    assert re.search(
        r"no checkpoint .* after train.checkpoint_every \(1000\) steps", refusal("--run", run)
    )


def test_a_folder_that_is_no_run_lists_those_beside_it(run: Path, tmp_path: Path) -> None:
    """The path may be mistyped, so the message lists the run folders beside it."""
    assert "runs beside it: " + str(run) in refusal("--run", tmp_path / "rum")


def test_with_too_few_images_there_is_no_fid(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """KID is the headline score then, and the output says why."""
    evaluated("--run", run, "eval.num_images=30")
    (found,) = read_rows(run)
    assert not any("/fd_" in key for key in found["scores"])
    assert found["headline"] == "eval/kd_tiny-extractor-Tiny_16_30_full"
    assert re.search(
        r"left out: fid: needs 32 generated and as many real images", capsys.readouterr().out
    )


def test_metrics_are_a_list(run: Path) -> None:
    """Only they are computed. What was asked for and is impossible ends the command."""
    evaluated("--run", run, "eval.metrics=[density_coverage,kid]")
    (row,) = read_rows(run)
    names = {key.removeprefix("eval/").split("_")[0] for key in row["scores"]}
    assert names == {"kd", "density", "coverage"}
    assert row["headline"] == "eval/kd_tiny-extractor-Tiny_16_100_full"
    assert "mind: needs 1000" in refusal("--run", run, "eval.metrics=[mind]")


@pytest.mark.parametrize("count", [2, 3, 5, 9, 10, 19])
def test_a_few_images_are_one_message(run: Path, count: int) -> None:
    """Otherwise torch-fidelity raises from kthvalue, or returns NaN as Inception Score."""
    message = refusal("--run", run, f"eval.num_images={count}")
    assert f"kid: needs 20 generated and as many real images, not {count} and 130" in message
    assert not (run / "evaluations.jsonl").exists()


def test_statistics_of_others_are_a_reference(run: Path, tmp_path: Path) -> None:
    """mu and sigma give the same FD as the features, under a name with the file's sha256."""
    evaluated("--run", run)
    path = tmp_path / "theirs.npz"
    evaluated("reference", "--run", run, "--out", path)
    evaluated("--run", run, f"eval.reference={path}")
    ours, theirs = read_rows(run)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    key = f"eval/fd_tiny-extractor-Tiny_16_100_ref-{digest[:8]}"
    assert theirs["headline"] == key
    assert theirs["scores"][key] == ours["scores"][ours["headline"]]
    assert not any("/kd_" in name or "/precision_" in name for name in theirs["scores"])
    message = refusal("--run", run, f"eval.reference={path}", "eval.metrics=[kid]")
    assert "kid: needs the features of single images" in message


def test_shards_of_another_shape_are_refused(run: Path, tmp_path: Path, make_shards: Any) -> None:
    """The message has both shapes."""
    make_shards(tmp_path / "rgb", [20], (64, 64, 3))
    message = refusal("--run", run, f"data.shards={tmp_path / 'rgb'}", kind=DataError)
    assert "images of 64x64 with 3 channels, the model wants 32x32 with 1 channel" in message


def test_a_reference_of_other_data_is_refused(run: Path, tmp_path: Path, make_shards: Any) -> None:
    """The message lists the settings that differ."""
    evaluated("reference", "--run", run, "--out", tmp_path / "r.safetensors")
    make_shards(tmp_path / "other", [130, 1], (32, 32, 1))
    words = ("--run", run, f"eval.reference={tmp_path / 'r.safetensors'}")
    assert "data: " in refusal(*words, f"data.shards={tmp_path / 'other'}")
    assert "reference_images: 130, needed 99" in refusal(*words, "eval.reference_images=99")


def test_a_snapshot_of_another_architecture_is_one_line(run: Path) -> None:
    """PyTorch's list of all keys that differ is not printed."""
    path = run / "snapshots" / "step_00000020" / "config.yaml"
    changed = path.read_text().replace("ngf: 4", "ngf: 8")
    path.write_text(changed.partition("\n")[2])
    message = refusal("--run", run, kind=CheckpointError)
    assert "model.ngf is 8, but the weights were trained with 4" in message
    assert "\n" not in message


def test_a_damaged_snapshot_does_not_prevent_the_scores_of_others(run: Path) -> None:
    """The command scores the others, sets the damaged one aside, fails and names it."""
    path = run / "snapshots" / "step_00000010" / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    message = refusal("--run", run, "--pending", kind=CheckpointError)
    assert "Set aside as step_00000010.damaged" in message
    assert list(scores(run)) == [20]
    assert [path.name for path in (run / "snapshots").iterdir() if path.suffix] == [
        "step_00000010.damaged"
    ]


def test_the_checkpoint_takes_the_place_of_a_damaged_snapshot(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same step: nothing is missing, so the command succeeds."""
    add_checkpoint(run, 10)
    path = run / "snapshots" / "step_00000010" / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    evaluated("--run", run, "--pending")
    assert "Set aside as step_00000010.damaged" in capsys.readouterr().err
    assert sorted(scores(run)) == [10, 20]


@pytest.mark.parametrize("odd", ["link to nothing", "file", "FIFO"])
def test_what_is_no_folder_among_the_snapshots_does_not_keep_the_command(
    odd: str, run: Path
) -> None:
    """The command ends, and scores the others."""
    path = run / "snapshots" / "step_00000030"
    if odd == "file":
        path.touch()
    elif odd == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    evaluated("--run", run, "--pending")
    assert sorted(scores(run)) == [10, 20]


@pytest.mark.parametrize("name", ["layers.project.weight", "layers.norm_4.running_var"])
def test_a_diverged_generator_gets_no_score(run: Path, name: str) -> None:
    """NaN in weights or statistics is refused: its uint8 images would have a finite score."""
    state = snapshot.load_snapshot(run / "snapshots" / "step_00000020")[0].state_dict()
    state[name][0] = float("nan")
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, run / "snapshots" / "step_00000020" / "generator.safetensors")
    assert "training had diverged" in refusal("--run", run, kind=CheckpointError)


def test_a_folder_that_is_no_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    """So is a snapshot if G itself is to be scored, because it contains G_ema only."""
    assert "Give a folder step_N" in refusal("--run", run, "--checkpoint", tmp_path)
    snapshot = run / "snapshots" / "step_00000010"
    assert "a snapshot contains G_ema only" in refusal("--checkpoint", snapshot, "eval.weights=raw")


def test_too_few_images_are_refused(run: Path, tmp_path: Path) -> None:
    """The message has the number of those that can be read."""
    folder = tmp_path / "few"
    folder.mkdir()
    for k in range(40):
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / f"{k}.png")
    (folder / "2.png").write_bytes(b"no image")
    message = refusal("--run", run, "--images", folder)
    assert f"eval.num_images is 100, but --images {folder} has 39 images" in message
    assert "set eval.num_images=39 (scores of different N are not comparable)" in message
    refusal("--run", run, "--images", tmp_path / "none", kind=DataError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_is_refused(run: Path) -> None:
    """The command fails before it computes scores that it could not record."""
    run.chmod(0o500)
    assert "evaluations cannot be recorded" in refusal("--run", run, kind=RunFolderError)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--config", "x.yaml"],
        ["--run", "x", "--pending", "--watch"],
        ["--run", "x", "--images", "a", "--checkpoint", "b"],
        ["fetch-weights"],
        ["reference"],
        ["reference", "--config", "x.yaml", "--pending"],
        ["probe", "--run", "x"],
        ["probe", "--run", "x", "--test", "y", "--C", "1,0"],
        ["probe", "--run", "x", "--test", "y", "--num-train", "-1"],
        ["--run", "x", "--every", "-1"],
        ["--run", "x", "--run", "y"],
        ["--run", "x", "--images", "a", "--images", "b"],
        ["reference", "--run", "x", "--out", "a", "--out", "b"],
    ],
)
def test_invalid_command_lines_are_refused(words: list[str]) -> None:
    """Missing, contradictory and out-of-range options end the command with code 2."""
    with pytest.raises(SystemExit) as caught:
        evaluated(*words)
    assert caught.value.code == 2
