"""Find the keys of a run that a resume changes although it may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.config.recipe import EXACT_BEFORE, with_todays_keys
from pipeline.config.schema import Config, flatten


def fixed_differences(old: Mapping[str, Any], new: Config) -> list[str]:
    """Return a line ``key: old -> new`` for each changed key that a resume may not change.

    Args:
        old: what ``flatten`` returned when the run was saved. A key that did not exist then has
            today's default.
        new: the configuration of the resume.
    """
    free = {
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(new)
        for entry in dataclasses.fields(getattr(new, section.name))
        if entry.metadata.get("may_change")
    }
    before, after = flatten(Config()) | with_todays_keys(old), flatten(new)
    hints = {} if "stability.penalty" in old else {"stability.penalty": EXACT_BEFORE}
    return [
        f"{key}: {before[key]} -> {after[key]}{hints.get(key, '')}"
        for key in after
        if key not in free and before[key] != after[key]
    ]
