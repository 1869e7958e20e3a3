"""Tell which run a folder holds: run.json has its W&B id and where the folder lies.

A folder that is moved within its file system keeps its inode and is the same run. A copy is a run
of its own, so that two folders never write one W&B run. run.json of a copy names its origin:

    {"id": "b-81c2d4", "path": "/runs/b", "inode": 71, "origin": {"id": "a-3fa9c1", ...}}
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.runtime.console import say
from pipeline.runtime.documents import (
    DamagedFile,
    read_document,
    require_fields,
    set_file_aside,
    write_document,
)

IDENTITY = "run.json"


@dataclass(frozen=True)
class Identity:
    """A run: its W&B id, path and inode of its folder, and the run that it was copied from."""

    id: str
    path: str
    inode: int | None = None
    origin: Identity | None = None

    @property
    def ids(self) -> list[str]:
        """Return its own id and those of all runs that it comes from."""
        return [self.id, *(self.origin.ids if self.origin else ())]

    def write(self) -> None:
        """Write run.json."""
        write_document(Path(self.path) / IDENTITY, asdict(self))


def read_identity(run_dir: Path) -> Identity | None:
    """Return the content of run.json; None if it is missing or damaged."""
    with suppress(OSError, DamagedFile):
        return _read(run_dir)
    return None


def damage_of(run_dir: Path) -> str:
    """Return what is wrong with run.json, if it is there and cannot be used; else ""."""
    try:
        _read(run_dir)
    except FileNotFoundError:
        return ""
    except (OSError, DamagedFile) as error:
        return str(error)
    return ""


def set_damaged_aside(run_dir: Path) -> None:
    """Rename a damaged run.json, with a message; ``identify`` then asks the newest checkpoint.

    Raises:
        OSError: it cannot be read or renamed.
    """
    try:
        _read(run_dir)
    except FileNotFoundError:
        return
    except DamagedFile as error:
        say(f"{error}; set aside as {set_file_aside(run_dir / IDENTITY).name}")


def identify(run_dir: Path, state: Mapping[str, Any] | None = None) -> Identity:
    """Return the identity of the run in a folder as it is now; say so if it was moved or copied.

    Args:
        run_dir: the run's folder.
        state: state.json of its newest checkpoint, which has the id if run.json is missing.
    """
    here = run_dir.resolve()
    found = read_identity(run_dir)
    if found is None and state is not None:
        found = Identity(str(state["run_id"]), str(state.get("run_dir", here)), state.get("inode"))
    if found is None:
        return new_identity(run_dir)
    inode = here.stat().st_ino
    if found.path == str(here) or found.inode is None:
        return replace(found, path=str(here), inode=inode)
    if found.inode == inode:
        say(f"{run_dir}: run {found.id} was moved here from {found.path}")
        return replace(found, path=str(here))
    copy = new_identity(run_dir, found)
    say(f"{run_dir}: a copy of run {found.id} in {found.path}; it is run {copy.id} from now on")
    return copy


def new_identity(run_dir: Path, origin: Identity | None = None) -> Identity:
    """Return the identity of a new run in an existing folder."""
    here = run_dir.resolve()
    return Identity(make_run_id(run_dir), str(here), here.stat().st_ino, origin)


def settle(run_dir: Path, state: Mapping[str, Any] | None) -> Identity:
    """Return what ``identify`` returns, after writing it to run.json if that can be written."""
    with suppress(OSError):
        set_damaged_aside(run_dir)
    identity = identify(run_dir, state)
    if identity != read_identity(run_dir):
        with suppress(OSError):
            identity.write()
    return identity


def make_run_id(run_dir: Path) -> str:
    """Return a new W&B run id: the folder's name and six random characters, ``first-3fa9c1``.

    Under an agent of a W&B sweep it is the id that the agent gave this trial. Elsewhere
    WANDB_RUN_ID is not used: it would give two folders one W&B run.
    """
    given = os.environ.get("WANDB_RUN_ID")
    if given and os.environ.get("WANDB_SWEEP_ID") and not _neighbour_with(given, run_dir):
        return given
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.name)[:64].strip("-") or "run"
    return f"{name}-{secrets.token_hex(3)}"


def _neighbour_with(run_id: str, run_dir: Path) -> bool:
    """Return whether a folder beside this one is the run with an id, and say so."""
    for path in run_dir.resolve().parent.glob(f"*/{IDENTITY}"):
        other = read_identity(path.parent)
        if path.parent != run_dir.resolve() and other is not None and other.id == run_id:
            say(f"WANDB_RUN_ID: not used; {path.parent} is that run. {run_dir} gets a new id.")
            return True
    return False


def _read(run_dir: Path) -> Identity:
    path = run_dir / IDENTITY
    try:
        return _parse(read_document(path), run_dir)
    except RecursionError:
        raise DamagedFile(f"{path}: has too many origins") from None


def _parse(content: dict[str, Any], run_dir: Path) -> Identity:
    # Early versions wrote neither path nor inode.
    known: dict[str, Any] = {"path": str(run_dir.resolve()), "inode": 0, "origin": {}}
    content = known | {key: value for key, value in content.items() if value is not None}
    fields: dict[str, type] = {"id": str, "path": str, "inode": int, "origin": dict}
    require_fields(content, fields, run_dir / IDENTITY)
    origin = _parse(content["origin"], run_dir) if content["origin"] else None
    return Identity(content["id"], content["path"], content["inode"] or None, origin)
