"""Credentials and variables of the environment: what a configuration may read, and what is kept."""

from __future__ import annotations

import dataclasses
import http.server
import os
import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
from evaluating import add_snapshot, make_config

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config, DataConfig
from pipeline.data.shards import read_index
from pipeline.runtime.errors import ConfigError, DataError
from pipeline.runtime.text import masked

SECRET = "hunter2hunter2"
URL = f"https://me:{SECRET}@host/shards?X-Amz-Signature={SECRET}&part=1&token={SECRET}"


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SOME_KEY}",
        "${oc.env:HOMELESS,${oc.env:SOME_KEY}}",
        "${oc.env:SLURM_JOB_NAME,${oc.env:SOME_KEY}}",
        "${oc.env:SLURM_JWT}",
        "${oc.env:slurm_x}",
        "${oc.decode:${oc.env:SOME_KEY}}",
        "${oc.env:${oc.env:SOME_KEY}}",
        "${tracking.group}",
    ],
)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_other_variables_are_refused_by_name_never_by_value(monkeypatch, tmp_path, value, where):
    monkeypatch.setenv("SOME_KEY", SECRET)
    monkeypatch.setenv("SLURM_JWT", SECRET)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    path = tmp_path / "c.yaml"
    other = "  group: ${oc.env:SOME_KEY}\n" if value == "${tracking.group}" else ""
    path.write_text("tracking:\n" + other + (f"  name: {value}\n" if where == "file" else ""))
    words = [] if where == "file" else [f"tracking.name={value}"]
    with pytest.raises(ConfigError, match=r"tracking.name \(.*\): .*") as error:
        load(path, words)
    assert "rite the value itself" in str(error.value)
    assert SECRET not in str(error.value)
    path.write_text("")
    assert load(path, [f"tracking.name={SECRET}"]).tracking.name == SECRET  # the remedy


def test_the_value_of_a_variable_is_in_no_message(monkeypatch, tmp_path):
    """Whatever is wrong with it: its type, its range, or a key that it does not name."""
    monkeypatch.setenv("SLURM_JOB_COMMENT", SECRET + "/" * 200)
    path = tmp_path / "c.yaml"
    path.touch()
    for key in (
        "model.ngf",
        "tracking.project",
        "tracking.name",
        "model.loss",
        "stability.augment",
    ):
        with pytest.raises(ConfigError) as error:
            load(path, [f"{key}=${{oc.env:SLURM_JOB_COMMENT}}"])
        assert f"{key} (${{oc.env:SLURM_JOB_COMMENT}}): " in str(error.value)
        assert SECRET not in str(error.value)


def test_variables_of_a_sweep_and_a_job_are_read(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SWEEP_DIR", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text("run:\n  dir: ${oc.env:SWEEP_DIR,/runs}/${oc.env:SLURM_JOB_ID}\n")
    assert load(path).run.dir == "/runs/17"


@pytest.mark.parametrize("beside", ["run.json", "generator.safetensors", "model.safetensors", None])
@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x${run.seed}", "${oc.env:PATH}"])
def test_a_file_that_came_with_a_run_refers_to_nothing(tmp_path, beside, value):
    """Also one that says so only by the command that opens it."""
    path = tmp_path / "config.yaml"
    path.write_text(f"tracking:\n  name: {value}\n")
    if beside:
        (tmp_path / beside).write_text("{}")
    with pytest.raises(ConfigError, match=r"tracking.name .*: must have no \$\{...\}") as error:
        load(path, saved=beside is None)
    assert os.environ["HOME"] not in str(error.value).partition("\n")[2]
    path.write_text("run:\n  seed: 0\n")
    words = ["tracking.name=x${run.seed}"]  # the remedy
    assert load(path, words, saved=beside is None).tracking.name == "x0"


def test_credentials_are_masked(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    assert masked(f"see {URL} no answer") == (
        "see https://***@host/shards?X-Amz-Signature=***&part=1&token=*** no answer"
    )
    assert masked("key 0123456789abcdef.") == "key ***."
    for text in ("s3://bucket/a@b", "me@host: 3 files", "a?token", "https://host/x?part=1"):
        assert masked(text) == text


SCRIPT = """
import sys
from pathlib import Path
from pipeline.config.schema import Config, DataConfig, RunConfig, TrackingConfig
from pipeline.runs.metrics_log import MetricsLog
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError, exit_on_user_error
from pipeline.runtime.log_file import open_log

folder, url = sys.argv[1:]
open_log(Path(folder) / "log.txt")
config = Config(run=RunConfig(dir=folder), data=DataConfig(shards=url),
                tracking=TrackingConfig(wandb="offline", timeout=60))
with MetricsLog(config, "id", 0, 5) as tracker:
    tracker.log(1, {"loss/G": 1.0})
say(f"shards of {url}")
with exit_on_user_error():
    raise UserError(f"data.shards ({url}): no answer")
"""


def test_no_file_and_no_line_has_a_credential(tmp_path):
    """Of a run that logs to W&B, whose command line has it too."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), URL],
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert done.returncode == 2, done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert b"https://***@host" in done.stdout
    assert SECRET.encode() not in done.stdout
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_snapshot_is_for_others(tmp_path):
    """Its configuration has no credentials, nor has that of the run."""
    config = dataclasses.replace(make_config(tmp_path), data=DataConfig(shards=URL))
    folder = add_snapshot(tmp_path, config, 3)
    text = (folder / "config.yaml").read_text()
    assert SECRET not in text
    assert load(folder / "config.yaml").data.shards == masked(URL)
    assert SECRET not in _written(tmp_path, config).read_text()


def _written(folder: Path, config: Config) -> Path:
    path = folder / "own.yaml"
    path.write_text(dump(config))
    return path


class Server(http.server.BaseHTTPRequestHandler):
    """A server that counts what is asked of it."""

    asked: typing.ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.asked.append(self.headers.get("Authorization", "nothing"))
        self.send_error(404)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_settings_of_wandb_that_came_with_a_run_are_not_obeyed(tmp_path):
    """They could send the API key to any server, if the command starts inside that run."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "wandb").mkdir()
    settings = f"[default]\nbase_url = http://127.0.0.1:{server.server_port}\nmode = online\n"
    (tmp_path / "wandb" / "settings").write_text(settings)
    (tmp_path / "run.json").write_text("{}")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("offline", "online"), str(tmp_path), "shards"],
        env=clean | {"WANDB_API_KEY": "a" * 40},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    server.shutdown()
    server.server_close()
    assert not Server.asked, done.stdout
    assert "came with a run" in done.stdout
    assert "start the command from another folder" in done.stdout


@pytest.mark.parametrize("where", ["data.shards", "eval.held_out", "eval.parzen_shards"])
def test_a_password_in_a_url_is_refused_with_the_place_for_it(tmp_path, where):
    """It would be stored with the run; the message does not repeat it."""
    path = tmp_path / "c.yaml"
    path.touch()
    with pytest.raises(ConfigError, match=r"without user and password.*~/\.netrc") as error:
        load(path, [f"{where}=https://me:{SECRET}@host/shards"])
    assert SECRET not in str(error.value)


def test_a_credential_that_was_left_out_is_asked_for():
    """What stands for it in a stored configuration is not sent to a server."""
    with pytest.raises(DataError, match=r"not stored with the run. Give data.shards on the comm"):
        read_index("https://host/set?sig=***")
