"""Ranks that do not reach each other end with one line, within a bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from launching import REPO, free_port

from pipeline.runtime import environment

RANK = """
import os, sys, time
from pipeline.runtime.errors import exit_on_user_error
from pipeline.runtime.launch import make_accelerator
from pipeline.runtime.ranks import gather
with exit_on_user_error():
    accelerator = make_accelerator("fp32", 20.0)
    gather(accelerator, 1)
    if accelerator.process_index == 1:
        print("joined", flush=True)
        sys.stdin.read()
        os._exit(0)
    gather(accelerator, 2)
"""


@pytest.mark.parametrize("lost", ["silent", "gone"])
def test_a_rank_ends_with_one_line_when_another_is_lost(lost: str) -> None:
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launch |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=REPO,
            env=os.environ | launch | {"RANK": str(rank)},
            text=True,
            **pipes,  # type: ignore[arg-type]
        )
        for rank in (0, 1)
    ]
    try:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "joined\n"
        if lost == "gone":
            ranks[1].kill()
        _, said = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 2, said
    assert "Traceback" not in said
    assert said.count("error: rank 0 lost another rank") == 1
    assert "run the same command again" in said


def test_gloo_listens_on_the_route_to_the_others_if_the_own_name_is_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which interface has which address is asked of the kernel; loopback itself is never chosen."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    environment.use_reachable_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert environment._address(probe, "lo") == "127.0.0.1"
        assert environment._address(probe, "absent") == ""
