"""A configuration from YAML and command line, checked before anything runs; and back to YAML.

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
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.config import EXTRACTORS, POLICIES, Config, flatten
from pipeline.errors import ConfigError

PATH_KEYS = (
    "run.dir",
    "data.shards",
    "data.cache_dir",
    "eval.extractor_weights",
    "eval.reference",
    "eval.cache_dir",
    "eval.parzen_shards",
)
MLP_KEYS = ("model.maxout", "model.dropout")


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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not a configuration: {error}.") from None
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
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
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
        if isinstance(value, int) and abs(value) >= 2**40 and not key.endswith(".seed"):
            faults.append(f"{key}: must be below 2**40")
    sizes = ("model.z_dim", "model.ngf", "model.ndf", "model.num_classes", "model.maxout")
    need("at most 65536", lambda v: v <= 2**16, *sizes)
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
    if config.model.architecture == "dcgan":
        need("32, 64, 128 or 256", lambda v: v in (32, 64, 128, 256), "model.image_size")
        need("0: it belongs to model.architecture=mlp", lambda v: not v, *MLP_KEYS)
    need("between 8 and 256", lambda v: 8 <= v <= 256, "model.image_size")
    need("1 (gray) or 3 (RGB)", lambda v: v in (1, 3), "model.channels")
    need("at least 1", lambda v: v >= 1, "model.z_dim", "model.ngf", "model.ndf")
    need("at least 1", lambda v: v >= 1, "data.batch_size", "data.prefetch", "data.block")
    need("at least 1", lambda v: v >= 1, "data.lanes", "train.total_steps", "train.keep")
    need("at least 1", lambda v: v >= 1, "train.log_every")
    need("0 or more", lambda v: v >= 0, "data.workers", "data.window", "data.cache_gib")
    need("0 or more", lambda v: v >= 0, "train.checkpoint_every", "train.checkpoint_minutes")
    need("0 or more", lambda v: v >= 0, "train.keep_every", "train.sample_every")
    # The other ranks wait for rank 0 at the end, ten minutes at most with NCCL.
    need("between 0 and 500", lambda v: 0 <= v <= 500, "tracking.timeout")
    need("above 0, e.g. 2e-4", lambda v: v > 0, "optim.g_lr", "optim.d_lr")
    need("in [0, 1)", lambda v: 0 <= v < 1, "optim.beta1", "optim.beta2", "train.ema_decay")
    need("in [0, 1)", lambda v: 0 <= v < 1, "model.dropout")
    need("0 or at least 2", lambda v: v == 0 or v >= 2, "model.maxout", "model.num_classes")
    need("at least 1", lambda v: v >= 1, "optim.d_steps", "stability.r1_every")
    need("0 or more", lambda v: v >= 0, "stability.r1_gamma")
    need("in [0, 0.5)", lambda v: 0 <= v < 0.5, "stability.label_smoothing")
    need(f"any of {', '.join(POLICIES)}", _are_policies, "stability.augment")
    if config.train.cuda_graph:
        draws = bool(config.stability.augment or config.model.dropout)
        for key, wrong in (
            ("stability.augment and model.dropout", draws),
            ("stability.r1_gamma", bool(config.stability.r1_gamma)),
            ("optim.d_steps", config.optim.d_steps > 1),
            ("train.precision=fp16", config.train.precision == "fp16"),
        ):
            if wrong:
                faults.append(f"train.cuda_graph (true): must be false with {key}")
    if config.stability.label_smoothing and config.model.loss == "hinge":
        faults.append("stability.label_smoothing: must be 0 with model.loss=hinge, which has none")
    if config.stability.r1_gamma and config.train.compile:
        faults.append(
            "train.compile (true): must be false with stability.r1_gamma: torch.compile has no "
            "second derivatives"
        )
    with_norms = config.model.architecture == "dcgan" and not config.model.spectral_norm
    if config.stability.r1_gamma and config.train.precision == "fp16" and with_norms:
        faults.append(
            "train.precision (fp16): must be bf16 or fp32 with stability.r1_gamma, unless "
            "model.spectral_norm=true: BatchNorm's second derivatives overflow in fp16"
        )
    if config.stability.r1_gamma and config.train.sync_batchnorm and with_norms:
        faults.append(
            "train.sync_batchnorm (true): must be false with stability.r1_gamma, unless "
            "model.spectral_norm=true: PyTorch has no second derivatives of it"
        )
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


def _are_policies(names: list[str]) -> bool:
    return len(set(names)) == len(names) and set(names) <= set(POLICIES)


def _listed(path: Path, faults: list[str]) -> str:
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return f"{count} in the configuration ({path}):\n  " + "\n  ".join(faults)
