"""Too little disk, inodes, open files, file size or memory; read-only folders."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from random import Random

from base import Case, Process, Verdict, check_always, last_line
from world import World

COMMANDS = {
    "train-disk": "disk/run",
    "evaluate-disk": "disk",
    "generate-disk": "disk/drawn",
    "generate-disk-npz": "disk/drawn.npz",
    "generate-disk-tars": "disk/tars",
    "prepare-disk": "disk/shards",
    "grid-disk": "disk/grid.png",
    "hub-disk": "disk/hub",
}
ENOUGH = 1 << 20
"""Bytes of a disk on which every one of the commands succeeds."""
WORDS = ("disk", "memory", "open files", "ulimit", "cannot be written", "space", "semaphores")
REASONS = ("No space left", "File too large", "Too many open files", "Read-only file system")


def cases(world: World) -> Iterator[Case]:
    for command in COMMANDS:
        for size in (0, 1, 100, 600, 1000, 2000, 3000, 4096, 6000, 9000, 15_000, 30_000, 60_000):
            yield case(command, "size of a file", resource.RLIMIT_FSIZE, size)
        for count in (*range(4, 24), 28, 34, 48):
            yield case(command, "open files", resource.RLIMIT_NOFILE, count)
        for mib in (320, 360, 400, 440, 480, 520, 600):
            yield case(command, "memory", resource.RLIMIT_DATA, mib << 20)
        if can_mount():
            for kib in (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 100, 120, 160):
                yield case(command, "full disk", None, kib, f"size={kib}k")
            for inodes in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18):
                yield case(command, "inodes", None, inodes, f"nr_inodes={inodes}")
            yield case(command, "read-only", None, 0, "ro")


def case(command: str, harm: str, limit: int | None, amount: int, mount: str = "") -> Case:
    name = f"{command}:{harm}:{amount}"
    return Case("starvation", harm, name, partial(run, command, limit, amount, mount))


def can_mount() -> bool:
    return (
        os.geteuid() == 0
        and not subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    )


def run(
    command: str, limit: int | None, amount: int, mount: str, world: World, _: Random
) -> Verdict:
    """Starve a command; then let it have what it needs: it must leave what it would have left."""
    world.baseline(command)
    world.restore()
    began, disk = time.time(), world.at / "disk"
    if mount:
        subprocess.run(["mount", "-t", "tmpfs", "-o", mount, "tmpfs", str(disk)], check=True)
    try:
        limits = {} if limit is None else {limit: amount}
        ended = Process(world.words(command), world.at, limits=limits).wait()
        if (bad := check_always(world.at, ended, began)) is not None:
            return bad
        if mount:
            subprocess.run(
                ["mount", "-o", f"remount,rw,size={ENOUGH},nr_inodes=0", str(disk)], check=True
            )
        output = ended.output
        if ended.code == 0:
            return world.judge(command, [str(disk)], ended, began)
        if (after := world.again(command)).kind != "harmless":
            return after
    finally:
        if mount:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    told = any(word in output for word in (*WORDS, *REASONS, str(disk)))
    told = told and "error: " in output
    return Verdict("detected" if told else "names no file", last_line(output))
