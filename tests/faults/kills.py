"""Kill or stop a process of a command at any moment, and run the command again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import psutil
from base import REPO, Case, Process, Verdict, check_always, last_line
from world import World

COMMANDS = {
    "train-new": ("command", "worker", "beside a .tmp"),
    "train-on": ("command", "SIGTERM", "worker", "beside a .tmp"),
    "train-two": ("command", "rank"),
    "evaluate": ("command", "SIGTERM"),
    "generate-new": ("command", "beside a .tmp"),
    "generate-half-npz": ("command",),
    "generate-half-png": ("command", "SIGTERM"),
    "prepare-made": ("command", "SIGTERM", "worker", "beside a .tmp"),
    "prepare-rest": ("command", "worker"),
    "prepare-drawn": ("command", "worker"),
}
MOMENTS = 12
LAUNCHER = 2
"""Kills of a real launcher, whose ranks must end by themselves."""
ORPHAN = 120.0
"""Seconds in which they must."""


def cases(world: World) -> Iterator[Case]:
    for command, victims in COMMANDS.items():
        for victim in victims:
            for k in range(MOMENTS):
                yield Case(
                    "kills", victim, f"{command}:{victim}:{k}", partial(run, command, victim)
                )
    for k in range(LAUNCHER):
        yield Case("kills", "launcher", f"launcher:{k}", partial(kill_launcher))


def start(world: World, command: str) -> list[Process]:
    """Start a command: as one process, or as two ranks."""
    if command != "train-two":
        return [world.start(command)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = ("0", "1")
    return [
        world.start(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks
    ]


def run(command: str, victim: str, world: World, random: Random) -> Verdict:
    began, took = time.monotonic(), DURATIONS.get(command)
    if took is None:
        world.baseline(command, partial(start, world, command))
        took = DURATIONS[command] = time.monotonic() - began
    world.restore()
    began_at = time.time()
    processes = start(world, command)
    moment = time.monotonic() + random.uniform(0, took)
    if victim == "beside a .tmp":
        moment = time.monotonic() + 10
        place = random.randrange(3)
        seen, before = set[str](), partial_files(world.at)
        while time.monotonic() < moment and not processes[0].poll():
            seen |= partial_files(world.at) - before
            if len(seen) > place:
                break
    while time.monotonic() < moment and victim != "beside a .tmp" and not processes[0].poll():
        time.sleep(0.001)
    if victim == "worker":
        strike_workers(processes[0].pid, random)
    elif victim == "SIGTERM":
        processes[0].signal(signal.SIGTERM)
    elif victim == "rank":
        random.choice(processes).signal(signal.SIGKILL)
    else:
        for process in processes:
            process.kill()
    for ended in [process.wait() for process in processes]:
        if (victim, ended.code, ended.output) == ("SIGTERM", -signal.SIGTERM, ""):
            continue  # it came before the command had begun
        if victim in ("worker", "rank", "SIGTERM") and ended.code != -signal.SIGKILL:
            if (bad := check_always(world.at, ended, began_at)) is not None:
                return bad
            if ended.code not in (0, 128 + signal.SIGTERM) and "error: " not in ended.output:
                return Verdict("names no file", f"exit {ended.code}: {last_line(ended.output)}")
            if ended.code and ("full" in ended.output or "free space" in ended.output):
                return Verdict(
                    "names no file", f"a kill is no full disk: {last_line(ended.output)}"
                )
    return world.again(command, partial(start, world, command))


DURATIONS: dict[str, float] = {}


def strike_workers(pid: int, random: Random) -> None:
    """SIGKILL to a child of a process, once it has one."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
                return
        except OSError:
            return
        if words:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(random.choice(words)), signal.SIGKILL)
            return
        time.sleep(0.001)


def partial_files(at: Path) -> set[str]:
    found = set()
    for folder, folders, files in os.walk(at):
        found |= {f"{folder}/{name}" for name in (*folders, *files) if ".tmp" in name}
    return found


def kill_launcher(world: World, random: Random) -> Verdict:
    """Kill ``accelerate launch`` alone: its ranks save and leave, and the next run goes on."""
    name = "train-long"
    world.restore()
    words = [*world.words(name)[1:]]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--quiet"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [*launch, str(REPO / "pipeline" / "train.py"), *words],
        cwd=world.at,
        env={"PATH": os.environ["PATH"], "HOME": str(world.at / "home")} | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    progress, below = world.at / "long" / "progress", list[psutil.Process]()
    try:
        if not wait_until(progress.is_file, 300):
            return Verdict("hang, signal, memory", "the launched run saved nothing")
        time.sleep(random.uniform(0, 2))
        below = psutil.Process(process.pid).children(recursive=True)  # ranks and their workers
        process.kill()
        if psutil.wait_procs(below, ORPHAN)[1]:
            return Verdict("hang, signal, memory", "ranks outlived their launcher")
    finally:
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()
    ended = world.start(name, env={}).wait(5)
    return Verdict("harmless") if ended.late else Verdict("traceback", last_line(ended.output))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
