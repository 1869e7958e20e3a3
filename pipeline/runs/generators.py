"""Open a G from whatever it lies in; ``evaluate`` and ``generate`` take the same.

* a folder of snapshots/ or checkpoints/ of a run, or one made for the Hub;
* a weights file of one of these; alone, it needs the architecture in its metadata;
* an ONNX file, which runs on the CPU: ``z`` (n, z_dim + num_classes) -> images;
* ``module:Class`` or ``module:function`` (``own_generators``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.loading import load
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.sampling import make_sampler
from pipeline.runs import checkpoint, snapshot
from pipeline.runs.own_generators import is_own, open_onnx, open_own
from pipeline.runs.results import Row, best, read_rows
from pipeline.runs.step_folders import CHECKPOINTS, SNAPSHOTS, folder_of
from pipeline.runtime.documents import DamagedFile, parse_json, read_bytes
from pipeline.runtime.errors import CheckpointError, ConfigError, is_out_of_memory
from pipeline.runtime.files import sha256_of
from pipeline.runtime.tensor_files import LARGEST, parse_safetensors

NETWORK = {"ema": "G_ema", "raw": "G"}
"""``eval.weights`` -> name of the network in a checkpoint."""
WHAT = (
    "a folder of snapshots/ or checkpoints/, a folder made for the Hub, a .safetensors file of one "
    "of these, an .onnx file, or module:Class with --weights FILE"
)


@dataclass(frozen=True)
class Opened:
    """A G in eval mode, and where it is from.

    ``location`` is as the user named it, ``name`` short, ``sha256`` of the file with the weights.
    ``config`` is that of the run, None if what was opened has none. ``is_ours``: G is a network of
    ``models``.
    """

    location: str
    G: nn.Module
    model: ModelConfig
    name: str
    sha256: str
    config: Config | None = None
    is_ours: bool = True


def open_generator(
    location: str, weights: str = "", network: str = "ema", device: Any = "cpu"
) -> Opened:
    """Open a G.

    Args:
        location: see the module.
        weights: file of the weights of ``module:Class``; "" = it has its own.
        network: "ema" or "raw", of a checkpoint folder.
        device: to put G on.

    Raises:
        CheckpointError: it is none of these, damaged, or has NaN or infinite weights.
        RunFolderError: a file cannot be read, which is no damage.
    """
    if is_own(location):
        G, model, digest = open_own(location, weights, device)
        return Opened(location, G, model, location, digest, is_ours=False)
    if weights:
        raise CheckpointError(f"--weights ({weights}): is for module:Class only; {location} is not")
    path = Path(location).expanduser()
    if path.suffix == ".onnx":
        G, model = open_onnx(path)
        return Opened(location, G, model, path.name, sha256_of(path), is_ours=False)
    folder = path
    if path.is_file() and path.suffix == ".safetensors":
        folder = path.parent
        if path.stem in NETWORK.values() and (folder / checkpoint.STATE).is_file():
            network = next(key for key, name in NETWORK.items() if name == path.stem)
        elif path.name not in (snapshot.GENERATOR, snapshot.HUB_WEIGHTS) or not (
            (folder / "config.yaml").is_file()
        ):
            return _open_file(location, path, device)
    if (file := snapshot.weights_file(folder)).is_file():
        if network != "ema":
            raise CheckpointError(
                f"{path}: a snapshot contains G_ema only, but eval.weights is {network}. Give a "
                "folder in checkpoints/, or set eval.weights=ema."
            )
        G, config = snapshot.load_snapshot(folder, device)
        opened = Opened(location, G, config.model, folder.resolve().name, sha256_of(file), config)
    elif (folder / checkpoint.STATE).is_file():
        G, config = open_checkpoint(folder, folder.resolve().parents[1], network, device)
        file = folder / f"{NETWORK[network]}.safetensors"
        opened = Opened(location, G, config.model, folder.resolve().name, sha256_of(file), config)
    else:
        found = "no such file or folder" if not path.exists() else "holds no G"
        raise CheckpointError(f"{path}: {found}. Give {WHAT}.")
    snapshot.check_finite(opened.G, path)
    return opened


def _open_file(location: str, path: Path, device: Any) -> Opened:
    """Open a weights file that lies alone, by the architecture in its metadata."""
    try:
        tensors, metadata = parse_safetensors(read_bytes(path, LARGEST), path)
        if snapshot.ENTRY not in metadata:
            raise DamagedFile("does not say of which architecture it is")
        about = parse_json(metadata[snapshot.ENTRY].encode(), f"{path}, metadata")
        config = load(None, _overrides(dict(about.get("model") or {})))
        snapshot.check(path, tensors, metadata, config.model)
        G = make_sampler(config.model, tensors, device)
    except (DamagedFile, ConfigError, ValueError) as error:
        detail = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise CheckpointError(f"{path}: cannot be used: {detail}. Give {WHAT}.") from None
    snapshot.check_finite(G, path)
    return Opened(location, G, config.model, path.name, sha256_of(path))


def open_checkpoint(
    path: Path, run_dir: Path, network: str, device: Any
) -> tuple[nn.Module, Config]:
    """Load G or G_ema of a checkpoint, with recomputed BatchNorm statistics.

    Args:
        path: the folder.
        run_dir: run folder; what a checkpoint of an early version does not state is read from it.
        network: "ema" or "raw".
        device: to put G on.

    Raises:
        CheckpointError: the files are damaged, missing or of another architecture.
    """
    found = checkpoint.read(path)
    try:
        file = run_dir / "config.yaml"
        config = load(
            file if file.is_file() else None, _overrides(found.state.get("config")), saved=True
        )
        return make_sampler(config.model, found.weights[NETWORK[network]], device), config
    except (KeyError, ValueError, RuntimeError, ConfigError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: cannot be used: {error}.") from None


def _overrides(values: Mapping[str, Any] | None) -> list[str]:
    """Return an architecture as overrides: that of a run may be of a later training in its folder.

    Args:
        values: by ``model.key`` or ``key``; others are left out.
    """
    known = {entry.name for entry in dataclasses.fields(ModelConfig)}
    named = {key.removeprefix("model."): value for key, value in (values or {}).items()}
    return [
        f"model.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in named.items()
        if key in known
    ]


def best_in_run(run_dir: Path) -> tuple[Path, Row]:
    """Return the folder of the best G_ema of a run, and its row in the ledger.

    The protocol is that of the newest score of a G that is still there.

    Raises:
        CheckpointError: no G that is there has a score.
    """
    rows = [row for row in read_rows(run_dir) if row["weights"] == "ema"]
    found = [(row, path) for row in rows if (path := _folder_of(run_dir, row)) is not None]
    if not found:
        raise CheckpointError(
            f"--best ({run_dir}): no snapshot or checkpoint of this run has a score. Score them: "
            f"python -m pipeline.evaluate --run {run_dir} --pending"
        )
    protocol = found[-1][0]["protocol"]
    found = [(row, path) for row, path in found if row["protocol"] == protocol]
    first = best([row for row, _ in found]) or found[-1][0]
    return next(path for row, path in found if row is first), first


def _folder_of(run_dir: Path, row: Row) -> Path | None:
    """Return the folder with the weights that a row is the score of; None if it is gone."""
    step, generator = row["step"], str(row.get("generator", ""))
    path = folder_of(run_dir, SNAPSHOTS, step)
    if path.is_dir() and generator in ("", snapshot.stated_generator(path)):
        return path
    path = folder_of(run_dir, CHECKPOINTS, step)
    try:
        stated = checkpoint.generators(path).get(NETWORK["ema"], "") if path.is_dir() else None
    except CheckpointError:
        return None
    return path if stated is not None and generator in ("", stated) else None
