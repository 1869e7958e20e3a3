"""A configuration from YAML and command line, checked before anything runs; and back to YAML.

Precedence: dataclass defaults < YAML file < command line (``optim.g_lr=1e-4``). The program sees
plain dataclasses, never OmegaConf nodes. ``load`` reports every fault at once.

Relative paths in a YAML file count from the checkout that holds the file (the nearest folder above
it with a ``pyproject.toml``; the current folder if there is none); those on the command line count
from the current folder. ``data.shards`` may be a URL.

The package carries the files of ``configs/``. They serve ``--config demo.yaml`` and
``--config configs/demo.yaml`` where no such file exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.config import rules
from pipeline.config.schema import Config, flatten
from pipeline.runtime.console import say
from pipeline.runtime.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = (PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent) / "configs"
"""The shipped configurations: a part of an installed package, beside it in a checkout."""

PATH_KEYS = (
    "run.dir",
    "data.shards",
    "data.cache_dir",
    "eval.extractor_weights",
    "eval.reference",
    "eval.cache_dir",
    "eval.parzen_shards",
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file and ``section.key=value`` overrides.

    Raises:
        ConfigError: listing every fault found, each with field, value, requirement and remedy.
    """
    path, base_of_file = _find_file(Path(path))
    schema = OmegaConf.structured(Config)
    _thaw(schema)
    faults: list[str] = []
    bases: dict[str, Path] = {}
    paths = {key: flatten(Config())[key] for key in PATH_KEYS}
    defaults = OmegaConf.from_dotlist([f"{key}={path}" for key, path in paths.items() if path])
    for source, tree, base in (
        ("defaults", defaults, Path.cwd()),
        (str(path), _read_yaml(path), base_of_file),
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
    faults = rules.faults(config)
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


def _find_file(path: Path) -> tuple[Path, Path]:
    """Return the YAML file that ``--config`` names and the folder its relative paths count from.

    If ``path`` does not exist, take the file of that name in the package. Its paths count from the
    current folder, because data and runs do not belong in a package.
    """
    carried = CONFIGS / path.name
    if path.exists() or path.parent not in (Path(), Path("configs")) or not carried.is_file():
        parents = path.resolve().parents
        return path, next((p for p in parents if (p / "pyproject.toml").is_file()), Path.cwd())
    if os.environ.get("RANK", "0") == "0":
        say(f"--config {path}: no such file; using {carried}, which the package carries.")
    return carried, Path.cwd()


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


def _listed(path: Path, faults: list[str]) -> str:
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return f"{count} in the configuration ({path}):\n  " + "\n  ".join(faults)
