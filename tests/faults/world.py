"""A tiny world with one of everything that the commands write, and what they make of it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from base import Ended, Process, Verdict, check_always, last_line

CONFIG = """
run: {{dir: {at}/run}}
model: {{architecture: mlp, image_size: 16, channels: 1, z_dim: 4, ngf: 4, ndf: 4}}
data: {{shards: {at}/shards, batch_size: 8, workers: 1, prefetch: 1, cache_dir: {at}/cache}}
train: {{precision: fp32, total_steps: 4, checkpoint_every: 2, log_every: 1, sample_every: 0}}
tracking: {{wandb: disabled}}
eval: {{num_images: 40, batch_size: 40, cache_dir: {at}/references}}
"""


Start = Callable[[], list["Process"]]


class World:
    """A folder with one of everything that the commands write, restored before each case.

    The folder of the run keeps its inode: a run tells by it whether it is a copy.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.at = root, root / "world"
        self.saved = root / "saved"
        self._baselines: dict[str, tuple[Ended, dict[str, str]]] = {}
        self.at.mkdir(parents=True)
        self._build()
        shutil.copytree(self.at, self.saved, symlinks=True)

    def _build(self) -> None:
        import numpy as np
        from PIL import Image

        (self.at / "home").mkdir()
        (self.at / "disk").mkdir()
        random = np.random.default_rng(0)
        for k in range(24):
            path = self.at / "source" / f"class{k % 2}" / f"{k:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
        shutil.make_archive(str(self.at / "source"), "zip", self.at / "source")
        (self.at / "tiny.yaml").write_text(CONFIG.format(at=self.at))
        (self.at / "idx").mkdir()
        for what, head in (("images-idx3", (0x803, 24, 16, 16)), ("labels-idx1", (0x801, 24))):
            content = struct.pack(f">{len(head)}I", *head) + bytes(24 * 256 if head[2:] else 24)
            path = self.at / "idx" / f"train-{what}-ubyte.gz"
            path.write_bytes(gzip.compress(content))
        for name in ("prepare", "train", "train-remote", "evaluate-one", "generate-png"):
            self._must(name)
        (self.at / "tars_in").mkdir()
        for path in self.at.glob("shards/*.tar"):
            shutil.copy(path, self.at / "tars_in")
        self._must("generate-shards")
        self._must("prepare-part")
        self._interrupt("generate-half-png", "half.png.tmp/.generate")
        self._interrupt("generate-half-npz", "half.npz.tmp/.generate")
        self._must("hub")

    def _must(self, name: str) -> None:
        ended = self.start(name).wait()
        assert ended.code == 0, f"{name}: {ended.code}: {ended.output}"

    def _interrupt(self, name: str, markers: str) -> None:
        """Kill a command after its first marker, so that its set is half finished."""
        folder, out = self.at / markers, self.at / markers.partition(".tmp")[0]
        for _ in range(100):  # a kill may come after the end
            process = self.start(name)
            while not process.poll():
                with contextlib.suppress(FileNotFoundError):
                    if any(path.name.isdigit() for path in folder.iterdir()):
                        process.kill()
            if folder.is_dir():
                break
            remove(out)
        assert folder.is_dir(), f"{name} was not interrupted: {process.wait().output}"
        # Of all that it had finished by then one part is kept, so that every world is the same.
        for path in [*folder.iterdir(), *folder.parent.glob("*.png")]:
            if path.stem.isdigit() and int(path.stem) >= (PART if path.suffix == ".png" else 1):
                path.unlink()

    def restore(self) -> None:
        """Undo whatever a case did."""
        run = self.at / "run"
        for path in self.at.iterdir():
            if path != run:
                remove(path)
        for path in run.iterdir():
            remove(path)
        shutil.copytree(self.saved, self.at, symlinks=True, dirs_exist_ok=True)

    def words(self, name: str) -> list[str]:
        """Return the command line; whoever evaluates names the extractor, unless it is hostile."""
        words = [word.format(at=self.at) for word in WORDS[name].split()]
        extractor = words[0] == "evaluate" and name not in REFUSED
        return words + ["eval.extractor=tiny_extractor:Tiny"] * extractor

    def start(self, name: str, **options: object) -> Process:
        cwd = self.at / "run" if name == "evaluate-inside" else self.at
        return Process(self.words(name), cwd, **options)  # type: ignore[arg-type, misc]

    def baseline(self, name: str, start: Start | None = None) -> tuple[Ended, dict[str, str]]:
        """Return how a command ends in the undamaged world, and what it leaves.

        Args:
            name: the command.
            start: starts its processes, if it is several ranks.
        """
        if name not in self._baselines:
            self.restore()
            for process in start() if start else [self.start(name)]:
                ended = process.wait()
                expected = 2 if name in REFUSED else 0
                assert ended.code == expected, f"{name}: {ended.code}: {ended.output}"
            self._baselines[name] = ended, result(self.at, name)
        return self._baselines[name]

    def again(self, name: str, start: Start | None = None) -> Verdict:
        """Run a command once more, without harm: it must leave what the undisturbed one left."""
        _, expected = self._baselines[name]
        for process in start() if start else [self.start(name)]:
            ended = process.wait()
            if (bad := check_always(self.at, ended, 0)) is not None:
                return bad
            if ended.code:
                return Verdict("half-written", f"the next one ends with {last_line(ended.output)}")
        found = result(self.at, name)  # a rival may have made more
        newest = max((k.rpartition("/")[0] for k in expected if "/checkpoints/" in k), default="")
        differing = [
            k
            for k in expected
            if found.get(k) != expected[k] and ("/checkpoints/" not in k or k.startswith(newest))
        ]
        differing += [k for k in found if ".tmp/" in k and k not in expected]
        if differing:
            return Verdict("silent", f"after another one: other {', '.join(differing[:4])}")
        return Verdict("harmless")

    def judge(
        self,
        name: str,
        names: Sequence[str],
        ended: Ended,
        began: float,
        harmed: dict[str, str] | None = None,
    ) -> Verdict:
        """Give the verdict of a command that was run on a harmed world.

        Args:
            name: the command, a key of ``WORDS``.
            names: a message must have one of them: the harmed file, its folder, or the key.
            ended: how it ended.
            began: when the case began, in seconds since the epoch.
            harmed: ``result`` before the command; what it left as it was is not its doing.
        """
        output = ended.output
        if (bad := check_always(self.at, ended, began)) is not None:
            return bad
        named = [n for n in names if n in output]
        if ended.code:
            says = "error: " in output or "FAILED" in output
            if says and named:
                return Verdict("detected", last_line(output))
            return Verdict("names no file", f"exit {ended.code}: {last_line(output)}")
        before, expected = self._baselines[name]
        found, harmed = result(self.at, name), harmed or {}
        differing = sorted(
            k
            for k in {*found, *expected}
            if found.get(k) != expected.get(k)
            and (not harmed or name in CLAIMS or found.get(k) != harmed.get(k))
        )
        if not differing:
            return Verdict("harmless")
        known = set(before.output.splitlines())
        if any(n in line for line in output.splitlines() if line not in known for n in names):
            return Verdict("harmless", "said")
        return Verdict("silent", f"other {', '.join(differing[:4])}; says: {last_line(output)}")


WORDS = {
    "prepare": "prepare {at}/source --out {at}/shards --size 16 --channels 1 --shard-mib 0.01 "
    "--workers 1",
    "prepare-part": "prepare {at}/source --out {at}/part --size 16 --channels 1 --shard-mib 0.01 "
    "--workers 1 --part 0/2",
    "prepare-rest": "prepare {at}/source --out {at}/part --size 16 --channels 1 --shard-mib 0.01 "
    "--workers 1",
    "prepare-zip": "prepare {at}/source.zip --out {at}/zipped --size 16 --channels 1 --workers 1",
    "prepare-new": "prepare {at}/source --out {at}/made --size 16 --channels 1 --workers 1",
    "prepare-made": "prepare {at}/source --out {at}/made --size 16 --channels 1 --workers 2 "
    "--shard-mib 0.005",
    "prepare-made-0": "prepare {at}/source --out {at}/made --size 16 --channels 1 --workers 2 "
    "--shard-mib 0.005 --part 0/2",
    "prepare-made-1": "prepare {at}/source --out {at}/made --size 16 --channels 1 --workers 2 "
    "--shard-mib 0.005 --part 1/2",
    "prepare-drawn": "prepare {at}/drawn --out {at}/made --size 24 --format png --workers 2 "
    "--shard-mib 0.02",
    "prepare-tars": "prepare {at}/tars_in --out {at}/made --size 16 --channels 1 --workers 1",
    "prepare-idx": "prepare fashion-mnist --idx {at}/idx --out {at}/made --size 16 --workers 1",
    "index-tars": "prepare {at}/tars_in --workers 1",
    "verify": "prepare --verify {at}/shards --workers 1",
    "train": "train --config {at}/tiny.yaml",
    "train-new": "train --config {at}/tiny.yaml run.dir={at}/new_run",
    "train-two": "train --config {at}/tiny.yaml run.dir={at}/two train.micro_batch=4",
    "train-long": "train --config {at}/tiny.yaml run.dir={at}/long train.total_steps=1000000 "
    "train.checkpoint_every=200 train.micro_batch=4",
    "train-soak": "train --config {at}/tiny.yaml run.dir={at}/soak train.total_steps=1000000000 "
    "train.checkpoint_every=0 train.checkpoint_minutes=0.05 train.log_every=500 train.keep=2",
    "evaluate-soak": "evaluate --config {at}/tiny.yaml --run {at}/soak --watch --every 1",
    "train-on": "train --config {at}/tiny.yaml train.total_steps=6",
    "train-on-0": "train --config {at}/tiny.yaml train.total_steps=6 data.workers=0",
    "train-remote": "train --config {at}/tiny.yaml data.shards=file://{at}/shards "
    "run.dir={at}/remote train.total_steps=3",
    "train-cached": "train --config {at}/tiny.yaml data.shards=file://{at}/shards "
    "run.dir={at}/remote train.total_steps=6",
    "train-url": "train --config {at}/tiny.yaml run.dir={at}/of_url data.cache_dir={at}/fetched "
    "data.shards={at}/shards",
    "train-disk": "train --config {at}/tiny.yaml run.dir={at}/disk/run",
    "evaluate-disk": "evaluate --run {at}/run --pending eval.cache_dir={at}/disk",
    "generate-disk": "generate images --run {at}/run --num 20 --out {at}/disk/drawn",
    "generate-disk-npz": "generate images --run {at}/run --num 20 --format npz "
    "--out {at}/disk/drawn.npz",
    "generate-disk-tars": "generate images --run {at}/run --num 20 --format shards "
    "--out {at}/disk/tars",
    "prepare-disk": "prepare {at}/source --out {at}/disk/shards --size 16 --channels 1 "
    "--shard-mib 0.01 --workers 2",
    "grid-disk": "generate grid --run {at}/run --rows 0-7 --out {at}/disk/grid.png --overwrite",
    "hub-disk": "generate hub --run {at}/run --out {at}/disk/hub",
    "train-keep": "train --config {at}/tiny.yaml train.total_steps=6 train.keep=1 "
    "eval.keep_best=true",
    "train-drawn": "train --config {at}/tiny.yaml data.shards={at}/tars run.dir={at}/of_drawn "
    "train.total_steps=2",
    "train-cached-too": "train --config {at}/tiny.yaml data.shards=file://{at}/shards "
    "run.dir={at}/remote_too train.total_steps=6",
    "train-fork": "train --config {at}/tiny.yaml run.dir={at}/forked run.fork={at}/run "
    "train.total_steps=5",
    "evaluate-one": "evaluate --checkpoint {at}/run/snapshots/step_00000002",
    "evaluate": "evaluate --run {at}/run --pending",
    "evaluate-fresh": "evaluate --run {at}/run --pending eval.cache_dir={at}/fresh",
    "evaluate-raw": "evaluate --run {at}/run eval.weights=raw",
    "evaluate-alone": "evaluate --checkpoint {at}/run/snapshots/step_00000004 "
    "--config {at}/tiny.yaml",
    "evaluate-bare": "evaluate --run {at}/run eval.extractor_weights={at}/none",
    "evaluate-inside": "evaluate --run . eval.extractor_weights=none",
    "evaluate-images": "evaluate --run {at}/run --images {at}/drawn",
    "generate-png": "generate images --run {at}/run --num 50 --out {at}/drawn",
    "generate-shards": "generate images --run {at}/run --num 20 --format shards --out {at}/tars",
    "generate-half-png": "generate images --run {at}/run --num 200 --out {at}/half.png",
    "generate-half-npz": "generate images --run {at}/run --num 900 --format npz "
    "--out {at}/half.npz",
    "generate-new": "generate images --run {at}/run --num 12 --out {at}/new",
    "grid": "generate grid --run {at}/run --rows 0-7 --out {at}/grid.png --overwrite",
    "hub": "generate hub --run {at}/run --out {at}/hub",
    "hub-again": "generate hub --run {at}/run --out {at}/hub --push user/name",
    "doctor": "doctor --config {at}/tiny.yaml",
}
PART = 64
"""Images of a part of a small set."""
REFUSED = ("evaluate-bare", "evaluate-inside", "hub-again")
"""Commands that end with a message in any world: no weights of Inception, no Hub."""
CLAIMS = ("prepare", "generate-png", "generate-shards")
"""Commands that say ``already complete`` of what they did not make."""
WITH_MADE = ("prepare-new", "prepare-tars", "prepare-idx", "prepare-made", "prepare-drawn")
TIMES = ("time", "perf/", "seconds", "_at")


def result(at: Path, name: str) -> dict[str, str]:
    """Return the digest of everything that a command leaves for its user, without times."""
    roots = {"prepare": "shards", "prepare-rest": "part", "prepare-zip": "zipped"}
    roots |= dict.fromkeys(WITH_MADE, "made")
    roots |= {"train-new": "new_run", "train-two": "two", "train-long": "long"}
    roots |= {"index-tars": "tars_in", "train-url": "of_url"}
    if name.partition("-")[2].startswith("disk"):
        return (
            result(at, "run") | result_of(at, "disk")
            if name == "evaluate-disk"
            else result_of(at, "disk")
        )
    roots |= {"generate-png": "drawn", "generate-shards": "tars", "generate-half-png": "half.png"}
    roots |= {"generate-half-npz": "half.npz", "generate-new": "new", "grid": "grid.png"}
    roots |= {
        "train-drawn": "of_drawn",
        "hub": "hub",
        "train-fork": "forked",
        "train-cached": "remote",
        "train-remote": "remote",
    }
    if name in ("verify", "doctor", "evaluate-images", "hub-again"):
        return {}
    return result_of(at, roots.get(name, "run"))


def result_of(at: Path, name: str) -> dict[str, str]:
    """Return the digest of each file in a folder, without what tells times."""
    root, found = at / name, {}
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        key = str(path.relative_to(at))
        if skip(path, key):
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            with contextlib.suppress(ValueError):
                for row in map(json.loads, content.splitlines()):
                    for field in [f for f in row if f.startswith(TIMES) or f == "check"]:
                        del row[field]
                    found[f"{key}: {json.dumps(row, sort_keys=True)}"] = "there"
                continue
        elif path.name == "state.json":
            with contextlib.suppress(ValueError, AttributeError):
                state = json.loads(content)
                content = str([state.get(k) for k in ("step", "stream", "precision")]).encode()
        elif path.name == "run.json":
            with contextlib.suppress(ValueError, AttributeError):
                content = str(root.name == "run" and json.loads(content).get("id")).encode()
        found[key] = hashlib.sha256(content).hexdigest()
    return found


def skip(path: Path, key: str) -> bool:
    """Leave out what holds times, process ids or harmed remains, and old checkpoints."""
    if not path.is_file() or path.is_symlink():
        return True
    if path.name.startswith((".lock", ".evaluations")) or path.name.endswith(".lock"):
        return True
    if key.startswith("run/evaluations/"):  # pictures, the same for weights=ema and raw
        return True
    return path.name in ("nothing", "log.txt", "PREEMPTED", "config.yaml") or ".damaged" in key


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def new_world() -> Iterator[World]:
    """A new world in memory, or on the disk where there is too little."""
    shm = Path("/dev/shm")
    in_memory = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 1 << 30
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=shm if in_memory else None))
    try:
        yield World(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
