"""The alarms of a run, in watch.json: when it looked like a collapse, and what was done about it.

    {"alarms": [{"step": 1250, "since": 750, "sign": "watch/loss_D", "value": 0.0004,
                 "action": "heal", "number": 1, "back_to": 500, "keys": ["optim.d_lr"],
                 "factor": 0.25}]}

The file is replaced atomically. With the action ``heal`` that is the moment from which the run
belongs at ``back_to``. What follows, ``healing.finish_healing`` and a resume, is the same after a
kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.runs.step_folders import committed, step_of
from pipeline.runtime.console import say
from pipeline.runtime.documents import DamagedFile, read_document, write_document

FILE = "watch.json"
FINISHED, PREEMPTED, COLLAPSED = ENDS = ("FINISHED", "PREEMPTED", "COLLAPSED")
"""Markers of how a run ended: at its last step, on a stop signal, or by ``train.watch``."""
SIGNS = {
    "watch/loss_D": (1e-3, "D has won, and G hardly learns"),
    "watch/diversity": (0.1, "G makes almost one image"),
}
"""What a row says of a collapse: a metric, the value that it stays below, and what that means."""


@dataclass(frozen=True)
class Alarm:
    """A sign of a collapse that lasted.

    Args:
        step: of the row that gave the alarm.
        since: step of the first row with the sign.
        sign: key of ``SIGNS``.
        value: of the metric at ``step``.
        action: ``warn``, ``stop`` or ``heal``.
        number: of the healing, from 1; without one, how many there were.
        back_to: healing: the step of the checkpoint to go on from.
        keys: healing: what is multiplied from there on.
        factor: healing: by which number.
    """

    step: int
    since: int
    sign: str
    value: float
    action: str
    number: int = 0
    back_to: int = 0
    keys: tuple[str, ...] = ()
    factor: float = 1.0

    @property
    def title(self) -> str:
        """Return what happened in a few words, for a table or the subject of a message."""
        done = {"stop": ", stopped", "heal": f", healed from step {self.back_to}"}
        return f"{SIGNS[self.sign][1]} (step {self.step}{done.get(self.action, '')})"

    @property
    def text(self) -> str:
        """Return what happened, and what was or can be done, as one line."""
        limit, meaning = SIGNS[self.sign]
        found = (
            f"collapse at step {self.step}: {self.sign} ({self.value:.2g}) has been below "
            f"{limit:g} since step {self.since}: {meaning}. "
        )
        if self.action == "heal":
            return f"{found}Healing {self.number}: back to step {self.back_to}, " + ", ".join(
                f"{key} times {self.factor:g}" for key in self.keys
            )
        itself = f"{self.number} healings did not help" if self.number else "train.watch=heal tries"
        return (
            f"{found}Lower optim.d_lr, or set stability.r1_gamma or stability.augment: in a resume "
            "with run.accept_changes=true, or in a new run from an earlier checkpoint with "
            f"train.init; {itself}."
        )


def read_alarms(run_dir: Path) -> list[Alarm]:
    """Return the alarms of a run, oldest first; none, with a message, from a damaged file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        found = read_document(run_dir / FILE, {"alarms": list}, must_be_sealed=True)["alarms"]
        return [parse(one) for one in found]
    except FileNotFoundError:
        return []
    except (DamagedFile, TypeError, KeyError) as error:
        say(f"{run_dir / FILE}: left out: {error}")
        return []


def parse(entry: dict[str, Any]) -> Alarm:
    """Return the alarm that ``asdict`` made a dict of.

    Raises:
        TypeError, KeyError: a field is missing or unknown.
    """
    alarm = Alarm(**entry | {"keys": tuple(entry["keys"])})
    SIGNS[alarm.sign]
    return alarm


def record(run_dir: Path, alarm: Alarm) -> Alarm:
    """Add an alarm to watch.json and say it; return it with the step of a checkpoint that exists.

    ``back_to`` becomes the newest checkpoint that is not after it, else the oldest. A run that
    always had ``train.watch=heal`` has the very one.

    Raises:
        OSError: the file cannot be written.
    """
    if alarm.action == "heal":
        steps = [step_of(path) for path in committed(run_dir)]
        before = [step for step in steps if step <= alarm.back_to]
        alarm = replace(alarm, back_to=max(before, default=min(steps)))
    # A resume may come to the same alarm once more; a healing that was done stays.
    known = [
        one
        for one in read_alarms(run_dir)
        if one.action == "heal" or (one.step, one.sign) != (alarm.step, alarm.sign)
    ]
    _write(run_dir, [*known, alarm])
    say(alarm.text)
    return alarm


def rewind_alarms(run_dir: Path, step: int) -> None:
    """Remove the alarms of later steps, which a run comes to once more; healings stay.

    Raises:
        OSError: the file cannot be read or written.
    """
    known = read_alarms(run_dir)
    kept = [one for one in known if one.step <= step or one.action == "heal"]
    if kept != known:
        _write(run_dir, kept)


def _write(run_dir: Path, alarms: Sequence[Alarm]) -> None:
    write_document(run_dir / FILE, {"alarms": [asdict(one) for one in alarms]})


def healings(alarms: Sequence[Alarm]) -> list[Alarm]:
    """Return the alarms that were healed."""
    return [alarm for alarm in alarms if alarm.action == "heal"]


def of_state(state: dict[str, Any]) -> list[Alarm]:
    """Return the healings in state.json of a checkpoint; none in that of an early version."""
    return [parse(one) for one in (state.get("watch") or {}).get("healings", [])]
