"""What the ranks of a launch find out and say to each other, and the table it makes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from pipeline.errors import UserError

T = TypeVar("T")
VISIBLE_SECONDS = 30.0  # how long a network file system may hide a new file from other nodes
Verdict = Literal["ok", "note", "FAILED"]


class Finding(NamedTuple):
    """One line of the table."""

    check: str
    verdict: Verdict
    found: str


class Peers:
    """All ranks, and what they say to each other."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.nodes = self.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname())

    def gather(self, fact: T) -> list[T]:
        """The fact of every rank, on every rank."""
        if self.count == 1:
            return [fact]
        facts: list[T | None] = [None] * self.count
        dist.all_gather_object(facts, fact)
        return facts  # type: ignore[return-value]

    def where(self, facts: Sequence[T]) -> dict[T, str]:
        """Which nodes each fact was found on: ``{fact: "n1, n2"}``."""
        found: dict[T, list[str]] = {}
        for node, fact in zip(self.nodes, facts, strict=True):
            if node not in found.setdefault(fact, []):
                found[fact].append(node)
        return {fact: ", ".join(nodes) for fact, nodes in found.items()}

    def faults(self, attempt: Callable[[], T]) -> tuple[T | None, list[str]]:
        """What this rank's attempt gave, and ``node: reason`` of all that failed."""
        result, reason = None, ""
        try:
            result = attempt()
        except (UserError, OSError, RuntimeError) as error:
            reason = str(error)
        reasons = self.where(self.gather(reason))
        reasons.pop("", None)
        return result, [f"{nodes}: {reason}" for reason, nodes in reasons.items()]


def table(findings: Sequence[Finding]) -> str:
    """The findings as aligned text, the verdict over all of them in the last line."""
    width = max(len(finding.check) for finding in findings)
    lines = [
        f"{finding.check:{width}}  {finding.verdict:6}  "
        + finding.found.replace("\n", "\n" + " " * (width + 10))
        for finding in findings
    ]
    failed = [finding.check for finding in findings if finding.verdict == "FAILED"]
    return "\n".join([*lines, f"NOT READY: {', '.join(failed)}" if failed else "READY"])
