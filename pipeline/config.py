"""The configuration of a run: one frozen dataclass per YAML section, checked before anything runs.

Precedence: dataclass defaults < YAML file < command line (``optim.g_lr=1e-4``). The program sees
plain dataclasses, never OmegaConf nodes. ``load`` reports every fault at once.

Relative paths in a YAML file count from the checkout that holds the file (the nearest folder above
it with a ``pyproject.toml``; the current folder if there is none); those on the command line count
from the current folder. ``data.shards`` may be a URL.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.errors import ConfigError

T = TypeVar("T")
PATH_KEYS = (
    *("run.dir", "data.shards", "data.cache_dir"),
    *("eval.extractor_weights", "eval.reference", "eval.cache_dir"),
)
EXTRACTORS = ("inception", "efficientnet-lite0")


def _may_change(default: T) -> T:
    """A field that a resumed run may set differently: it does not alter what is computed."""
    return field(default=default, metadata={"may_change": True})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = _may_change("runs/default")
    """Folder for everything the run writes. The same folder again means: resume."""
    seed: int = 0
    """Seed of the weights, the data order, the noise and the sample grids; 0 to 2**63 - 1."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    image_size: int = 64
    """Height and width in pixels: 32, 64, 128 or 256."""
    channels: int = 3
    """Image channels: 1 (gray) or 3 (RGB)."""
    z_dim: int = 100
    """Length of the noise vector z."""
    z_distribution: Literal["uniform", "normal"] = "uniform"
    """Uniform on [-1, 1) or standard normal."""
    ngf: int = 64
    """G's feature maps before the output layer; doubled at each lower resolution."""
    ndf: int = 64
    """D's feature maps after the first layer; doubled at each lower resolution."""
    kernel_size: Literal[4, 5] = 4
    """Kernel of the strided convolutions: 5 in the paper's figure 1, 4 in most later code."""
    loss: Literal["non_saturating", "minimax"] = "non_saturating"
    """G's objective: maximise log D(G(z)), or minimise log(1 - D(G(z)))."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = _may_change("data/shards")
    """Folder or URL with index.json and the tar shards it lists."""
    batch_size: int = 128
    """Images per optimizer step, over all ranks and micro-batches."""
    workers: int = _may_change(2)
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = _may_change(4)
    """Batches each worker prepares ahead."""
    block: int = 1
    """Samples kept adjacent by the shuffle: 1 = a uniform permutation of the whole set. Raise it
    (64 to 256, with window = 8192) for shards on slow disks, or to a shard's size (with window = a
    few shards) when the set is larger than the node cache."""
    window: int = 0
    """Rows shuffled among each other after the blocks; 0 = none (right for block = 1)."""
    lanes: int = 1
    """Stripes of the order that one node can serve alone: the most nodes ever used."""
    cache_dir: str = _may_change("~/.cache/dcgan-pipeline/shards")
    """Node-local folder for shards fetched from a URL."""
    cache_gib: float = _may_change(0.0)
    """Upper limit of the cache in GiB, least recently used shards go first; 0 = no limit."""
    verify: Literal["auto", "sha256", "size"] = _may_change("auto")
    """Check of local shards at start: every byte, or the file sizes; auto = every byte up to
    2 GiB, sizes above. Fetched shards are always checked byte for byte."""
    record_ids: bool = _may_change(False)
    """Write the sample ids of every batch to ids/rank_*.jsonl: proof of the order, for audits."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    g_lr: float = 2e-4
    """Adam's learning rate for G."""
    d_lr: float = 2e-4
    """Adam's learning rate for D."""
    beta1: float = 0.5
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    total_steps: int = _may_change(100_000)
    """Optimizer steps of G (and of D) in the whole run."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward passes; weights stay fp32. auto = bf16 where the
    hardware multiplies it natively, else fp32; a resumed run keeps what it started with."""
    micro_batch: int | None = None
    """Images per forward pass and BatchNorm group. None = batch_size / ranks. Set it to keep the
    computation the same on any number of ranks: the rest is accumulated."""
    ema_decay: float = 0.999
    """G_ema <- decay * G_ema + (1 - decay) * G after each step; 0 = G_ema is G."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks instead of one micro-batch (CUDA only)."""
    channels_last: bool = True
    """NHWC memory layout for the convolutions."""
    compile: bool = _may_change(False)
    """torch.compile both networks."""
    checkpoint_every: int = _may_change(1000)
    """Steps between checkpoints; 0 = only at the end, on a signal and by the clock."""
    checkpoint_minutes: float = _may_change(15.0)
    """Minutes after which a checkpoint is written in any case; 0 = never."""
    keep: int = _may_change(3)
    """Newest checkpoints kept."""
    keep_every: int = _may_change(0)
    """Also keep checkpoints at multiples of this many steps; 0 = none."""
    sample_every: int = _may_change(500)
    """Steps between grids of images from fixed z; 0 = only at the end."""
    log_every: int = _may_change(50)
    """Steps between rows of metrics.jsonl: the loop's only wait for the device."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = _may_change("auto")
    """auto = online when a W&B key is configured, else offline."""
    project: str = _may_change("dcgan")
    """W&B project."""
    entity: str | None = _may_change(None)
    """W&B team or user; None = the key's default."""
    name: str | None = _may_change(None)
    """Name shown in W&B; None = the run folder's name."""
    group: str | None = _may_change(None)
    """W&B group; None = the run's id, so that its evaluations lie beside it."""
    tags: list[str] = field(default_factory=list, metadata={"may_change": True})
    """W&B tags."""
    timeout: float = _may_change(60.0)
    """Seconds the end of a run waits for W&B to take the last rows; training never waits."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    extractor: str = _may_change("inception")
    """Network whose features are compared: inception (for published numbers: FID, IS, KID),
    efficientnet-lite0 (needs no download), or module:Class for one of your own."""
    extractor_weights: str = _may_change("")
    """File of Inception's weights; "" = torch's hub cache, filled by a download if need be."""
    layer: str = _may_change("")
    """Feature layer to compare; "" = the extractor's default (2048 or 1280 numbers)."""
    num_images: int = _may_change(50_000)
    """Images generated per checkpoint. Scores of different numbers cannot be compared."""
    reference_images: int = _may_change(0)
    """Images of data.shards to compare with; 0 = all of them."""
    reference: str = _may_change("")
    """Reference file to use, refused unless it fits; "" = one in cache_dir, made when missing."""
    batch_size: int = _may_change(64)
    """Images per forward pass on each rank; scores depend on it in their last digits."""
    seed: int = _may_change(0)
    """Seed of the noise that images are generated from; 0 to 2**63 - 1."""
    weights: Literal["ema", "raw"] = _may_change("ema")
    """Evaluate G_ema, or G itself."""
    precision: Literal["auto", "fp32", "bf16"] = _may_change("fp32")
    """Arithmetic of the extractor. auto = bf16 where extractor and hardware do it natively."""
    cache_dir: str = _may_change("~/.cache/dcgan-pipeline/references")
    """Folder for reference files that were computed."""
    keep_best: bool = _may_change(False)
    """Training keeps the best evaluated checkpoint and removes none that is not yet evaluated:
    only with an evaluation that runs beside it, else they fill the disk."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. ``load`` is the only way to make one from files."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file and ``section.key=value`` overrides.

    Raises:
        ConfigError: listing every fault found, each with field, value, requirement and remedy.
    """
    path = Path(path)
    schema = OmegaConf.structured(Config)
    _thaw(schema)
    faults: list[str] = []
    bases: dict[str, Path] = {}
    paths = {key: flatten(Config())[key] for key in PATH_KEYS}
    defaults = OmegaConf.from_dotlist([f"{key}={path}" for key, path in paths.items() if path])
    for source, tree, base in (
        ("defaults", defaults, Path.cwd()),
        (str(path), _read_yaml(path), _checkout_of(path)),
        ("command line", _read_overrides(overrides, faults), Path.cwd()),
    ):
        for key, value in _leaves(tree):
            if key in PATH_KEYS:
                bases[key] = base
                if isinstance(value, str) and "${" not in value:  # else `_resolve` does it
                    value = _escaped(_absolute(value, base))
            fault = _assign(schema, key, value)
            if fault:
                faults.append(f"{fault} [{source}]")
    if not faults:
        faults = _resolve(schema, bases)
    if faults:
        raise ConfigError(_listed(path, faults))
    config = OmegaConf.to_object(schema)
    assert isinstance(config, Config)
    faults = _impossible(config)
    if faults:
        raise ConfigError(_listed(path, faults))
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML; ``load`` reads it back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dataclasses.asdict(config))))


def flatten(config: Config) -> dict[str, Any]:
    """``{"section.key": value}`` in the order of the dataclasses."""
    return {
        f"{section.name}.{entry.name}": getattr(getattr(config, section.name), entry.name)
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    }


def fixed_differences(old: Config, new: Config) -> list[str]:
    """Differences that forbid a resume: lines ``key: old -> new`` for keys that may not change."""
    free = {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(old)
        for entry in dataclasses.fields(getattr(old, section.name))
        if entry.metadata.get("may_change")
    }
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if key not in free and before[key] != after[key]
    ]


def micro_batching(config: Config, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation) with batch_size = world_size * accumulation * micro_batch.

    Raises:
        ConfigError: the batch cannot be cut evenly for this world size.
    """
    batch, micro = config.data.batch_size, config.train.micro_batch
    unit = world_size * (micro or 1)
    if batch % unit:
        lower, upper = batch // unit * unit, (batch // unit + 1) * unit
        choice = f"{lower} or {upper}" if lower else f"{upper}"
        parts = f"world_size ({world_size})"
        if micro:
            parts += f" x train.micro_batch ({micro}) = {unit}"
        raise ConfigError(
            f"data.batch_size ({batch}) must be divisible by {parts}: use {choice}, "
            "or another number of processes."
        )
    micro = micro or batch // world_size
    return micro, batch // (world_size * micro)


def _escaped(value: Any) -> Any:
    """The tree with every literal ``${`` protected from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child) for child in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _thaw(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes; make them writable while values are merged."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _thaw(child)


def _read_yaml(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path.parent).glob("*.yaml")) or ["none"]
        raise ConfigError(
            f"--config {path}: no such file; in that folder: {', '.join(near)}."
        ) from None
    except (UnicodeDecodeError, OmegaConfBaseException) as error:
        detail = str(error).splitlines()[0]
        raise ConfigError(f"--config {path}: not a configuration: {detail}.") from None
    except OSError as error:
        if not isinstance(error.errno, int):  # OmegaConf's word for a bare number or date
            raise ConfigError(f"--config {path}: must hold sections (run:, model:, ...).") from None
        raise ConfigError(f"--config {path}: cannot be read: {error}.") from None
    except YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: not valid YAML: {detail}.") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"--config {path}: must hold sections (run:, model:, ...), not a list.")
    return tree


def _read_overrides(overrides: Sequence[str], faults: list[str]) -> DictConfig:
    good = []
    for item in overrides:
        if "=" in item and not item.startswith("-"):
            good.append(item)
        else:
            faults.append(f"{item!r}: must read section.key=value, e.g. optim.g_lr=1e-4")
    try:
        return OmegaConf.from_dotlist(good)
    except (OmegaConfBaseException, YAMLError) as error:
        faults.append(f"overrides cannot be read: {' '.join(str(error).split())}")
        return OmegaConf.create()


def _checkout_of(path: Path) -> Path:
    parents = path.resolve().parents
    return next((p for p in parents if (p / "pyproject.toml").is_file()), Path.cwd())


def _absolute(value: str, base: Path) -> str:
    if not value or "://" in value:
        return value
    try:
        return str(base / Path(value).expanduser())
    except RuntimeError:  # ~user without such a user: a folder of that name
        return str(base / value)


def _leaves(tree: DictConfig) -> list[tuple[str, Any]]:
    """``(section.key, value)`` as written, whether the section is known or not."""
    found: list[tuple[str, Any]] = []
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)
    for section, values in raw.items():
        if isinstance(values, dict):
            found += [(f"{section!s}.{key!s}", value) for key, value in values.items()]
        elif values is not None or not hasattr(Config(), str(section)):
            found.append((str(section), values))  # an empty known section is all defaults
    return found


def _resolve(schema: DictConfig, bases: dict[str, Path]) -> list[str]:
    """Make interpolated paths absolute; the faults of every interpolation without a value."""
    faults: list[str] = []
    for key in flatten(Config()):
        try:
            value = OmegaConf.select(schema, key, throw_on_missing=True)
            if isinstance(value, ListConfig):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if key in bases:
                OmegaConf.update(schema, key, _escaped(_absolute(value, bases[key])))
        except OmegaConfBaseException as error:
            faults.append(f"{key}: {str(error).splitlines()[0]}; it is {_type_name(key)}")
    return faults


def _assign(schema: DictConfig, key: str, value: Any) -> str | None:
    """Set one value in the schema, or say what is wrong with it."""
    known = list(flatten(Config()))
    if key not in known:
        section, _, name = key.rpartition(".") if not hasattr(Config(), key) else (key, "", "")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        same = [k for k in known if name and k.endswith(f".{name}")]
        guess = next(iter(same or near), None) if name else None
        sections = ", ".join(f.name for f in dataclasses.fields(Config))
        listed = ", ".join(k.split(".")[1] for k in known if k.startswith(f"{section}."))
        choice = f"keys of {section}: {listed}" if listed else f"sections: {sections}"
        hint = f"did you mean {guess}?" if guess else choice
        problem = "must hold keys" if hasattr(Config(), key) else "unknown key"
        return f"{key} ({value}): {problem}; {hint}"
    try:
        OmegaConf.update(schema, key, value, merge=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        return f"{key} ({value!r}): {reason}; it is {_type_name(key)}"
    return None


def _type_name(key: str) -> str:
    section, _, name = key.partition(".")
    default = getattr(getattr(Config(), section), name)
    owner = type(getattr(Config(), section))
    annotation = next(f.type for f in dataclasses.fields(owner) if f.name == name)
    return f"of type {annotation}, e.g. {default}"


def _impossible(config: Config) -> list[str]:
    """Every value or combination that no run could honour."""
    values = flatten(config)
    faults: list[str] = []

    def need(requirement: str, met: Callable[[Any], bool], *keys: str) -> None:
        faults.extend(
            f"{key} ({values[key]}): must be {requirement}" for key in keys if not met(values[key])
        )

    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{key} ({value}): must be a finite number")
    need("a folder, e.g. runs/first", lambda v: v and "://" not in v, "run.dir", "data.cache_dir")
    need("a folder, e.g. ~/.cache/refs", lambda v: v and "://" not in v, "eval.cache_dir")
    need("a local file", lambda v: "://" not in v, "eval.extractor_weights", "eval.reference")
    need("inception, efficientnet-lite0 or module:Class", _names_an_extractor, "eval.extractor")
    need("between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63, "eval.seed")
    need("at least 2", lambda v: v >= 2, "eval.num_images")
    need("0 (all) or at least 2", lambda v: v == 0 or v >= 2, "eval.reference_images")
    need("at least 1", lambda v: v >= 1, "eval.batch_size")
    need("a folder or URL, e.g. data/shards", bool, "data.shards")
    need("between 0 and 2**63 - 1", lambda v: 0 <= v < 2**63, "run.seed")
    need("32, 64, 128 or 256", lambda v: v in (32, 64, 128, 256), "model.image_size")
    need("1 (gray) or 3 (RGB)", lambda v: v in (1, 3), "model.channels")
    need("at least 1", lambda v: v >= 1, "model.z_dim", "model.ngf", "model.ndf")
    need("at least 1", lambda v: v >= 1, "data.batch_size", "data.prefetch", "data.block")
    need("at least 1", lambda v: v >= 1, "data.lanes", "train.total_steps", "train.keep")
    need("at least 1", lambda v: v >= 1, "train.log_every")
    need("0 or more", lambda v: v >= 0, "data.workers", "data.window", "data.cache_gib")
    need("0 or more", lambda v: v >= 0, "train.checkpoint_every", "train.checkpoint_minutes")
    need("0 or more", lambda v: v >= 0, "train.keep_every", "train.sample_every")
    need("0 or more", lambda v: v >= 0, "tracking.timeout")
    need("above 0, e.g. 2e-4", lambda v: v > 0, "optim.g_lr", "optim.d_lr")
    need("in [0, 1)", lambda v: 0 <= v < 1, "optim.beta1", "optim.beta2", "train.ema_decay")
    batch, micro = config.data.batch_size, config.train.micro_batch
    if micro is not None and (micro < 1 or batch % micro):
        faults.append(f"train.micro_batch ({micro}): must divide data.batch_size ({batch}) evenly")
    if (micro or batch) == 1:
        key = "train.micro_batch" if micro else "data.batch_size"
        faults.append(f"{key} (1): BatchNorm needs at least 2 images per micro-batch")
    return faults


def _names_an_extractor(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    custom = bool(colon) and attribute.isidentifier()
    return name in EXTRACTORS or (custom and all(p.isidentifier() for p in module.split(".")))


def _listed(path: Path, faults: list[str]) -> str:
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return f"{count} in the configuration ({path}):\n  " + "\n  ".join(faults)
