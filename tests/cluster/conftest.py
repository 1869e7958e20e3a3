"""Fixtures: one Slurm for all tests, trainings submitted to it, and one training without it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from launching import train

from .mini_slurm import BINARIES, NEWER, MiniSlurm

STEPS = 192
Submit = Callable[..., "Job"]


@dataclass
class Job:
    """A training submitted through slurm/train.sh."""

    slurm: MiniSlurm
    id: str
    run_dir: Path
    output: Path

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, state: str) -> dict[str, str]:
        try:
            return self.slurm.wait(self.id, state)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def reach(self, step: int) -> None:
        """Wait until rank 0 has begun this optimizer step."""
        log = self.run_dir / "ids" / "rank_0.jsonl"

        def there() -> bool:
            if log.exists():
                return f'"step": {step},' in log.read_text()
            time.sleep(0.5)
            found = self.slurm.show(self.id).get("JobState")
            assert found in ("PENDING", "RUNNING"), f"{found}\n{self.log()}"
            return False

        self.slurm.wait_until(there, f"step {step}", every=0.01)

    def ranks(self) -> list[psutil.Process]:
        return [self.slurm.rank(self.id, rank) for rank in (0, 1)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test on the installed Slurm, those marked ``both_versions`` on a newer one too."""
    if "slurm" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("both_versions")
        versions = ["installed", "newer"] if both else ["installed"]
        metafunc.parametrize("slurm", versions, indirect=True, scope="session")


@pytest.fixture(scope="session")
def slurm(request: pytest.FixtureRequest) -> Iterator[MiniSlurm]:
    without = pytest.fail if os.environ.get("NEED_SLURM") else pytest.skip
    missing = [name for name in BINARIES if not shutil.which(name)]
    if missing:
        without(f"Slurm is not installed: no {', '.join(missing)}; see make test-cluster")
    if os.geteuid() != 0:
        without("the daemons of the test's own Slurm need root")
    root = NEWER if request.param == "newer" else None
    if root and not (root / "usr/sbin/slurmctld").exists():
        # Also in CI: a machine may reach its own packages, but no mirror of another Debian.
        pytest.skip(f"no newer Slurm in {root}; make slurm-programs installs it with mmdebstrap")
    mini = MiniSlurm(root)
    try:
        mini.start()
        yield mini
    finally:
        mini.stop()


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """SIGTERM to pytest stops the daemons too."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, before)


Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Return a function ``(name, script)``: write a program to the first folder of ``path``."""

    def write(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    return write


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with the programs of ``program`` first."""
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


@pytest.fixture
def submit(
    slurm: MiniSlurm, tiny_config: Path, training_shards: Path, tmp_path: Path
) -> Iterator[Submit]:
    jobs: list[Job] = []

    def submitted(*words: str, steps: int = STEPS, flags: tuple[str, ...] = (), **env: str) -> Job:
        run_dir, output = tmp_path / "a run", tmp_path / f"job-{len(jobs)}.out"
        settings = [f"data.shards={training_shards}", f"run.dir={run_dir}"]
        settings += [f"train.total_steps={steps}", *words]
        script = ["slurm/train.sh", "--config", str(tiny_config), *settings]
        job = slurm.submit(output, "--nodes=2", *flags, *script, **env)
        jobs.append(Job(slurm, job, run_dir, output))
        return jobs[-1]

    yield submitted
    for job in jobs:
        slurm.ask("scancel", job.id)
        slurm.wait_until(
            lambda job=job: slurm.show(job.id).get("JobState") not in ("RUNNING", "COMPLETING"),  # type: ignore[misc]
            "end",
        )
        print(job.log())


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_config: Path, training_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same training on two processes that accelerate launch started, without Slurm."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    settings = [f"data.shards={training_shards}", f"train.total_steps={STEPS}"]
    train(2, tiny_config, *settings, f"run.dir={run_dir}")
    return run_dir
