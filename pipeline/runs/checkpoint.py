"""Write and read checkpoints (all that a resume needs) and snapshots (G_ema for users).

    checkpoints/step_00010000/  {G,D,G_ema}.safetensors  optimizers.pt  state.json
    snapshots/step_00010000/    generator.safetensors  config.yaml

Each is written to ``step_N.tmp``, synced and renamed: a folder without ``.tmp`` is complete.
``state.json`` holds a SHA-256 of every file and of itself, its step, the id and folder of the run,
the precision and the whole configuration. No file depends on the number of ranks.
A resume reproduces weights, optimizers, data order, noise and grids exactly; only the running means
between two log rows start anew.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config
from pipeline.models.dcgan import make_discriminator, make_generator
from pipeline.models.sampling import make_sampler
from pipeline.runs.results import kept_steps
from pipeline.runs.step_folders import CHECKPOINTS, SNAPSHOTS, committed, folder_of, step_of
from pipeline.runtime.errors import CheckpointError, RunFolderError, is_out_of_memory
from pipeline.runtime.files import sha256_of, sync_folder

STATE, OPTIMIZERS, GENERATOR = "state.json", "optimizers.pt", "generator.safetensors"
HUB_WEIGHTS = "model.safetensors"
"""File name of G's weights in a folder for the Hugging Face Hub; ``GENERATOR`` in a snapshot."""


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
        state: JSON values for state.json.

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
        document["digest"] = _digest(document)
        (partial / STATE).write_text(json.dumps(document, indent=1))
    return final


def export_snapshot(
    run_dir: Path, step: int, weights: Mapping[str, Tensor], config: Config, device: Any = "cpu"
) -> Path:
    """Write G's weights, with recomputed BatchNorm statistics, and the configuration.

    Args:
        run_dir: the run's folder.
        step: the step of the weights.
        weights: G's parameters by name, usually of G_ema.
        config: the whole configuration of the run.
        device: where the BatchNorm statistics are computed.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    final = folder_of(run_dir, SNAPSHOTS, step)
    tensors = to_cpu_contiguous(make_sampler(config.model, weights, device).state_dict())
    with new_folder(final) as partial:
        save_file(tensors, partial / GENERATOR, metadata={"step": str(step)})
        (partial / "config.yaml").write_text(dump(config))
    return final


def load_snapshot(path: Path, device: Any = "cpu") -> tuple[nn.Module, Config]:
    """Load a snapshot folder, or one made for the Hub. Returns (G in eval mode, configuration).

    Raises:
        CheckpointError: not a snapshot, damaged, or of another architecture than its configuration.
    """
    file = weights_file(path)
    if not (file.is_file() and (path / "config.yaml").is_file()):
        raise CheckpointError(f"{path}: not a snapshot; it must hold {GENERATOR} and config.yaml.")
    config = load(path / "config.yaml")
    try:
        return make_sampler(config.model, load_file(file), device), config
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be used: {error}.") from None


def check_finite(G: nn.Module, path: Path) -> None:
    """Raise if a network loaded from ``path`` has NaN or infinity in parameters or buffers.

    Raises:
        CheckpointError: naming ``path``.
    """
    if not all(bool(torch.isfinite(values).all()) for values in G.state_dict().values()):
        raise CheckpointError(f"{path}: its weights are NaN or infinite: training had diverged.")


def weights_file(path: Path) -> Path:
    """Return the file of G's weights in a snapshot folder, or in one made for the Hub."""
    hub = path / HUB_WEIGHTS
    return hub if hub.is_file() else path / GENERATOR


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
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        digest = state.pop("digest")
        if digest != _digest(state):
            raise ValueError(f"{STATE} is damaged")
        if state["step"] != step_of(path):
            raise ValueError(f"{STATE} is of step {state['step']}")
    except PermissionError:
        raise _unreadable(path / STATE) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return state


def read(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying the SHA-256 of each file.

    Raises:
        CheckpointError: a file is missing or its checksum differs.
        RunFolderError: a file may not be read, which is no damage.
    """
    state = read_state(path)
    try:
        for name, expected in state["files"].items():
            if Path(name).name != name or sha256_of(path / name) != expected:
                raise ValueError(f"{name} is damaged (its checksum differs)")
        weights = {
            name.removesuffix(".safetensors"): load_file(path / name)
            for name in state["files"]
            if name.endswith(".safetensors")
        }
        optimizers = torch.load(path / OPTIMIZERS, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise _unreadable(Path(error.filename or path)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        if is_out_of_memory(error):  # no damage: an older checkpoint is as large
            raise
        # The checksums are right, so another program wrote the files like this.
        raise CheckpointError(f"{path}: not tensors alone: {str(error).splitlines()[0]}") from None
    return Checkpoint(path, state, weights, optimizers)


def prune(run_dir: Path, saved: int, keep: int, keep_every: int, keep_best: bool = False) -> None:
    """Remove old checkpoints, but never the one that was just saved.

    Args:
        run_dir: the run's folder.
        saved: the step that was just saved; later ones can only be left-overs and stay.
        keep: number of newest checkpoints to keep, at least 1.
        keep_every: also keep multiples of this many steps; 0 = none.
        keep_best: also keep the best checkpoint by each protocol, and all not yet evaluated.
    """
    folders = [path for path in committed(run_dir) if step_of(path) <= saved]
    kept = kept_steps(run_dir, [step_of(path) for path in folders]) if keep_best else set()
    for path in folders[:-keep]:
        step = step_of(path)
        if step not in kept and (not keep_every or step % keep_every):
            # Rename first: after a kill no half-removed folder looks complete.
            doomed = path.with_name(f"{path.name}.tmp")
            with suppress(OSError):
                path.rename(doomed)
                shutil.rmtree(doomed)


def remove_unfinished(run_dir: Path) -> None:
    """Remove the ``.tmp`` folders of a process that was killed while it wrote."""
    for kind in (CHECKPOINTS, SNAPSHOTS):
        for path in (run_dir / kind).glob("step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def to_cpu_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors as safetensors needs them: to the CPU, contiguous in their logical order."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
    shutil.rmtree(displaced, ignore_errors=True)


def _digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of state.json without its own digest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    names = ("torch", "accelerate", "numpy", "webdataset")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _unreadable(path: Path) -> RunFolderError:
    return RunFolderError(
        f"{path}: may not be read. Give read permission, then run the same command again."
    )


def _unwritable(path: Path, error: Exception) -> RunFolderError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
    reason = "the disk is full" if full else str(error).splitlines()[0]
    return RunFolderError(
        f"{path}: could not be written: {reason}. Earlier checkpoints are intact; free space or "
        "fix the folder, then run the same command again."
    )


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """Estimate bytes of tensors: (all checkpoints and snapshots of a run, one checkpoint)."""
    with torch.device("meta"):
        g, d = (
            sum(p.numel() for p in network.parameters())
            for network in (make_generator(config.model), make_discriminator(config.model))
        )
    one = 4 * (2 * g + d) + 8 * (g + d)  # fp32: G, G_ema, D; Adam's two moments of G and D
    train = config.train
    kept = train.keep + (train.total_steps // train.keep_every if train.keep_every else 0)
    snapshots = train.total_steps // train.checkpoint_every if train.checkpoint_every else 1
    return kept * one + snapshots * 4 * g, one


def written_bytes(run_dir: Path) -> int:
    """Return the bytes of the checkpoints and snapshots that a run has written."""
    files = (path for kind in (CHECKPOINTS, SNAPSHOTS) for path in run_dir.glob(f"{kind}/*/*"))
    return sum(path.stat().st_size for path in files if path.is_file())
