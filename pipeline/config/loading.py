"""Load a configuration from YAML and the command line, check it, and dump it as YAML again.

Precedence: dataclass defaults < YAML file < command line (``optim.g_lr=1e-4``). ``load`` reports
all faults at once. A value may refer to another key, ``${model.ngf}``, and to some environment
variables, ``${oc.env:SLURM_JOB_ID}``. In a file that came with a run or a snapshot it may not, and
such a file cannot make a command import an extractor.

Relative paths in a YAML file are relative to the checkout of the file: the nearest folder above it
with a ``pyproject.toml``, or the working folder without any. Relative paths on the command line are
relative to the working folder. ``data.shards`` may be a URL.

The package carries the files of ``configs/``. They serve ``--config demo.yaml`` and
``--config configs/demo.yaml`` where no such file exists.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.config import rules, yaml_file
from pipeline.config.choices import EXTRACTORS
from pipeline.config.hints import REMOVED_KEYS, about_unknown
from pipeline.config.schema import Config, flatten, without_credentials
from pipeline.config.values import (
    NULLS,
    Misfit,
    Unasked,
    convert,
    escape,
    expand,
    has_reference,
    show,
    types_of_keys,
)
from pipeline.config.yaml_file import Plain, Value
from pipeline.runtime.console import printable, say
from pipeline.runtime.errors import ConfigError
from pipeline.runtime.text import masked_tree

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = (PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent) / "configs"
"""The shipped configurations: a part of an installed package, beside it in a checkout."""

PATH_KEYS = (
    "run.dir",
    "run.fork",
    "train.init",
    "data.shards",
    "data.cache_dir",
    "eval.extractor_weights",
    "eval.reference",
    "eval.cache_dir",
    "eval.held_out",
    "eval.parzen_shards",
)
SETS, JOINT = ("data.shards", "eval.held_out", "eval.parzen_shards"), "::"
"""Keys that may name several sets, as a list or joined by this."""
RENAMED = {("model.spectral_norm", "true"): ("model.d_norm", Plain("spectral"))}
"""Old keys with their values, and what they are called today; files that came with a run may have
them."""
SECTIONS: dict[str, Any] = {
    entry.name: type(getattr(Config(), entry.name)) for entry in dataclasses.fields(Config)
}
COMMAND_LINE = "command line"
MOST_FAULTS = 40


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    saved: bool = False,
    origins: dict[str, str] | None = None,
) -> Config:
    """Load and check the configuration of a YAML file and ``section.key=value`` overrides.

    Args:
        path: the file; None = the defaults.
        overrides: values of the command line.
        saved: the file came with a run, a snapshot or a folder of the Hub: the user may not have
            read it. A config.yaml that lies beside the other files of one is always treated so.

        origins: filled with where each value comes from, by ``section.key``.

    Raises:
        ConfigError: a list of all faults, each with field, value, requirement and remedy.
    """
    tree, base_of_file = dict[str, Value](), Path.cwd()
    if path is not None:
        path, base_of_file = _find_file(Path(path))
        tree = yaml_file.read(path)
    path = path or Path(COMMAND_LINE)
    saved = saved or _is_saved(path)
    if saved and not tree:
        raise ConfigError(
            f"{path}: is empty, so it is damaged. Restore it from a copy; a checkpoint's "
            "state.json has it under config."
        )
    if (folder := _run_folder_of(path)) is not None:
        _use_folder(tree, folder)
    draft = _Draft(path, saved=saved)
    for key, default in flatten(Config()).items():
        draft.set(key, _as_text(escape(default)), Path.cwd(), "default")
    for key, value in _items(tree):
        draft.set(key, value, base_of_file, str(path))
    for key, value in _read_overrides(overrides, draft.faults):
        draft.set(key, value, Path.cwd(), COMMAND_LINE)
    config = draft.finish()
    if origins is not None:
        origins.update(draft.origins())
    return config


def dump(config: Config, *, public: bool = False) -> str:
    """Return the configuration as YAML, from which ``load`` reads the same.

    Credentials of URLs are left out.

    Args:
        config: of a run.
        public: the file is made to be given to others: what the environment keeps secret is masked.
    """
    stored = dataclasses.asdict(without_credentials(config))
    tree = masked_tree(stored) if public else stored
    return OmegaConf.to_yaml(OmegaConf.create(escape(tree)))


class _Draft:
    """The values so far, and what is wrong with them."""

    def __init__(self, path: Path, *, saved: bool) -> None:
        self.path, self.saved = path, saved
        self.faults: list[str] = []
        self._written: dict[str, Value] = {}
        self._from: dict[str, tuple[Path, str]] = {}
        self._expanded: dict[str, Value] = {}
        self._open: list[str] = []

    def set(self, key: str, value: Value, base: Path, source: str) -> None:
        """Set one value. A value of another type, or an unknown key, is a fault."""
        if self.saved and source != COMMAND_LINE and isinstance(value, str):
            key, value = RENAMED.get((key, value), (key, value))
        if key in REMOVED_KEYS and value == REMOVED_KEYS[key][0]:
            return
        if key not in types_of_keys():
            self.faults.append(f"{about_unknown(key, value)} [{source}]")
            return
        if source == COMMAND_LINE and value == "" and types_of_keys()[key] is str:
            value = ""  # section.key= is the empty text; in a file it is null
        if key in SETS and isinstance(value, list):
            value = JOINT.join(map(str, value))
        self._written[key], self._from[key] = value, (base, source)
        try:
            if not has_reference(value):
                convert(key, expand(value, self._look_up))
            elif self.saved and source != COMMAND_LINE:
                raise Misfit(
                    "must have no ${...}, in a file that came with a run or snapshot; write the "
                    "value itself, or pass it as an override on the command line"
                )
        except Misfit as misfit:
            self.faults.append(f"{key} ({show(value)}): {misfit} [{source}]")

    def origins(self) -> dict[str, str]:
        """Return where each value comes from: "default", the file or "command line"."""
        return {key: source for key, (_, source) in self._from.items()}

    def finish(self) -> Config:
        """Return the configuration; raise ``ConfigError`` for all faults so far, then of rules."""
        typed: dict[str, dict[str, Any]] = {}
        for key in () if self.faults else self._written:
            section, _, name = key.partition(".")
            try:
                typed.setdefault(section, {})[name] = convert(key, self._look_up(key))
            except Misfit as misfit:
                self.faults.append(f"{key} ({show(self._written[key])}): {misfit}")
        self._raise_faults()
        config = Config(**{name: owner(**typed[name]) for name, owner in SECTIONS.items()})
        referring = {k: show(v) for k, v in self._written.items() if has_reference(v)}
        self.faults = rules.find_faults(config, referring)
        self._raise_faults()
        first = self._as_asked("eval.extractor", [config.eval.extractor])[0]
        more = self._as_asked("eval.more_extractors", config.eval.more_extractors)
        asked = dataclasses.replace(config.eval, extractor=first, more_extractors=more)
        return dataclasses.replace(config, eval=asked)

    def _as_asked(self, key: str, names: list[str]) -> list[str]:
        """Return extractors; mark modules that a file which came with a run names."""
        if not self.saved or self._from[key][1] == COMMAND_LINE:
            return names
        return [name if name in EXTRACTORS else Unasked(name, self.path) for name in names]

    def _look_up(self, key: str) -> Value:
        """Return the value of a key, with references replaced and paths absolute."""
        if key not in self._written:
            raise Misfit(f"there is no key {show(Plain(key))} to refer to")
        if key in self._open:
            raise Misfit(f"refers to itself: {' -> '.join([*self._open, key])}")
        if key not in self._expanded:
            self._open.append(key)
            try:
                value = expand(self._written[key], self._look_up)
            finally:
                self._open.pop()
            if key in PATH_KEYS and isinstance(value, str):
                parts = value.split(JOINT) if key in SETS else [value]
                absolute = [_make_absolute(part, self._from[key][0]) for part in parts]
                value = type(value)(JOINT.join(absolute))
            self._expanded[key] = value
        return self._expanded[key]

    def _raise_faults(self) -> None:
        if self.faults:
            count = f"{len(self.faults)} fault" + ("s" if len(self.faults) > 1 else "")
            rest = len(self.faults) - MOST_FAULTS
            lines = self.faults[:MOST_FAULTS] + ([f"and {rest} more"] if rest > 0 else [])
            raise ConfigError(
                f"{count} in the configuration ({self.path}):\n  " + "\n  ".join(lines)
            )


def _as_text(value: Any) -> Value:
    """Return a default as it would be read from YAML."""
    if isinstance(value, str | list):
        return value
    return Plain("null" if value is None else str(value))


def _items(tree: dict[str, Value]) -> Iterable[tuple[str, Value]]:
    """Yield ``(section.key, value)`` pairs as written, also of unknown sections."""
    for section, values in tree.items():
        if isinstance(values, dict):
            yield from ((f"{section}.{key}", value) for key, value in values.items())
        elif values not in NULLS or section not in SECTIONS:
            yield section, values  # an empty known section keeps its defaults


def _read_overrides(overrides: Sequence[str], faults: list[str]) -> Iterable[tuple[str, Value]]:
    """Yield the items ``section.key=value``; append a line to ``faults`` for each bad one."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or item.startswith("-"):
            faults.append(f"{show(item)}: must read section.key=value, e.g. optim.g_lr=1e-4")
            continue
        try:
            value = yaml_file.parse_override(text)
        except ValueError as error:
            faults.append(
                f"{printable(key)} ({show(Plain(text))}): {error}; put a text in quotes "
                f"""(key='"..."') [{COMMAND_LINE}]"""
            )
        else:
            yield key, value


def _find_file(path: Path) -> tuple[Path, Path]:
    """Return the YAML file that ``--config`` names, and the base of its relative paths.

    If ``path`` does not exist, take the file of that name in the package. Its paths are
    relative to the working folder, because data and runs do not belong in a package.
    """
    carried = CONFIGS / path.name
    near = path.parent in (Path(), Path("configs")) and len(path.name) < 256
    if os.path.lexists(path) or not near or not carried.is_file():
        parents = Path(os.path.realpath(path)).parents
        return path, next((p for p in parents if (p / "pyproject.toml").is_file()), Path.cwd())
    _say_once(f"--config {path}: no such file; using {carried}, which the package carries.")
    return carried, Path.cwd()


def _is_saved(path: Path) -> bool:
    """Return whether a file lies in the folder of a run, of a snapshot, or of the Hub."""
    beside = ("run.json", "generator.safetensors", "model.safetensors", "metrics.jsonl")
    folder = Path(os.path.realpath(path)).parent
    return path.name == "config.yaml" and any((folder / name).exists() for name in beside)


def _run_folder_of(path: Path) -> Path | None:
    """Return the run folder whose config.yaml, or a snapshot's, a file is; None if another's."""
    folder = Path(os.path.realpath(path)).parent
    if folder.parent.name == "snapshots":
        folder = folder.parents[1]
    return folder if path.name == "config.yaml" and (folder / "run.json").is_file() else None


def _use_folder(tree: dict[str, Value], folder: Path) -> None:
    """Set ``run.dir`` to the run folder that the file lies in; it may have been moved or copied."""
    section = tree.get("run", {})
    if section in NULLS:
        section = {}
    if not isinstance(section, dict):
        return  # a fault, which is found later
    before = section.get("dir")
    tree["run"] = section | {"dir": escape(str(folder))}
    same = False
    if isinstance(before, str) and "\0" not in before:
        same = os.path.realpath(_make_absolute(before, folder)) == str(folder)
    if isinstance(before, str) and not same:
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
