"""Write and read checkpoints: all that a resume needs.

    checkpoints/step_00010000/  {G,D,G_ema}.safetensors  optimizers.pt  state.json

Each is written to ``step_N.tmp``, synced and renamed: a folder without ``.tmp`` is complete.
``state.json`` holds a SHA-256 of every file and of itself, its step, the id and folder of the run,
the precision and the whole configuration. No file depends on the number of ranks.
A resume reproduces weights, optimizers, data order, noise and grids exactly; only the running means
between two log rows start anew.
"""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.runs.results import kept_steps
from pipeline.runs.step_folders import CHECKPOINTS, SNAPSHOTS, committed, folder_of, step_of
from pipeline.runtime.documents import DamagedFile, read_document, sealed
from pipeline.runtime.errors import CheckpointError, RunFolderError
from pipeline.runtime.files import sha256_of, sync_folder
from pipeline.runtime.host import remedy_of_file
from pipeline.runtime.tensor_files import (
    parse_optimizers,
    parse_safetensors,
    read_checked,
    to_cpu_contiguous,
)
from pipeline.runtime.work_folder import remove_folder

STATE, OPTIMIZERS = "state.json", "optimizers.pt"
GENERATORS = "generators"
"""Field of state.json with the ``generator_id`` of each network that can be evaluated: G, G_ema."""
FIELDS: dict[str, type] = {
    "step": int,
    "images_seen": int,
    "run_id": str,
    "precision": str,
    "micro_batch": int,
    "stream": dict,
    "files": dict,
}
"""What state.json must have, also that of an early version."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, its tensors on the CPU.

    ``state`` is the content of state.json. ``weights`` maps network and tensor name to a tensor.
    ``optimizers`` maps the name of an optimizer or of the gradient scaler to its state_dict.
    """

    path: Path
    state: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]
    optimizers: dict[str, Any]


def save(
    run_dir: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and return its folder; one of the same step is replaced. Rank 0 only.

    Args:
        run_dir: the run's folder.
        step: number of optimizer steps done.
        networks: networks by name, on any device; their state_dict is saved.
        optimizers: objects with ``state_dict`` by name: optimizers, a gradient scaler.
        state: JSON values for state.json: those of ``FIELDS`` that are not known here.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    final = folder_of(run_dir, CHECKPOINTS, step)
    weights = {name: to_cpu_contiguous(net.state_dict()) for name, net in networks.items()}
    content = io.BytesIO()
    torch.save({name: one.state_dict() for name, one in optimizers.items()}, content)
    with new_folder(final) as partial:
        for name, tensors in weights.items():
            save_file(tensors, partial / f"{name}.safetensors")
        (partial / OPTIMIZERS).write_bytes(content.getbuffer())
        document = dict(state) | {
            "step": step,
            "versions": _versions(),
            "files": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
        }
        (partial / STATE).write_text(json.dumps(sealed(document), indent=1))
    return final


def read_newest(run_dir: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the newest undamaged checkpoint (None without any), and the damaged newer ones.

    The message of the damage comes with the path of each.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    damaged: dict[Path, str] = {}
    candidates = committed(run_dir)
    for path in reversed(candidates):
        try:
            return read(path), damaged
        except CheckpointError as error:
            damaged[path] = str(error)
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {run_dir / CHECKPOINTS} is usable:\n  "
            + "\n  ".join(damaged.values())
            + f"\nRestore them from a copy; or move them and {run_dir / 'progress'} away to start "
            "this run anew."
        )
    return None, damaged


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """Return state.json of the newest checkpoint whose state.json is whole; None without any."""
    for path in reversed(committed(run_dir)):
        with suppress(CheckpointError):
            return read_state(path)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read and verify state.json of a checkpoint, and that it is of the step in the folder's name.

    Raises:
        CheckpointError: it is missing, damaged or of another step.
        RunFolderError: it cannot be read, which is no damage.
    """
    try:
        state = read_document(path / STATE, FIELDS, must_be_sealed=True)
    except (DamagedFile, FileNotFoundError) as error:
        raise CheckpointError(_in_folder(path, error)) from None
    except OSError as error:
        raise unreadable(path / STATE, error) from None
    if state["step"] != step_of(path):
        raise CheckpointError(f"{path}: {STATE} is of step {state['step']}")
    if state["precision"] not in ("fp32", "bf16", "fp16"):
        raise CheckpointError(f"{path}: {STATE} has the precision {state['precision']!r}")
    if not isinstance(state.get("config") or {}, dict):
        raise CheckpointError(f"{path}: {STATE} has no configuration under config")
    if OPTIMIZERS not in state["files"]:
        raise CheckpointError(f"{path}: {STATE} does not list {OPTIMIZERS}")
    for name, digest in state["files"].items():
        if Path(name).name != name or not isinstance(digest, str):
            raise CheckpointError(f"{path}: {STATE} lists {name!r}, which is no file beside it")
    return state


def read(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying the SHA-256 of each file.

    Raises:
        CheckpointError: a file is missing or damaged.
        RunFolderError: a file cannot be read, which is no damage.
    """
    state = read_state(path)
    weights: dict[str, dict[str, Tensor]] = {}
    optimizers: dict[str, Any] = {}
    file = path
    try:
        for name, digest in state["files"].items():
            file = path / name
            content = read_checked(file, digest)
            # The checksums are right, so another program wrote what cannot be parsed.
            if name.endswith(".safetensors"):
                weights[file.stem], _ = parse_safetensors(content, file)
            elif name == OPTIMIZERS:
                optimizers = parse_optimizers(content, file)
    except (DamagedFile, FileNotFoundError) as error:
        raise CheckpointError(_in_folder(path, error)) from None
    except OSError as error:
        raise unreadable(file, error) from None
    return Checkpoint(path, state, weights, optimizers)


def prune(
    run_dir: Path,
    saved: int,
    keep: int,
    keep_every: int,
    keep_best: bool = False,
    also: Collection[int] = (),
) -> None:
    """Remove old checkpoints, but never the one that was just saved.

    Args:
        run_dir: the run's folder.
        saved: the step that was just saved; later ones can only be left-overs and stay.
        keep: number of newest checkpoints to keep, at least 1.
        keep_every: also keep multiples of this many steps; 0 = none.
        keep_best: also keep the best checkpoint by each protocol, and all not yet evaluated.
        also: more steps to keep.
    """
    folders = [path for path in committed(run_dir) if step_of(path) <= saved]
    kept = kept_steps(run_dir, dict(map(_generators, folders))) if keep_best else set()
    for path in folders[:-keep]:
        step = step_of(path)
        if step not in {*kept, *also} and (not keep_every or step % keep_every):
            with suppress(OSError):
                remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first: after a kill no half of it looks complete."""
    doomed = path.with_name(f"{path.name}.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _generators(path: Path) -> tuple[int, Collection[str]]:
    """Return the step of a checkpoint, and the ids of its generators as far as it states them."""
    with suppress(CheckpointError):
        return step_of(path), {"", *generators(path).values()}
    return step_of(path), {""}


def generators(path: Path) -> dict[str, str]:
    """Return the ``generator_id`` of G and of G_ema as state.json of a checkpoint states them.

    Raises:
        CheckpointError: state.json is damaged.
    """
    found = read_state(path).get(GENERATORS)
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def remove_unfinished(run_dir: Path) -> None:
    """Remove the ``.tmp`` folders of a process that was killed while it wrote."""
    for kind in (CHECKPOINTS, SNAPSHOTS):
        for path in (run_dir / kind).glob("step_*.tmp"):
            remove_folder(path)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to ``final`` after the block, remove it on an error.

    Raises:
        RunFolderError: a write failed.
    """
    partial = final.with_name(f"{final.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _commit(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritable(final, error) from None


def _commit(partial: Path, final: Path) -> None:
    """Fsync the files of a folder and rename it."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(partial)
    displaced = final.with_name(f"{final.name}.old.tmp")
    if final.exists():  # it was damaged, so the run resumed before it and reached it again
        final.rename(displaced)
    os.replace(partial, final)
    sync_folder(final.parent)
    remove_folder(displaced)


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    names = ("torch", "accelerate", "numpy", "webdataset")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def unreadable(path: Path, error: OSError) -> RunFolderError:
    """Return the message for a file that cannot be read, though it may be whole."""
    return RunFolderError(f"{path}: cannot be read: {error.strerror}: {remedy_of_file(error)}.")


def _in_folder(path: Path, error: Exception) -> str:
    """Return a message that begins with the folder of the checkpoint."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: {Path(error.filename).name} is missing"
    return f"{path}: " + str(error).removeprefix(f"{path}/").replace(": is", " is", 1)


def _unwritable(path: Path, error: Exception) -> RunFolderError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
    reason = "the disk is full" if full else str(error).splitlines()[0]
    return RunFolderError(
        f"{path}: could not be written: {reason}. Earlier checkpoints are intact; free space or "
        "fix the folder, then run the same command again."
    )
