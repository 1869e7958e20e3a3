"""Containers with less than Docker gives by default: memory, disk, a user with a name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import DEMO, QUIET, Folders, steps

pytestmark = pytest.mark.container
SHORT = ["train.total_steps=5", "train.log_every=1"]
STRANGER = 12345
# 16 MiB a batch, and two workers that each prefetch four: more than Docker's 64 MB of /dev/shm.
LARGE = ["data.batch_size=16384", "train.micro_batch=64", "data.workers=2"]


def test_a_small_dev_shm_is_enough_or_one_message_says_what_to_do(
    folders: Folders, data: Path
) -> None:
    done = folders.run("df", "--output=size", "-m", "/dev/shm")
    assert done.stdout.split()[-1] == "64", "the engine's default"
    small = ["train.total_steps=1", "model.ngf=4", "model.ndf=4"]
    done = folders.run(*DEMO, *QUIET, *LARGE, *small, "run.dir=/runs/small-shm")
    print(done.stdout[-2000:])
    assert "Traceback" not in done.stdout
    if done.returncode:
        assert "/dev/shm" in done.stdout
        assert "--ipc host" in done.stdout or "--shm-size" in done.stdout


def test_the_root_file_system_may_be_read_only(folders: Folders, data: Path) -> None:
    words = [*DEMO, *QUIET, *SHORT, "run.dir=/runs/read-only"]
    done = folders.run(*words, options=["--read-only", "--tmpfs", "/tmp"])
    assert done.returncode == 0, done.stdout
    assert steps(folders.runs / "read-only")[-1] == 5


def test_a_user_without_a_name_or_a_home_can_train(folders: Folders, data: Path) -> None:
    owned = folders.runs / "of-a-stranger"
    owned.mkdir()
    os.chown(owned, STRANGER, STRANGER)
    words = [*DEMO, *QUIET, *SHORT, f"run.dir=/runs/{owned.name}/run"]
    options = ["--user", f"{STRANGER}:{STRANGER}", "--cap-drop=ALL", "--env=HOME="]
    done = folders.run(*words, options=options)
    assert done.returncode == 0, done.stdout
    assert (owned / "run" / "FINISHED").stat().st_uid == STRANGER

    done = folders.run(*DEMO, *QUIET, *SHORT, "run.dir=/runs/theirs", options=options)
    assert done.returncode == 2
    assert "run.dir (/runs/theirs): cannot be written" in done.stdout
    assert "Traceback" not in done.stdout
