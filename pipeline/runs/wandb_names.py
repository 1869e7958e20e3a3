"""Names that W&B knows a run by: from the configuration, else from W&B's variables, else our own.

W&B refuses some names only when a run is synced, when it is too late; they are refused here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.config.rules import are_wandb_tags, is_wandb_name, is_wandb_project
from pipeline.config.schema import Config
from pipeline.runtime.console import say
from pipeline.runtime.errors import ConfigError

LONGEST = 128
"""Characters of a name in W&B."""
MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of WANDB_MODE and what they mean here."""
OWNED = ("WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_DIR")
"""Variables that would let two run folders write one W&B run, or W&B's files lie elsewhere."""
TRAIN, SCORES = "train", "scores"
"""Job types that write the training's own W&B run: the training, and an evaluation after it."""


def mode_of_environment() -> str:
    """Return the mode that WANDB_DISABLED or WANDB_MODE asks for; "" if none."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "t", "1", "yes", "y", "on"):
        return "disabled"
    return MODES.get(os.environ.get("WANDB_MODE", "").lower(), "")


def require_names() -> None:
    """Refuse variables of W&B that make a run that cannot be synced.

    Raises:
        ConfigError: one or more of them; their values are not shown.
    """
    name = "must have at most 128 characters"
    checks = (
        ("WANDB_MODE", lambda v: v.lower() in MODES, "must be online, offline or disabled"),
        ("WANDB_PROJECT", is_wandb_project, f"{name} and none of / \\ # ? % :"),
        ("WANDB_NAME", is_wandb_name, name),
        ("WANDB_RUN_GROUP", is_wandb_name, name),
        ("WANDB_TAGS", lambda _: are_wandb_tags(_tags()), "each tag must have 1 to 64 characters"),
        ("WANDB_RUN_ID", _is_id, "must have at most 120 characters and none of / \\ # ? % : ; , '"),
    )
    lines = [
        f"{variable} (of the environment): {requirement}; change or unset it"
        for variable, is_met, requirement in checks
        if os.environ.get(variable) and not is_met(os.environ[variable])
    ]
    if lines:
        raise ConfigError("\n  ".join(lines))


def of_run(config: Config, run_id: str, job_type: str) -> dict[str, Any]:
    """Return the arguments of ``wandb.init`` that name a run.

    A job type other than ``TRAIN`` and ``SCORES`` is a run of its own, ``<run_id>-<job_type>``, in
    the same group.
    """
    tracking, suffix = config.tracking, "" if job_type in (TRAIN, SCORES) else f"-{job_type}"
    name = tracking.name or os.environ.get("WANDB_NAME") or Path(config.run.dir).name
    group = tracking.group or os.environ.get("WANDB_RUN_GROUP") or run_id
    return {
        "project": tracking.project or os.environ.get("WANDB_PROJECT") or "dcgan",
        "entity": tracking.entity,
        "id": run_id + suffix,
        "name": name[: LONGEST - len(suffix)] + suffix,
        "group": group[:LONGEST],
        "tags": tracking.tags or _tags() or None,
    }


def own_environment(run_id: str, job_type: str) -> None:
    """Take out of the environment what would give W&B another run than the run folder's.

    In a sweep W&B takes the id from WANDB_RUN_ID alone. Only a training is a run of the sweep.
    """
    given = os.environ.get("WANDB_RUN_ID", "")
    unused = [name for name in OWNED if os.environ.pop(name, "")]
    if job_type != TRAIN:
        for name in ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):
            os.environ.pop(name, None)
    if given and not run_id.startswith(given):
        unused.insert(0, "WANDB_RUN_ID")
    if os.environ.get("WANDB_SWEEP_ID"):
        os.environ["WANDB_RUN_ID"] = run_id
    else:
        os.environ.pop("WANDB_RUN_ID", None)
    # W&B reads these too, and fails at an empty tag and at a mode in capitals.
    if tags := _tags():
        os.environ["WANDB_TAGS"] = ",".join(tags)
    else:
        os.environ.pop("WANDB_TAGS", None)
    os.environ.pop("WANDB_MODE", None)
    if unused:
        say(f"{', '.join(unused)}: not used; the run folder's W&B run is {run_id}")


def _tags() -> list[str]:
    words = os.environ.get("WANDB_TAGS", "").split(",")
    return [word.strip() for word in words if word.strip()]


def _is_id(value: str) -> bool:
    return (
        len(value) <= LONGEST - 8 and value == value.strip() and not set(value) & set("/\\#?%:;,'")
    )
