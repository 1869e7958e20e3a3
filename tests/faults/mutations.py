"""Damage each file that a command wrote, then run the commands that read it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from base import Case, Verdict
from world import World, result

READERS = {
    "run/checkpoints/*": ("train-on", "train-fork", "evaluate-raw", "train-keep", "doctor"),
    "run/snapshots/*": ("evaluate", "evaluate-one", "generate-new", "grid", "train-on"),
    "run/evaluations.jsonl": ("evaluate", "evaluate-one", "train-keep"),
    "run/.evaluations*": ("evaluate",),
    "run/metrics.jsonl": ("train-on",),
    "run/run.json": ("train-on", "train-fork", "evaluate", "generate-new", "doctor"),
    "run/config.yaml": ("train-on", "evaluate", "generate-new", "grid"),
    "run/log.txt": ("train-on",),
    "run/samples/*": ("train-on",),
    "run/*": ("train-on", "evaluate", "doctor"),  # progress, FINISHED, locks
    "shards/index.json": ("train-on", "verify", "prepare", "train-cached", "doctor", "evaluate"),
    "shards/*": ("train-on", "train-on-0", "verify", "evaluate-fresh", "doctor"),
    "cache/*": ("train-cached",),
    "references/*": ("evaluate",),
    "part/*": ("prepare-rest",),
    "half.png.tmp/*": ("generate-half-png",),
    "half.npz.tmp/*": ("generate-half-npz",),
    "drawn/*": ("generate-png",),
    "hub/*": ("hub-again",),
    "tars/*": ("generate-shards", "train-drawn"),
}
LOSSES = ("lose a line", "delete", "empty", "cut")
"""Of a row that is gone as a whole nobody can know."""
BINARY = (".safetensors", ".pt", ".tar", ".png", ".raw")


def cases(world: World) -> Iterator[Case]:
    saved = world.saved
    files = sorted(p for p in saved.rglob("*") if p.is_file())
    for path in files:
        file = str(path.relative_to(saved))
        readers = next((r for pattern, r in READERS.items() if fnmatch(file, pattern)), ())
        if path.suffix == ".png" and path.stem.isdecimal() and int(path.stem) % 40:
            continue  # one in forty images: they are alike
        for harm, count in harms_of(path):
            for k in range(count):
                for command in readers:
                    name = f"{file}:{harm}:{k}:{command}"
                    yield Case("mutations", harm, name, partial(run, file, harm, command))


def harms_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (harm, how often) for a file, by what it is."""
    if path.stat().st_size:
        yield from {"flip": 4, "cut": 1, "empty": 1, "zeros": 1}.items()
    yield from dict.fromkeys(
        ("delete", "append", "directory", "fifo", "link to nothing"), 1
    ).items()
    if path.suffix in BINARY:
        yield "swap", 1
    elif path.suffix in (".json", ".jsonl") and path.stat().st_size:
        yield from {"json type": 3, "json value": 3, "json drop": 2}.items()
    if path.suffix not in BINARY and path.stat().st_size:
        yield "letter", 3
    if path.suffix == ".jsonl":
        yield from {"lose a line": 1, "repeat a line": 1}.items()


def run(file: str, harm: str, command: str, world: World, random: Random) -> Verdict:
    world.baseline(command)
    world.restore()
    began = time.time()
    path = world.at / file
    names = [path.name, *HARMS[harm](path, random)]
    if path.parent.name.startswith("step_"):
        names.append(path.parent.name)
    if file.startswith("cache/"):
        names.append(path.name.partition("-")[2])
    if harm in ("delete", "link to nothing"):
        names.append(str(path.parent))
    if file.startswith("drawn/0"):
        names.append("images 0 to")  # a part has one checksum
    if path.name == "index.json":
        names += ["index", ".tar"]
    harmed = result(world.at, command)
    if path.suffix == ".jsonl" and harm not in LOSSES:
        harmed = dict.fromkeys(harmed, "")
    return world.judge(command, names, world.start(command).wait(), began, harmed)


# -- the harms; each returns further names that a message may use ---------------------------------


def flip(path: Path, random: Random) -> list[str]:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return []


def cut(path: Path, random: Random) -> list[str]:
    os.truncate(path, random.randrange(path.stat().st_size))
    return []


def empty(path: Path, _: Random) -> list[str]:
    os.truncate(path, 0)
    return []


def zeros(path: Path, _: Random) -> list[str]:
    path.write_bytes(bytes(path.stat().st_size))
    return []


def delete(path: Path, _: Random) -> list[str]:
    path.unlink()
    return []


def append(path: Path, random: Random) -> list[str]:
    with path.open("ab") as file:
        file.write(random.randbytes(random.randrange(1, 600)))
    return []


def directory(path: Path, _: Random) -> list[str]:
    path.unlink()
    path.mkdir()
    return []


def fifo(path: Path, _: Random) -> list[str]:
    path.unlink()
    os.mkfifo(path)
    return []


def link(path: Path, _: Random) -> list[str]:
    path.unlink()
    path.symlink_to("nothing")
    return []


def swap(path: Path, random: Random) -> list[str]:
    """Swap it with a file of its kind, which has other content and if possible the same size."""
    places = path.parents[1] if path.parent.name.startswith("step_") else path.parent
    others = [p for p in places.rglob(f"*{path.suffix}") if p.is_file() and p != path]
    others = [p for p in others if p.read_bytes() != path.read_bytes()]
    alike = [p for p in others if p.stat().st_size == path.stat().st_size] or others
    if not alike:
        return flip(path, random) if path.stat().st_size else append(path, random)
    other = random.choice(sorted(alike))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return [other.name, other.parent.name]


def letter(path: Path, random: Random) -> list[str]:
    """Change one letter or digit into another."""
    content = bytearray(path.read_bytes())
    places = [k for k, byte in enumerate(content) if chr(byte).isalnum()]
    if not places:
        return flip(path, random)
    k = random.choice(places)
    choice = b"0123456789" if chr(content[k]).isdigit() else b"abcdefghijklmnopqrstuvwxyz"
    content[k] = random.choice([c for c in choice if c != content[k]])
    path.write_bytes(content)
    return []


def lose_line(path: Path, random: Random) -> list[str]:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[random.randrange(len(lines))]
    path.write_bytes(b"".join(lines))
    return []


def repeat_line(path: Path, random: Random) -> list[str]:
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(random.randrange(len(lines)), random.choice(lines))
    path.write_bytes(b"".join(lines))
    return []


def change_json(
    change: Callable[[Any, Any, Random], None], path: Path, random: Random
) -> list[str]:
    """Change one field at any depth, and write the document or the row again as JSON."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = random.randrange(len(lines))
    document = json.loads(lines[number])
    holder, key = random.choice(list(fields(document)))
    change(holder, key, random)
    lines[number] = json.dumps(document)
    path.write_text("\n".join(lines) + "\n" * (path.suffix == ".jsonl"))
    return [str(key)] if isinstance(key, str) else []


def fields(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        yield node, key
        if isinstance(value, dict | list):
            yield from fields(value)


def other_type(holder: Any, key: Any, random: Random) -> None:
    kinds = [None, True, 7, -1, 0.5, "text", [], {}, [[]], {"a": None}, 10**30]
    holder[key] = random.choice([k for k in kinds if type(k) is not type(holder[key])])


def other_value(holder: Any, key: Any, random: Random) -> None:
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = random.choice([value + 1, value - 1, -value - 1, value + 10**6])
    elif isinstance(value, float):
        holder[key] = value * 1.5 + 1
    elif isinstance(value, str):
        holder[key] = random.choice([value + "x", value[:-1] if len(value) > 1 else "y", "../up"])
    elif isinstance(value, list):
        holder[key] = [*value, *value[:1]] if value else [1]
    else:
        holder[key] = {**value, "more": 1}


def drop(holder: Any, key: Any, _: Random) -> None:
    del holder[key]


HARMS: dict[str, Callable[[Path, Random], list[str]]] = {
    "flip": flip,
    "cut": cut,
    "empty": empty,
    "zeros": zeros,
    "delete": delete,
    "append": append,
    "directory": directory,
    "fifo": fifo,
    "link to nothing": link,
    "swap": swap,
    "letter": letter,
    "lose a line": lose_line,
    "repeat a line": repeat_line,
    "json type": partial(change_json, other_type),
    "json value": partial(change_json, other_value),
    "json drop": partial(change_json, drop),
}
