"""Find the section of docs/troubleshooting.md on a message."""

from __future__ import annotations

import re

PAGE = "docs/troubleshooting.md"
SECTIONS = {
    "out-of-memory": r"^out of memory: |more than the \S+ GiB of memory",
    "a-data-worker-was-killed": r"a data worker was killed",
    "no-space-left": r"No space left on device|Free space|Disk quota exceeded",
    "too-many-open-files": r"open files are limited|/dev/shm",
    "a-loss-became-nan": r"became NaN or infinite",
    "the-run-folder-is-in-use": r"^run\.dir \(.*\): in use by ",
    "the-run-has-another-configuration": r"belongs to a run with another configuration",
    "trained-on-other-data": r"trained on other data: ",
    "a-damaged-or-lost-checkpoint": r"was saved \(says the file progress\)",
    "no-shards-there": r"^data\.shards \(.*\): no (such folder|index)",
    "images-of-another-size": r"images of .*, the model wants ",
    "a-shard-was-changed": r"changed since it was indexed",
    "labels": r"model\.num_classes \(\d+\) (wants|G draws)",
    "a-rank-was-lost": r"lost another rank",
    "ranks-do-not-find-each-other": r"for the other ranks, but not all reached it",
    "gpus-are-not-seen": r"two processes cannot share a GPU|^GPUS_PER_NODE |needs a CUDA device",
    "processes-would-train-alone": r"would train alone and write the same files",
    "a-batch-that-cannot-be-divided": r"must be divisible by world_size",
    "weights-of-the-extractor": r"fetch-weights --to",
}
"""Anchor of a section, and what its messages have in common (searched)."""


def link_of(message: str) -> str:
    """Return `` (docs/troubleshooting.md#SECTION)`` for a message; "" if no section is on it."""
    found = (anchor for anchor, words in SECTIONS.items() if re.search(words, message, re.S))
    return f" ({PAGE}#{anchor})" if (anchor := next(found, "")) else ""
