"""Write and read snapshots: G_ema for users, with BatchNorm statistics for sampling.

    snapshots/step_00010000/    generator.safetensors  config.yaml

The metadata of generator.safetensors has the step, the architecture and a SHA-256 of the tensors,
so a changed byte, a file of another step and a configuration of another G are refused. config.yaml
has a checksum of its own (``documents.sign``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.config.loading import dump, load
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.sampling import generator_id, make_sampler
from pipeline.runs.checkpoint import new_folder, unreadable
from pipeline.runs.step_folders import SNAPSHOTS, folder_of, step_of
from pipeline.runtime.documents import (
    DamagedFile,
    parse_json,
    read_bytes,
    require_fields,
    sign,
)
from pipeline.runtime.errors import CheckpointError, ConfigError, DamagedSnapshot
from pipeline.runtime.tensor_files import (
    LARGEST,
    parse_safetensors,
    read_metadata,
    tensors_sha256,
    to_cpu_contiguous,
)

GENERATOR = "generator.safetensors"
HUB_WEIGHTS = "model.safetensors"
"""File name of G's weights in a folder for the Hugging Face Hub; ``GENERATOR`` in a snapshot."""
ENTRY = "snapshot"
"""The one entry of the metadata: safetensors writes several in random order."""


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
    content = weights_bytes(make_sampler(config.model, weights, device), config.model, step)
    with new_folder(final) as partial:
        (partial / GENERATOR).write_bytes(content)
        (partial / "config.yaml").write_text(sign(dump(config, public=True)))
    return final


def weights_bytes(G: nn.Module, model: ModelConfig, step: int | None) -> bytes:
    """Return the safetensors file of G's parameters and buffers, with its metadata."""
    tensors = to_cpu_contiguous(G.state_dict())
    about = {
        "step": step,
        "model": dataclasses.asdict(model),
        "sha256": tensors_sha256(tensors),
        "generator": generator_id(model, tensors),
    }
    return save(tensors, {ENTRY: json.dumps(about)})


def load_snapshot(path: Path, device: Any = "cpu") -> tuple[nn.Module, Config]:
    """Load a snapshot folder, or one made for the Hub. Returns (G in eval mode, configuration).

    Raises:
        CheckpointError: not a snapshot; or, as ``DamagedSnapshot``, damaged, of another step than
            its folder says, or of another architecture than its configuration.
        RunFolderError: a file cannot be read, which is no damage.
    """
    file = weights_file(path)
    if not (file.exists() and (path / "config.yaml").exists()):
        raise CheckpointError(f"{path}: not a snapshot; it must hold {GENERATOR} and config.yaml.")
    try:
        config = load(path / "config.yaml", saved=True)
        tensors, metadata = parse_safetensors(read_bytes(file, LARGEST), file)
        check(file, tensors, metadata, config.model)
        return make_sampler(config.model, tensors, device), config
    except (DamagedFile, ConfigError, ValueError) as error:
        detail = str(error).removeprefix("--config ").removeprefix(f"{path}/").rstrip(".")
        raise DamagedSnapshot(
            f"{path}: cannot be used: {detail}. Restore it from a copy, or take the snapshot of "
            "another step."
        ) from None
    except OSError as error:
        raise unreadable(file, error) from None


def check(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], model: ModelConfig
) -> None:
    """Raise ``DamagedFile`` if a weights file does not hold what its metadata says.

    Files of early versions say nothing, or the step alone.
    """
    if ENTRY not in metadata:
        return
    about = parse_json(metadata[ENTRY].encode(), f"{file}, metadata")
    require_fields(about, {"model": dict, "sha256": str}, f"{file}, metadata")
    if tensors_sha256(tensors) != about["sha256"]:
        raise DamagedFile(f"{file}: is damaged (its checksum differs)")
    if about.get("generator", generator := generator_id(model, tensors)) != generator:
        raise DamagedFile(f"{file}: is damaged (its generator differs)")
    number = file.parent.name.removeprefix("step_")
    if number.isdecimal() and about.get("step") not in (None, step_of(file.parent)):
        raise DamagedFile(f"{file}: holds the weights of step {about['step']}")
    if differing := [
        f"model.{key} is {value}, but the weights were trained with {about['model'][key]}"
        for key, value in dataclasses.asdict(model).items()
        if about["model"].get(key, value) != value
    ]:
        raise DamagedFile(f"config.yaml: {'; '.join(differing)}")


def stated_generator(path: Path) -> str:
    """Return the ``generator_id`` that a snapshot folder states; "" if it states none.

    Only the beginning of the file is read. ``load_snapshot`` compares it with the weights.
    """
    try:
        about = json.loads(read_metadata(weights_file(path)).get(ENTRY, "{}"))
        return str(about.get("generator", ""))
    except (OSError, DamagedFile, ValueError, AttributeError, RecursionError):
        return ""


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
