"""How bad things are in a run, and what follows: four levels, the watch over the loss, and the way back to normal.

| level | what it takes | what follows |
|---|---|---|
| NOTICE | three boundaries in a row without a decision; a conservative time ends | it is told |
| ELEVATED | a checkpoint is lost; a rollback over its deadline, or by a person's order | it is told |
| CONSERVATIVE | a loss that is no number or far over its mean: the epoch is undone | nothing grows for a time |
|  | Tamiyo's order, at a risk of CRITICAL | the same |
| HALT | `emergency.failed_epochs` failed epochs; a journal that cannot be written | checkpoint, then stop |

Time never counts: a slow step, epoch or decision is no damage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from esper_ray.config import EmergencyConfig
from esper_ray.contracts.enums import EmergencyLevel as Level

UNANSWERED = 3
_FLOOR = 0.01


class LossWatch:
    """Judges losses as they come: each against the running mean of those before.

    The mean counts at least a hundredth of the first loss, so that the last few mistakes of a model that has learned
    everything are no explosion.

    Args:
        what: which loss it is, for the text.
        factor: how many times the mean is too much.
        smoothing: weight of the newest loss in the mean.
    """

    def __init__(self, what: str, factor: float, smoothing: float) -> None:
        self._what, self._factor, self._smoothing = what, factor, smoothing
        self._first: float | None = None
        self._mean = 0.0

    def judge(self, loss: float) -> str:
        """Why this loss means damage, or an empty text; a damaged one does not move the mean."""
        if not math.isfinite(loss):
            return f"the {self._what} loss is not finite"
        if self._first is None:
            self._first = self._mean = loss
            return ""
        limit = self._factor * max(self._mean, _FLOOR * self._first)
        if loss > limit > 0.0:
            return f"the {self._what} loss is {loss:.3g}, over {self._factor:g} times its running mean {self._mean:.3g}"
        self._mean += self._smoothing * (loss - self._mean)
        return ""

    def save(self) -> dict[str, Any]:
        return {"first": self._first, "mean": self._mean}

    def load(self, data: Mapping[str, Any]) -> None:
        self._first, self._mean = data["first"], float(data["mean"])


class Emergency:
    """The level of one run.

    Args:
        tell: sends a level and its reason out at once.
    """

    def __init__(self, config: EmergencyConfig, tell: Callable[[Level, str], None]) -> None:
        self._config, self._tell = config, tell
        self.level = Level.UNSPECIFIED
        self.failed = 0
        self._calm = self._unanswered = 0

    @property
    def conservative(self) -> bool:
        """Whether nothing may grow."""
        return self.level >= Level.CONSERVATIVE

    def raise_to(self, level: Level, reason: str) -> None:
        """Tell of ``reason``; the level never falls by it, and a conservative time begins anew."""
        self.level = max(self.level, level)
        if level >= Level.CONSERVATIVE:
            self._calm = 0
        self._tell(level, reason)

    def epoch_failed(self, level: Level, reason: str) -> bool:
        """An epoch was lost, or could not be kept; True where that was the last one too many."""
        self.failed += 1
        self._calm = 0
        over = self.failed >= self._config.failed_epochs
        if over:
            reason = f"{self.failed} failed epochs without a calm time between them; the last: {reason}"
        self.raise_to(Level.HALT if over else level, reason)
        return over

    def decision(self, missed: bool) -> None:
        """One boundary is over. Who does not decide is told of once, and training goes on without growth."""
        self._unanswered = self._unanswered + 1 if missed else 0
        if self._unanswered == UNANSWERED:
            self.raise_to(Level.NOTICE, f"no decision at {UNANSWERED} boundaries in a row; the run does not grow")

    def epoch_passed(self) -> bool:
        """An epoch was kept; True where a conservative time ends with it."""
        self._calm += 1
        if self.conservative and self._calm < self._config.calm_epochs:
            return False
        if self._calm >= self._config.calm_epochs:
            self.failed = 0
        ended = self.conservative
        self.level = Level.UNSPECIFIED
        if ended:
            self._tell(Level.NOTICE, f"{self._calm} calm epochs: the run may grow again")
        return ended

    def save(self) -> dict[str, int]:
        """As JSON. A halted run that a person starts again has all its attempts before it."""
        halted = self.level is Level.HALT
        return {
            "level": int(Level.CONSERVATIVE if halted else self.level),
            "failed": 0 if halted else self.failed,
            "calm": self._calm,
            "unanswered": self._unanswered,
        }

    def load(self, data: Mapping[str, int]) -> None:
        self.level, self.failed = Level(data["level"]), data["failed"]
        self._calm, self._unanswered = data["calm"], data["unanswered"]
