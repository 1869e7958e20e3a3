"""Load a configuration from YAML and the command line, check it, and dump it as YAML again.

Precedence: dataclass defaults < YAML file < command line (``optim.g_lr=1e-4``). ``load`` returns
plain dataclasses, never OmegaConf nodes, and reports all faults at once.

Relative paths in a YAML file are relative to the checkout of the file: the nearest folder above it
with a ``pyproject.toml``, or the working folder without any. Relative paths on the command line are
relative to the working folder. ``data.shards`` may be a URL.

The package carries the files of ``configs/``. They serve ``--config demo.yaml`` and
``--config configs/demo.yaml`` where no such file exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
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
    "run.fork",
    "data.shards",
    "data.cache_dir",
    "eval.extractor_weights",
    "eval.reference",
    "eval.cache_dir",
    "eval.parzen_shards",
)
REMOVED_KEYS = {
    "train.cuda_graph": (False, "set train.compile=true train.compile_mode=reduce-overhead"),
}
"""Keys that old run folders still hold: the value that changes nothing, and what to set instead."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load and check the configuration of a YAML file and ``section.key=value`` overrides.

    Raises:
        ConfigError: a list of all faults, each with field, value, requirement and remedy.
    """
    path, base_of_file = _find_file(Path(path))
    file_tree = _read_yaml(path)
    if (folder := _run_folder_of(path)) is not None:
        _use_folder(file_tree, folder)
    schema = OmegaConf.structured(Config)
    _make_writable(schema)
    faults: list[str] = []
    bases: dict[str, Path] = {}
    paths = {key: flatten(Config())[key] for key in PATH_KEYS}
    defaults = OmegaConf.from_dotlist([f"{key}={path}" for key, path in paths.items() if path])
    for source, tree, base in (
        ("defaults", defaults, Path.cwd()),
        (str(path), file_tree, base_of_file),
        ("command line", _read_overrides(overrides, faults), Path.cwd()),
    ):
        for key, value in _flatten_tree(tree):
            if key in PATH_KEYS:
                bases[key] = base
                if isinstance(value, str) and "${" not in value:  # otherwise `_resolve` does it
                    value = _escape(_make_absolute(value, base))
            if key in REMOVED_KEYS and value == REMOVED_KEYS[key][0]:
                continue
            fault = _assign(schema, key, value)
            if fault:
                faults.append(f"{fault} [{source}]")
    if not faults:
        faults = _resolve(schema, bases)
    if faults:
        raise ConfigError(_format_faults(path, faults))
    config = OmegaConf.to_object(schema)
    assert isinstance(config, Config)
    faults = rules.find_faults(config)
    if faults:
        raise ConfigError(_format_faults(path, faults))
    return config


def dump(config: Config) -> str:
    """Return the configuration as YAML; ``load`` reads the same configuration from it."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(dataclasses.asdict(config))))


def _escape(value: Any) -> Any:
    """Escape every literal ``${`` in a tree, so that OmegaConf does not interpolate it."""
    if isinstance(value, dict):
        return {key: _escape(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escape(child) for child in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _make_writable(node: DictConfig) -> None:
    """Make the nodes of frozen dataclasses writable, so that values can be merged into them."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _make_writable(child)


def _read_yaml(path: Path) -> DictConfig:
    """Read a YAML file; raises ``ConfigError`` if it is none, or holds no sections."""
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
        if not isinstance(error.errno, int):  # OmegaConf raises it for a bare number or date
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
    """Parse ``section.key=value`` items; append a line to ``faults`` for each bad one."""
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
    """Return the YAML file that ``--config`` names, and the base of its relative paths.

    If ``path`` does not exist, take the file of that name in the package. Its paths are
    relative to the working folder, because data and runs do not belong in a package.
    """
    carried = CONFIGS / path.name
    if path.exists() or path.parent not in (Path(), Path("configs")) or not carried.is_file():
        parents = path.resolve().parents
        return path, next((p for p in parents if (p / "pyproject.toml").is_file()), Path.cwd())
    if os.environ.get("RANK", "0") == "0":
        say(f"--config {path}: no such file; using {carried}, which the package carries.")
    return carried, Path.cwd()


def _run_folder_of(path: Path) -> Path | None:
    """Return the run folder whose config.yaml, or a snapshot's, a file is; None if another's."""
    folder = path.resolve().parent
    if folder.parent.name == "snapshots":
        folder = folder.parents[1]
    return folder if path.name == "config.yaml" and (folder / "run.json").is_file() else None


def _use_folder(tree: DictConfig, folder: Path) -> None:
    """Set ``run.dir`` to the run folder that the file lies in; it may have been moved or copied."""
    before = OmegaConf.select(tree, "run.dir", default=None)
    OmegaConf.update(tree, "run.dir", _escape(str(folder)))
    if isinstance(before, str) and Path(before).expanduser().resolve() != folder:
        _say_once(f"run.dir: {folder}, where the configuration lies; it says {before}")


@functools.cache
def _say_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        say(text)


def _make_absolute(value: str, base: Path) -> str:
    """Return a path relative to ``base`` as an absolute one; "" and URLs stay as they are."""
    if not value or "://" in value:
        return value
    try:
        return str(base / Path(value).expanduser())
    except RuntimeError:  # no such ~user: a folder of that name, as in a shell
        return str(base / value)


def _flatten_tree(tree: DictConfig) -> list[tuple[str, Any]]:
    """Return ``(section.key, value)`` pairs as written, also of unknown sections."""
    found: list[tuple[str, Any]] = []
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)
    for section, values in raw.items():
        if isinstance(values, dict):
            found += [(f"{section!s}.{key!s}", value) for key, value in values.items()]
        elif values is not None or not hasattr(Config(), str(section)):
            found.append((str(section), values))  # an empty known section keeps its defaults
    return found


def _resolve(schema: DictConfig, bases: dict[str, Path]) -> list[str]:
    """Make interpolated paths absolute. Returns a line for each interpolation that fails."""
    faults: list[str] = []
    for key in flatten(Config()):
        try:
            value = OmegaConf.select(schema, key, throw_on_missing=True)
            if isinstance(value, ListConfig):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if key in bases:
                OmegaConf.update(schema, key, _escape(_make_absolute(value, bases[key])))
        except OmegaConfBaseException as error:
            faults.append(f"{key}: {str(error).splitlines()[0]}; it is {_describe_type(key)}")
    return faults


def _assign(schema: DictConfig, key: str, value: Any) -> str | None:
    """Set one value in the schema. Returns what is wrong with it, or None."""
    known = list(flatten(Config()))
    if key in REMOVED_KEYS:
        return f"{key} ({value}): no longer exists; {REMOVED_KEYS[key][1]}"
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
        return f"{key} ({value!r}): {reason}; it is {_describe_type(key)}"
    return None


def _describe_type(key: str) -> str:
    """Return the type and default of a key: "of type int, e.g. 64"."""
    section, _, name = key.partition(".")
    default = getattr(getattr(Config(), section), name)
    owner = type(getattr(Config(), section))
    annotation = next(f.type for f in dataclasses.fields(owner) if f.name == name)
    return f"of type {annotation}, e.g. {default}"


def _format_faults(path: Path, faults: list[str]) -> str:
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return f"{count} in the configuration ({path}):\n  " + "\n  ".join(faults)
