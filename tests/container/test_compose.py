"""docker/compose.yaml, with compose.cpu.yaml: preparing, training, stopping, evaluating."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import CERTIFICATES, STANDIN, UID, Folders, steps
from .engine import has_compose

pytestmark = pytest.mark.container
SMALL = ["data.batch_size=16", "model.ngf=8", "model.ndf=8", "model.z_dim=16"]
SMALL += ["train.log_every=2", "train.checkpoint_every=10", "tracking.wandb=disabled"]
# The default needs Inception's weights, which only a machine with network can fetch.
SCORES = ["eval.extractor=efficientnet-lite0", 'eval.layer="320"', "eval.num_images=640"]
SCORES += ["eval.reference_images=640", "eval.precision=fp32", "tracking.wandb=disabled"]


PROFILES = ("--profile", "evaluate", "--profile", "prepare")


class Compose:
    """The shipped files, with a third in which commands get more words."""

    def __init__(self, folders: Folders, override: Path) -> None:
        self._docker, self._override = folders.docker, override
        self._env = {"DATA": str(folders.data), "RUNS": str(folders.runs)}
        self._env |= {"UID": str(UID), "GID": str(UID)}
        files = ["docker/compose.yaml", "docker/compose.cpu.yaml"]
        self._words = ["compose", *(word for file in files for word in ("-f", file))]
        self.shipped = json.loads(self(*PROFILES, "config", "--format", "json"))
        self._words += ["-f", str(override)]

    def add(self, **words: list[str]) -> None:
        """Add words to the shipped commands of services; data sets of Debian are mounted."""
        raw = "/usr/share/datasets"
        build = {"network": "host", "args": {"BASE_IMAGE": STANDIN}}
        if CERTIFICATES.exists():
            build["args"]["SSL_CERT_FILE"] = str(CERTIFICATES)  # type: ignore[index]
        # Where root may not lift the limit of locked memory, the engine cannot set "unlimited".
        limits = {"memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]}
        services = {
            name: {
                "command": [*self._shipped_command(name), *more],
                "build": build,
                "ulimits": limits,
                "cpuset": "0",  # threads wait for each other on a busy machine
                "volumes": [f"{raw}:{raw}:ro"] if Path(raw).is_dir() else [],
            }
            for name, more in words.items()
        }
        self._override.write_text(json.dumps({"services": services}))

    def _shipped_command(self, service: str) -> list[str]:
        config = self.shipped["services"]
        return list(config[service]["command"])

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self._docker.run(*self._words, *words, **self._env)

    def __call__(self, *words: object) -> str:
        return self._docker.docker(*self._words, *words, **self._env)


def test_compose_prepares_trains_stops_within_its_grace_period_and_evaluates(
    folders: Folders, tmp_path: Path
) -> None:
    if not has_compose(folders.docker):
        pytest.skip("docker has no compose of 2.24 or newer; see make test-container")
    compose = Compose(folders, tmp_path / "words.json")
    assert compose.shipped["services"]["train"]["stop_grace_period"] == "2m0s"
    compose.add(prepare=[], train=[], evaluate=[])
    print(compose("build", "train")[-300:])
    done = compose.run("run", "--rm", "prepare")
    if "/usr/share/datasets" in done.stdout and done.returncode:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout

    run = folders.runs / "dcgan_64"
    compose.add(train=[*SMALL, "train.total_steps=100000"])
    compose("up", "--detach", "train")
    try:
        deadline = time.monotonic() + 300
        while not steps(run):
            assert compose("ps", "--quiet", "train"), compose("logs", "train")
            assert time.monotonic() < deadline, "no step within 300 s"
            time.sleep(0.2)
        asked = time.monotonic()
        compose("stop", "train")
        took, log = time.monotonic() - asked, compose("logs", "--no-log-prefix", "train")
        name = compose("ps", "--all", "--quiet", "train")
        code = folders.docker.docker("inspect", "--format", "{{.State.ExitCode}}", name)
        print(f"exit {code} {took:.1f} s after docker compose stop\n{log}")
        assert code == "75"
        stopped = int((run / "PREEMPTED").read_text().split()[0])
        assert (run / "checkpoints" / f"step_{stopped:08d}").is_dir()

        end = stopped + 10
        compose.add(train=[*SMALL, f"train.total_steps={end}"], evaluate=SCORES)
        done = compose.run("up", "--exit-code-from", "train", "train")
        assert done.returncode == 0, done.stdout
        assert (run / "FINISHED").exists()
        assert steps(run)[-1] == end
        done = compose.run(
            "--profile", "evaluate", "up", "--exit-code-from", "evaluate", "evaluate"
        )
        assert done.returncode == 0, done.stdout
        rows = (run / "evaluations.jsonl").read_text().splitlines()
        assert end in {json.loads(row)["step"] for row in rows}
        print(done.stdout[-800:])
    finally:
        compose(*PROFILES, "down", "--timeout", 5)
