"""Decide at the rows of a run whether G and D have collapsed: ``train.watch``.

The decisions are a function of the configuration and the rows. Rows are equal on all ranks, and
what is remembered of them is in each checkpoint. So all ranks decide the same, and so does a run
that was killed and resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config.schema import Config
from pipeline.runs.alarms import SIGNS, Alarm, of_state
from pipeline.runtime.errors import Collapsed

FACTORS = {"stability.r1_gamma": 4.0, "stability.r2_gamma": 4.0, "optim.d_lr": 0.25}
"""What a healing multiplies these keys by: gamma where there is a penalty, else D's rate."""


class Collapse:
    """The signs of a collapse so far, and the healings.

    ``alarm`` is the one that ends the loop, None before. ``healings`` are those of the run so far.

    Args:
        config: says what is done, after how many steps, and how many times.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._train = config, config.train
        self._since: dict[str, int] = {}
        self._said: list[str] = []
        self._base = 0
        self.alarm: Alarm | None = None
        self.healings: list[Alarm] = []

    def judge(self, step: int, row: Mapping[str, float]) -> Iterator[Alarm]:
        """Yield an alarm for each sign that has held for ``train.watch_steps`` steps.

        With ``warn`` each sign is said once. ``stop`` and ``heal`` end the loop with the first.

        Args:
            step: step of the row. One that only the end of the run brought is not judged.
            row: its metrics.
        """
        if step % self._train.log_every:
            return
        for sign, (limit, _) in SIGNS.items():
            if not row.get(sign, limit) < limit:
                self._since.pop(sign, None)
            elif step >= self._train.watch_steps:  # a G that has just begun makes one image, too
                self._since.setdefault(sign, step)
        action = self._train.watch
        for sign in SIGNS:
            since = self._since.get(sign, step)
            held = step - since >= self._train.watch_steps
            if not held or action == "off" or (action == "warn" and sign in self._said):
                continue
            self._said.append(sign)
            found, done, keys = (step, since, sign, row[sign]), len(self.healings), self._knobs()
            if action == "warn":
                yield Alarm(*found, "warn")
            elif action == "stop" or done >= self._train.watch_healings:
                self.alarm = Alarm(*found, "stop", done)
            else:
                back_to, factor = self._good_step(step), FACTORS[keys[0]]
                self.alarm = Alarm(*found, "heal", done + 1, back_to, keys, factor)
            if self.alarm is not None:
                yield self.alarm
                return

    @property
    def stopped(self) -> bool:
        """Whether an alarm ended the run."""
        return self.alarm is not None and self.alarm.action == "stop"

    def raise_if_stopped(self) -> None:
        """Raise ``Collapsed`` on all ranks if an alarm ended the run."""
        if self.alarm is not None and self.stopped:
            error = Collapsed(
                f"{self.alarm.title}: train.watch={self._train.watch} ended the run "
                f"{self._config.run.dir}. Its checkpoints are kept; with train.watch=warn the same "
                "command trains on from the newest."
            )
            error.raised_on_all = True
            raise error

    def kept(self, step: int) -> list[int]:
        """Return the steps of checkpoints before ``step`` that a healing may need."""
        return [self._good_step(step)] if self._train.watch == "heal" else []

    def factors(self) -> dict[str, float]:
        """Return what the healings multiply keys by, for all keys that they change."""
        found: dict[str, float] = {}
        for healing in self.healings:
            for key in healing.keys:
                found[key] = found.get(key, 1.0) * healing.factor
        return found

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return {
            "mode": self._train.watch,
            "since": self._since,
            "said": self._said,
            "base": self._base,
            "healings": [asdict(one) for one in self.healings],
        }

    def load(
        self, state: Mapping[str, Any], healings: Sequence[Alarm], *, changed: bool
    ) -> list[dict[str, Any]]:
        """Go on from a checkpoint; return the events of the healings that it does not know.

        Args:
            state: its state.json; early versions have nothing of this in it.
            healings: those in watch.json. A fork has none there, but in its checkpoint.
            changed: the configuration changed since: signs are counted anew.
        """
        self.alarm = None
        step, kept = int(state["step"]), state.get("watch") or {}
        known = of_state(dict(state))
        new = list(healings[len(known) :])
        self.healings = [*known, *new]
        fresh = changed or bool(new)
        self._since = {} if fresh else dict(kept.get("since", {}))
        self._said = [] if fresh else list(kept.get("said", []))
        same = not new and kept.get("mode") == "heal"
        self._base = int(kept["base"]) if same else step
        return [{"step": step, "healed": asdict(one)} for one in new]

    def _good_step(self, step: int) -> int:
        """Return the last step with a regular checkpoint ``watch_steps`` before the first sign.

        It is not before the one that this run, its last healing or the mode ``heal`` began with.
        The checkpoints that a clock or a signal asked for do not count: a repetition lacks them.
        """
        every = self._train.checkpoint_every
        sign = min([*self._since.values(), step + 1])
        return max(self._base, max(0, sign - self._train.watch_steps) // every * every)

    def _knobs(self) -> tuple[str, ...]:
        """Return the keys that a healing changes."""
        stability, plan = self._config.stability, self._config.schedule
        gammas = tuple(
            f"stability.{name}"
            for name in ("r1_gamma", "r2_gamma")
            if getattr(stability, name) or getattr(plan, name)
        )
        return gammas or ("optim.d_lr",)
