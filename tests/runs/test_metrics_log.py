"""metrics.jsonl, sample grids and W&B, each for real: real kills, full disks and dead servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import Config, RunConfig, TrackingConfig
from pipeline.runs.identity import make_run_id
from pipeline.runs.metrics_log import MetricsLog, NullMetricsLog
from pipeline.runs.results import Ledger
from pipeline.runs.wandb_log import wandb_mode
from pipeline.runtime.errors import RunFolderError

FAKE_KEY = "a" * 40
PRELUDE = """
import os, signal, sys, time, psutil
from pathlib import Path
import numpy as np
from pipeline.config.schema import Config, RunConfig, TrackingConfig
from pipeline.runs.wandb_log import WandbLog
from pipeline.runtime.errors import exit_on_user_error
from pipeline.runs.metrics_log import MetricsLog
from pipeline.runs import wandb_log

def config(wandb, timeout=30.0):
    return Config(
        run=RunConfig(dir=sys.argv[1]),
        tracking=TrackingConfig(wandb=wandb, timeout=timeout, project="p", tags=["t"]),
    )

def row(step):
    return {"loss/G": 1 / step, "loss/D": 0.5}
"""


def config_of(folder: Path, **tracking: Any) -> Config:
    tracking = {"wandb": "disabled"} | tracking
    return Config(run=RunConfig(dir=str(folder)), tracking=TrackingConfig(**tracking))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without whatever the developer has set up for W&B."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return clean | {"NETRC": "/nonexistent", "WANDB_CONFIG_DIR": "/nonexistent"} | extra


def script(
    folder: Path, body: str, timeout: float = 60, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a process of its own, with ``folder`` as the run folder."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + body, str(folder)],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def offline_runs(folder: Path) -> list[list[dict[str, Any]]]:
    """The records of each offline run in the folder, oldest first, as ``wandb sync`` reads them."""
    wandb = Path(sys.executable).with_name("wandb")
    return [
        [
            json.loads(line)
            for line in subprocess.run(
                [wandb, "leet", "inspect", "--json", path],
                env=environment(),
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()
        ]
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    ]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def logged_steps(records: list[dict[str, Any]]) -> list[int]:
    return [item["train/step"] for item in history(records) if "loss/G" in item]


# -- files --------------------------------------------------------------------------------------


def test_every_row_is_one_json_object_on_disk_when_log_returns(tmp_path: Path) -> None:
    before = time.time()
    with MetricsLog(config_of(tmp_path), "id", 0, 10) as tracker:
        tracker.log(1, {"loss/G": np.float32(0.5), "grad_norm/G": float("inf")})
        (first,) = rows_of(tmp_path)
        tracker.log(2, {"loss/G": 0.25})
    assert list(first) == ["step", "loss/G", "grad_norm/G", "time", "check"]
    assert first["step"] == 1
    assert first["loss/G"] == 0.5
    assert first["grad_norm/G"] is None
    assert before - 1 <= first["time"] <= time.time() + 1
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    with MetricsLog(config_of(tmp_path), "id", 0, 10) as tracker:
        tracker.log(5, {"loss/G": 1.0})
        with pytest.raises(AssertionError, match="one row per step"):
            tracker.log(5, {"loss/G": 1.0})


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    with MetricsLog(config_of(tmp_path), "id", 0, 100) as tracker:
        for step in range(10, 60, 10):
            tracker.log(step, {"loss/G": float(step)})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b'{"step": 60, "loss')
    with MetricsLog(config_of(tmp_path), "id", 30, 100) as tracker:
        assert path.read_bytes() == b"".join(lines[:3])
        tracker.log(40, {"loss/G": -1.0})
    assert [row["step"] for row in rows_of(tmp_path)] == [10, 20, 30, 40]
    damaged = path.with_name("metrics.jsonl.damaged")
    assert damaged.read_bytes() == b'{"step": 60, "loss\n'
    assert sorted(tmp_path.iterdir()) == [path, damaged]


def test_a_torn_line_within_the_checkpoint_is_dropped_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    with MetricsLog(config_of(tmp_path), "id", 5, 10) as tracker:
        tracker.log(6, {})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 6]


def test_kill_9_keeps_every_complete_row(tmp_path: Path) -> None:
    body = """
with MetricsLog(config("disabled"), "id", 0, 10**9) as tracker:
    for step in range(1, 10**9):
        tracker.log(step, row(step))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, str(tmp_path)],
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stderr is not None
    with process, process.stderr as shown:
        for line in shown:  # shown after it was written: the row is on disk
            if line.startswith(b"step 500/"):
                process.kill()
                break
    with MetricsLog(config_of(tmp_path), "id", 10**9, 10**9):
        steps = [row["step"] for row in rows_of(tmp_path)]
    assert len(steps) >= 500
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (8, 6, 3)])
def test_grids_are_png_files_named_by_step(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grid = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with MetricsLog(config_of(tmp_path), "id", 0, 10) as tracker:
        path = tracker.images(100, grid)
    assert path == tmp_path / "samples" / "step_0000100.png"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(shape), grid)
    assert len(list(path.parent.iterdir())) == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with NullMetricsLog(config_of(tmp_path)) as tracker:
        tracker.log(1, {"loss/G": 1.0})
        tracker.advance(1)
        tracker.images(1, np.zeros((4, 4), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_a_full_disk_ends_the_run_with_one_message_and_keeps_the_rows(tmp_path: Path) -> None:
    body = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with exit_on_user_error(), MetricsLog(config("disabled"), "id", 0, 1000) as tracker:
    for step in range(1, 1000):
        tracker.log(step, row(step))
"""
    done = script(tmp_path, body)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path}/metrics.jsonl: cannot be written: ")
    assert (tmp_path / "metrics.jsonl").stat().st_size == 1000
    with MetricsLog(config_of(tmp_path), "id", 1000, 1000):
        steps = [row["step"] for row in rows_of(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 5


def test_a_run_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"set run\.dir to a writable folder"):
        MetricsLog(config_of(tmp_path / "file" / "run"), "id", 0, 1)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: is no regular file"):
        MetricsLog(config_of(tmp_path / "run"), "id", 0, 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples").write_text("")
    with (
        MetricsLog(config_of(tmp_path / "other"), "id", 0, 1) as tracker,
        pytest.raises(RunFolderError, match="step_0000001"),
    ):
        tracker.images(1, np.zeros((4, 4), np.uint8))


# -- progress -----------------------------------------------------------------------------------


def test_without_a_terminal_a_row_is_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(config_of(tmp_path), "id", 0, 5000) as tracker:
        tracker.log(100, {"loss/G": 1.23456, "perf/images_per_sec": 812.3, "memory/peak_gib": 1.0})
        tracker.advance(101)
    line = capsys.readouterr().err
    assert line.startswith("step 100/5000  loss/G 1.235  812 img/s  eta 0:")
    assert line.count("\n") == 1


def test_on_a_terminal_a_bar_shows_the_losses(tmp_path: Path) -> None:
    body = """
with MetricsLog(config("disabled"), "id", 10, 40) as tracker:
    tracker.advance(11)
    time.sleep(0.2)
    tracker.log(20, row(20))
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        command = [sys.executable, "-c", PRELUDE + body, str(tmp_path)]
        process = subprocess.Popen(command, stderr=theirs, env=environment())
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end has closed
            while chunk := terminal.read(4096):
                shown += chunk
        assert process.wait(30) == 0
    assert b"20/40" in shown
    assert b"loss/G=0.05" in shown


# -- W&B ----------------------------------------------------------------------------------------


def test_disabled_does_not_even_import_wandb(tmp_path: Path) -> None:
    body = """
with MetricsLog(config("disabled"), "id", 0, 5) as tracker:
    tracker.log(1, row(1))
    tracker.images(1, np.zeros((4, 4), np.uint8))
assert "wandb" not in sys.modules
"""
    done = script(tmp_path, body, WANDB_API_KEY=FAKE_KEY)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "wandb").exists()


def test_offline_folder_holds_rows_axes_images_and_config(tmp_path: Path) -> None:
    body = """
with MetricsLog(config("auto"), "abc", 0, 20) as tracker:
    for step in range(1, 21):
        tracker.log(step, row(step))
    tracker.images(20, np.zeros((8, 8, 3), np.uint8))
    tracker.alert(20, "D has won", "and G hardly learns")
"""
    done = script(tmp_path, body)
    assert done.returncode == 0, done.stderr
    (records,) = offline_runs(tmp_path)
    (alert,) = (record["alert"] for record in records if record["type"] == "alert")
    assert (alert["title"], alert["text"]) == ("D has won", "and G hardly learns")
    assert logged_steps(records) == list(range(1, 21))
    assert [item["loss/G"] for item in history(records)[:2]] == [1.0, 0.5]
    picture = history(records)[-1]
    assert picture["samples/grid.caption"] == "step 20"
    assert picture["train/step"] == 20
    assert list(tmp_path.glob(f"wandb/offline-run-*/files/{picture['samples/grid.path']}"))
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["run_id"], run["project"], run["resume"]) == ("abc", "p", True)
    assert run["run_group"] == "abc"
    assert run["config"]["update"]["optim"]["g_lr"] == 2e-4
    axes = {
        record["metric"]["glob_name"]: record["metric"]["step_metric"]
        for record in records
        if record["type"] == "metric" and "glob_name" in record["metric"]
    }
    assert {"loss/*", "eval/*", "samples/*", "perf/*"} <= set(axes)
    assert set(axes.values()) == {"train/step"}
    assert records[-1]["type"] == "exit"
    noise = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert len(noise) == 1
    assert noise[0].startswith("W&B: offline, upload with: wandb sync ")


def test_a_resumed_run_continues_the_same_wandb_run_and_evaluations_lie_beside(
    tmp_path: Path,
) -> None:
    body = """
with MetricsLog(config("offline"), "abc", {start}, 20) as tracker:
    for step in range({start} + 1, {end}):
        tracker.log(step, row(step))
"""
    assert script(tmp_path, body.format(start=0, end=15)).returncode == 0
    time.sleep(1.1)  # W&B names its folders by the second
    done = script(
        tmp_path,
        body.format(start=10, end=21)
        + """
time.sleep(1.1)
board = WandbLog(config("offline"), "abc", "eval", {"eval_samples": 7})
board.log({"train/step": 10, "eval/fid": 3.5})
board.close()
""",
    )
    assert done.returncode == 0, done.stderr
    first, second, evaluation = offline_runs(tmp_path)
    assert logged_steps(first) == list(range(1, 15))
    assert logged_steps(second) == list(range(11, 21))  # replayed at the same train/step
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 21))
    runs = [
        next(record["run"] for record in records if record["type"] == "run")
        for records in (first, second, evaluation)
    ]
    assert [run["run_id"] for run in runs] == ["abc", "abc", "abc-eval"]
    assert {run["run_group"] for run in runs} == {"abc"}
    assert runs[2]["job_type"] == "eval"
    assert runs[2]["config"]["update"]["eval_samples"] == 7
    assert history(evaluation)[0]["eval/fid"] == 3.5


@pytest.mark.faults
def test_rows_survive_the_death_of_wandb_core(tmp_path: Path) -> None:
    """SIGTERM to a job's processes ends wandb-core at once, while the trainer saves and leaves."""
    body = """
with MetricsLog(config("offline"), "abc", 0, 40) as tracker:
    for step in range(1, 21):
        tracker.log(step, row(step))
    while not list(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
        time.sleep(0.1)
    time.sleep(1.5)
    tracker.log(21, row(21))  # younger than wandb-core's last flush
    time.sleep(0.1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.terminate()
    time.sleep(0.3)
    tracker.log(22, row(22))
"""
    done = script(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("going on offline") == 1
    runs = offline_runs(tmp_path)
    assert len(runs) == 2
    assert set(itertools.chain(*map(logged_steps, runs))) == set(range(1, 23))


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """The URL of a server that accepts connections and never answers."""
    connections = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(server.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    yield "http://127.0.0.1:9"


@pytest.mark.faults
@pytest.mark.parametrize("server", [nobody, black_hole])
def test_a_server_that_does_not_answer_costs_neither_rows_nor_the_exit(
    tmp_path: Path, server: Any
) -> None:
    body = """
with MetricsLog(config("online", timeout=18.0), "abc", 0, 20) as tracker:
    for step in range(1, 21):
        tracker.log(step, row(step))
"""
    with server() as url:
        began = time.monotonic()
        done = script(tmp_path, body, WANDB_BASE_URL=url, WANDB_API_KEY=FAKE_KEY)
        took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert took < 18 + 15  # the timeout, and Python's start on a busy machine
    assert "Traceback" not in done.stderr
    assert FAKE_KEY not in done.stderr + done.stdout
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 21))
    assert done.stderr.count("going on offline") == 1
    assert logged_steps(offline_runs(tmp_path)[-1]) == list(range(1, 21))


@pytest.mark.faults
def test_a_full_queue_and_a_short_patience_are_said_once(tmp_path: Path) -> None:
    body = """
wandb_log.QUEUE_ROWS = 5
with MetricsLog(config("online", timeout=0.2), "abc", 0, 20) as tracker:
    for step in range(1, 21):
        tracker.log(step, row(step))
"""
    with black_hole() as url:
        began = time.monotonic()
        done = script(tmp_path, body, WANDB_BASE_URL=url, WANDB_API_KEY=FAKE_KEY)
        took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert took < 20
    assert "Traceback" not in done.stderr
    assert len(rows_of(tmp_path)) == 20
    assert done.stderr.count("rows were not sent to it. metrics.jsonl") == 1
    assert done.stderr.count("did not take the last rows within 0.2 s") == 1


def test_auto_means_online_only_with_a_key_for_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = config_of(tmp_path, wandb="auto")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert wandb_mode(auto) == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {FAKE_KEY}\n")
    assert wandb_mode(auto) == "online"
    assert wandb_mode(config_of(tmp_path)) == "disabled"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8443")
    assert wandb_mode(auto) == "offline"  # the key is for another host
    with (tmp_path / "netrc").open("a") as netrc:
        netrc.write(f"machine wandb.example.org:8443 login user password {FAKE_KEY}\n")
    assert wandb_mode(auto) == "online"
    (tmp_path / "settings").write_text("[default]\nmode = offline\n")  # by `wandb offline`
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(auto) == "disabled"
    assert wandb_mode(config_of(tmp_path, wandb="offline")) == "offline"


def test_run_ids_name_the_run_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    ids = {make_run_id(tmp_path / "cats & dogs") for _ in range(20)}
    assert len(ids) == 20
    assert all(identity.startswith("cats-dogs-") for identity in ids)


@pytest.mark.parametrize(("place", "wrong"), [(2, 4000), (2, 45), (2, 1), (0, 35)])
def test_a_row_with_a_wrong_step_takes_no_other_row_with_it(
    place: int, wrong: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of early versions have no check: the one that fits least is moved aside and said."""
    rows = [{"step": step, "loss/G": 1.0} for step in range(10, 60, 10)]
    rows[place]["step"] = wrong
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    MetricsLog(config_of(tmp_path), "id", 50, 100).close()
    kept = [row["step"] for row in rows_of(tmp_path)]
    assert kept == [step for k, step in enumerate(range(10, 60, 10)) if k != place]
    assert f"the row of step {wrong} is misplaced" in capsys.readouterr().err
    assert json.loads(path.with_name("metrics.jsonl.damaged").read_text())["step"] == wrong


def test_a_changed_row_is_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One digit of one loss; the message names the file, the line and the cause."""
    with MetricsLog(config_of(tmp_path), "id", 0, 100) as tracker:
        for step in (10, 20, 30):
            tracker.log(step, {"loss/G": step / 7})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace(str(20 / 7), str(20 / 7 + 1)))
    MetricsLog(config_of(tmp_path), "id", 30, 100).close()
    assert [row["step"] for row in rows_of(tmp_path)] == [10, 30]
    assert f"{path}, line 2: is damaged" in capsys.readouterr().err


def test_a_link_in_a_run_folder_of_somebody_else_leads_nowhere(tmp_path: Path) -> None:
    """Nothing is made or changed where metrics.jsonl or evaluations.jsonl point to."""
    victim, absent = tmp_path / "victim", tmp_path / "absent"
    victim.write_text("mine\n")
    for target in (victim, absent):
        folder = tmp_path / f"run of {target.name}"
        folder.mkdir()
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            (folder / name).symlink_to(target)
        with contextlib.suppress(RunFolderError), MetricsLog(config_of(folder), "id", 0, 10) as log:
            log.log(1, {"loss/G": 1.0})
        with contextlib.suppress(RunFolderError):
            Ledger(folder).append({"step": 1, "weights": "ema", "protocol": "p", "scores": {}})
    assert victim.read_text() == "mine\n"
    assert not absent.exists()
