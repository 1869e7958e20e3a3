"""Two containers with addresses and names of their own are two nodes, as docker/README.md says."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .conftest import DEMO, Container, Folders, steps, wait_for_step

pytestmark = pytest.mark.container
NETWORK = "nodes"
LOST_SECONDS = 30
ENDLESS = ["train.total_steps=100000", "train.checkpoint_every=20", "train.log_every=5"]


@pytest.fixture(scope="module", autouse=True)
def network(folders: Folders) -> Iterator[None]:
    folders.docker.run("network", "rm", NETWORK)
    folders.docker.docker("network", "create", NETWORK)
    yield
    folders.docker.docker("network", "rm", NETWORK)


@contextmanager
def two_nodes(
    folders: Folders,
    run: str,
    *words: str,
    options: tuple[str, ...] = (),
    network: str = NETWORK,
    **env: object,
) -> Iterator[list[Container]]:
    """The documented command on two nodes with a core each; node 0 is reached by its name."""
    settings = {"NNODES": 2, "MASTER_ADDR": "node0", **env}
    said = [*DEMO, "tracking.wandb=disabled", f"run.dir=/runs/{run}"]
    said += [f"train.rank_timeout={LOST_SECONDS}", *words]
    with ExitStack() as stack:
        nodes = []
        for rank in (0, 1):
            name = f"node{rank}"
            where = ["--init", "--network", network, "--hostname", name, f"--cpuset-cpus={rank}"]
            begun = folders.started(
                name, *said, options=[*where, *options], NODE_RANK=rank, **settings
            )
            nodes.append(stack.enter_context(begun))
        yield nodes


def digests(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of each file of weights and of optimizer state in a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    files = [*folder.glob("*.safetensors"), folder / "optimizers.pt"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def test_two_nodes_compute_what_two_processes_in_one_container_compute(
    folders: Folders, data: Path
) -> None:
    words = ["train.total_steps=20", "train.checkpoint_every=10"]
    with two_nodes(folders, "nodes-2", *words) as nodes:
        assert [node.wait() for node in nodes] == [0, 0], "\n".join(node.log() for node in nodes)
    done = folders.run(
        *DEMO,
        *words,
        "tracking.wandb=disabled",
        "run.dir=/runs/processes-2",
        options=["--init", "--cpuset-cpus=0-1"],
        NPROC_PER_NODE=2,
    )
    assert done.returncode == 0, done.stdout
    apart, together = (digests(folders.runs / name, 20) for name in ("nodes-2", "processes-2"))
    print(apart)
    assert len(apart) >= 4
    assert apart == together


def test_docker_stop_of_one_node_saves_on_all_and_the_same_command_goes_on(
    folders: Folders, data: Path
) -> None:
    run = folders.runs / "stopped-node"
    with two_nodes(folders, run.name, *ENDLESS) as nodes:
        wait_for_step(run, *nodes)
        asked = time.monotonic()
        folders.docker.docker("stop", "--time", 120, nodes[1].name)
        codes = [node.wait(60) for node in nodes]
        print(f"exit {codes} {time.monotonic() - asked:.1f} s after docker stop of node 1")
        print(nodes[0].log())
    assert 0 not in codes
    stopped = int((run / "PREEMPTED").read_text().split()[0])
    assert saved_steps(run)[-1] == stopped
    finish(folders, run, stopped)


def finish(folders: Folders, run: Path, saved: int) -> None:
    """Give the same command again, to an end soon after the newest checkpoint."""
    end = saved + 5
    with two_nodes(folders, run.name, *ENDLESS, f"train.total_steps={end}") as nodes:
        assert [node.wait() for node in nodes] == [0, 0], "\n".join(node.log() for node in nodes)
    assert (run / "FINISHED").exists()
    logged = steps(run)
    assert logged == sorted(set(logged)), "steps were logged twice"
    assert logged[-1] == end


@pytest.mark.parametrize("loss", ["kill", "disconnect"])
def test_a_lost_node_ends_the_other_and_the_same_command_goes_on(
    folders: Folders, data: Path, loss: str
) -> None:
    run = folders.runs / f"node-lost-{loss}"
    docker = folders.docker
    with two_nodes(folders, run.name, *ENDLESS) as nodes:
        wait_for_step(run, *nodes, after=20)
        began = time.monotonic()
        if loss == "kill":
            docker.docker("kill", nodes[1].name)
        else:
            docker.docker("network", "disconnect", NETWORK, nodes[1].name)
        codes = [node.wait(LOST_SECONDS + 90) for node in nodes]
        took, log = time.monotonic() - began, nodes[0].log()
    print(f"{loss}: exit {codes} {took:.1f} s later\n{log}")
    assert codes[0] == 1
    assert codes[1] == (137 if loss == "kill" else 1)
    assert "error: rank 0 lost another rank" in log
    assert "run the same command again on all nodes" in log
    assert not (run / "PREEMPTED").exists()
    saved = saved_steps(run)[-1]
    assert saved >= 20
    finish(folders, run, saved)


def test_a_node_whose_own_name_means_a_loopback_address_is_reached(
    folders: Folders, data: Path
) -> None:
    """Debian writes the host's own name as 127.0.1.1; `--network host` brings that file along."""
    run = folders.runs / "loopback-names"
    words = ["train.total_steps=5"]
    hosts = folders.runs / "hosts"  # in place of the engine's own
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node0 node1\n10.83.0.2 first\n")
    folders.docker.run("network", "rm", network := "loopback-nodes")
    folders.docker.docker("network", "create", "--subnet", "10.83.0.0/24", network)
    options = ("-v", f"{hosts}:/etc/hosts:ro")
    try:
        with two_nodes(
            folders, run.name, *words, options=options, network=network, MASTER_ADDR="first"
        ) as nodes:
            codes = [node.wait() for node in nodes]
            assert codes == [0, 0], "\n".join(node.log() for node in nodes)
    finally:
        folders.docker.run("network", "rm", network)


def test_nodes_that_never_reach_each_other_end_within_the_bound(
    folders: Folders, data: Path
) -> None:
    """gloo waits for ever to be connected to, so the node that is not reached has a limit."""
    with two_nodes(folders, "apart", GLOO_SOCKET_IFNAME="lo") as nodes:
        codes = [node.wait(LOST_SECONDS + 150) for node in nodes]
        logs = "".join(node.log() for node in nodes)
    print(logs)
    assert codes == [1, 1]
    # Their addresses decide which of the two connects to the other.
    assert re.search(r"error: rank (\d) on node\1 waited 40 s for the other ranks", logs)
    assert re.search(r"error: rank \d lost another rank", logs)
    assert not (folders.runs / "apart").exists()
