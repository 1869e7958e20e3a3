"""Start a new run from the weights of another one: ``train.init``.

The step is 0 and the data, seed and options are those of the new run. A checkpoint of step 0 holds
the weights, so that no resume reads the origin again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.runs import checkpoint, snapshot
from pipeline.runs.step_folders import CHECKPOINTS, step_of
from pipeline.runtime.console import say
from pipeline.runtime.errors import ConfigError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.ranks import on_rank_zero
from pipeline.training.gan import GAN
from pipeline.training.restore import restore

NETWORKS = {"both": ("G", "D"), "G": ("G",), "D": ("D",)}


@dataclass(frozen=True)
class Origin:
    """What a run starts from. ``weights`` and ``optimizers`` are as in a checkpoint."""

    path: Path
    step: int | None
    sha256: str
    """Of state.json, which has the checksums of the other files; or of a snapshot's weights."""
    weights: dict[str, dict[str, Tensor]]
    optimizers: dict[str, Any]


def start_from_origin(config: Config, accelerator: Accelerator, gan: GAN) -> dict[str, Any]:
    """Load the weights of ``train.init`` on every rank; return the event for the checkpoints.

    Raises:
        ConfigError: there is nothing to start from, or its networks are other ones.
        CheckpointError: it is damaged.
        RunFolderError: a file cannot be read.
    """
    path = on_rank_zero(accelerator, lambda: find(config))
    origin = on_rank_zero(accelerator, lambda: read(config, path))
    load_origin(origin, gan, config)
    networks, optimizers = NETWORKS[config.train.init_networks], config.train.init_optimizers
    if accelerator.is_main_process:
        moments = " with Adam's moments" * optimizers
        say(f"weights of {' and '.join(networks)}{moments} from {path}")
    return {
        "step": 0,
        "init": str(path),
        "init_step": origin.step,
        "sha256": origin.sha256,
        "networks": list(networks),
        "optimizers": optimizers,
    }


def find(config: Config) -> Path:
    """Return the folder of the checkpoint or snapshot that ``train.init`` names.

    Raises:
        ConfigError: it names neither of them, nor a run with a checkpoint.
        CheckpointError: all checkpoints of the run are damaged.
    """
    path = Path(config.train.init)
    try:
        if (path / checkpoint.STATE).is_file() or snapshot.weights_file(path).is_file():
            return path
        found = checkpoint.read_newest(path)[0] if (path / CHECKPOINTS).is_dir() else None
    except OSError as error:
        raise ConfigError(f"train.init ({path}): cannot be read: {error.strerror}.") from None
    if found is None:
        raise ConfigError(
            f"train.init ({path}): must be the folder of a run with checkpoints, of a checkpoint "
            f"({CHECKPOINTS}/step_N) or of a snapshot, on this machine."
        )
    return found.path


def read(config: Config, path: Path) -> Origin:
    """Read a checkpoint or snapshot. A snapshot's G becomes both G and G_ema.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: it is a snapshot, and D or optimizers are asked for.
        RunFolderError: a file cannot be read.
    """
    if (path / checkpoint.STATE).is_file():
        state = path / checkpoint.STATE
        found = checkpoint.read(path)
        return Origin(path, step_of(path), sha256_of(state), found.weights, found.optimizers)
    asked, file = config.train, snapshot.weights_file(path)
    for key, value, needed in (
        ("init_networks", asked.init_networks, "G"),
        ("init_optimizers", asked.init_optimizers, False),
    ):
        if value != needed:
            raise ConfigError(
                f"train.{key} ({value}): must be {needed} with train.init ({path}), a snapshot, "
                "which holds G alone; or give a checkpoint or the folder of a run."
            )
    G, _ = snapshot.load_snapshot(path)
    weights = {name: values.detach() for name, values in G.named_parameters()}
    number = path.name.removeprefix("step_")
    step = int(number) if number.isdecimal() else None
    return Origin(path, step, sha256_of(file), {"G": weights, "G_ema": weights}, {})


def load_origin(origin: Origin, gan: GAN, config: Config) -> None:
    """Load the weights of ``train.init_networks``, and their optimizers if these are asked for.

    Raises:
        ConfigError: the networks differ; the message names the first tensor that does.
    """
    train, names = config.train, NETWORKS[config.train.init_networks]
    loaded = {*names, "G_ema"} if "G" in names else {*names}
    networks = {name: one for name, one in gan.networks().items() if name in loaded}
    optimizers = gan.optimizers() if train.init_optimizers else {}
    optimizers = {name: one for name, one in optimizers.items() if name in names}
    try:
        restore(networks, optimizers, origin.weights, origin.optimizers)
    except ValueError as error:
        raise ConfigError(
            f"train.init ({origin.path}): {error}. Set the keys of model as they were there, or "
            "leave a network out with train.init_networks."
        ) from None
