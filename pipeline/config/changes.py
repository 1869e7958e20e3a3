"""Find the keys of a run that a resume changes although it may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.config.recipe import with_todays_keys
from pipeline.config.schema import Config, flatten

CHOSEN = ("block", "window", "lanes")
"""Keys of ``data`` that ``data.order`` chooses where they are None."""


def fixed_differences(
    old: Mapping[str, Any], new: Config, chosen: Mapping[str, Any] | None = None
) -> list[str]:
    """Return a line ``key: old -> new`` for each changed key that a resume may not change.

    Args:
        old: what ``flatten`` returned when the run was saved. A key that did not exist then has
            today's default.
        new: the configuration of the resume. None keeps what ``data.order`` chose.
        chosen: what the run's order has of ``CHOSEN``.
    """
    free = {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(new)
        for entry in dataclasses.fields(getattr(new, section.name))
        if entry.metadata.get("may_change")
    }
    before, after = flatten(Config()) | with_todays_keys(old), flatten(new)
    before |= {f"data.{key}": (chosen or {}).get(key, before[f"data.{key}"]) for key in CHOSEN}
    free |= {f"data.{key}" for key in CHOSEN if getattr(new.data, key) is None}
    gammas = ("stability.r1_gamma", "stability.r2_gamma", "schedule.r1_gamma", "schedule.r2_gamma")
    if not any(values[key] for values in (before, after) for key in gammas):
        free.add("stability.penalty")  # nothing is computed by it
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if key not in free and before[key] != after[key]
    ]
