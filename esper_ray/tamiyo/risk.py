"""How much risk a run is in, from what Tamiyo sees of it, and how much may be decided then.

Five signals, each from 0 to 1, count by their weights and are put together as independent chances of trouble,
``1 - product(1 - weight * signal)``:

| signal | what it looks at |
|---|---|
| performance | how far the validation loss is above its median of the last three epochs |
| gradient | how far the largest layer's gradient is above its own median |
| resource | memory that is left |
| latency | how long Tamiyo herself needs, against what the boundary gives her |
| lifecycle | the share of the slots whose seed was removed within three epochs |

What is much for the first two depends on how much they move in this run anyway: the thresholds adapt to the median
absolute deviation of their steps. Only these two mean damage; the others never lead beyond ORANGE, and what depends on
the machine counts for nothing in lockstep. A level is entered at once and left after three boundaries below it.

| level | from | what follows |
|---|---|---|
| GREEN | | all that is legal |
| YELLOW | 0.3 | one germination at a boundary |
| ORANGE | 0.5 | the heuristic in the place of a policy; nothing germinates |
| RED | 0.7 | nothing is decided; the run is asked to go back, or to wait for a person |
| CRITICAL | 0.9 | the same, and an emergency: conservative for a time |

A run is asked to go back once in three epochs. Where that did not help, RED is CRITICAL.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from esper_ray.contracts.budgets import DECIDE_MS
from esper_ray.contracts.enums import RiskLevel
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import SystemState
from esper_ray.contracts.ports import LAYER_STATISTICS, RunOpening

WINDOWS = 3
WEIGHTS: Mapping[str, float] = {
    "performance": 0.95,
    "gradient": 0.6,
    "resource": 0.5,
    "latency": 0.5,
    "lifecycle": 0.45,
}
DAMAGE = ("performance", "gradient")
THRESHOLDS: Mapping[RiskLevel, float] = {
    RiskLevel.GREEN: 0.0,
    RiskLevel.YELLOW: 0.3,
    RiskLevel.ORANGE: 0.5,
    RiskLevel.RED: 0.7,
    RiskLevel.CRITICAL: 0.9,
}
_HISTORY = 8
_ANSWERS = 5
_GRADIENT = LAYER_STATISTICS.index("gradient_rms")
# A loss counts at least this share of the run's first: one that is almost nothing may double.
_LOSS_FLOOR = 0.02
_REMOVED = (Stage.CULLED, Stage.EMBARGOED)


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal at one boundary, from 0 to 1, and the figures behind it."""

    value: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Risk:
    """Where a run stands.

    Attributes:
        level: what holds now.
        fresh: what this boundary alone would say.
        score: of this boundary.
        signal: the one that counts most, empty where none speaks.
        why: level, score, threshold and that signal's figures.
    """

    level: RiskLevel = RiskLevel.GREEN
    fresh: RiskLevel = RiskLevel.GREEN
    score: float = 0.0
    signal: str = ""
    why: str = ""


class RiskWatch:
    """Follows one run, state by state. The same states give the same risks."""

    def __init__(self) -> None:
        self._gradients: deque[float] = deque(maxlen=_HISTORY + 1)
        self._answers: deque[float] = deque(maxlen=_ANSWERS)
        self._level = RiskLevel.GREEN
        self._below: list[RiskLevel] = []
        self._fresh: dict[int, RiskLevel] = {}

    def answered(self, ms: float) -> None:
        """How long an answer took."""
        self._answers.append(ms)

    def look(
        self,
        states: Sequence[SystemState],
        statistics: npt.NDArray[np.float32] | None,
        opening: RunOpening,
        *,
        turned: int | None,
    ) -> Risk:
        """The risk at the newest of ``states``.

        Args:
            statistics: float32 [layers, LAYER_STATISTICS] of that boundary, None where none came.
            turned: the epoch to which the run was put back last.
        """
        if statistics is not None and statistics.size:
            self._gradients.append(float(np.max(statistics[:, _GRADIENT])))
        found = {
            "performance": performance(states),
            "gradient": gradient(self._gradients),
            "lifecycle": lifecycle(states, len(opening.slots)),
        }
        if not opening.lockstep:
            found |= {"resource": resource(states[-1]), "latency": latency(self._answers)}
        now = states[-1].epoch
        fresh, score = level_of(found)
        if fresh is RiskLevel.RED and turned is not None and now - turned <= WINDOWS:
            fresh = RiskLevel.CRITICAL
        self._fresh[now] = fresh
        self._settle(fresh)
        leading = max(found, key=lambda name: WEIGHTS[name] * found[name].value)
        if not found[leading].value:
            leading = ""
        return Risk(self._level, fresh, score, leading, self._why(fresh, score, leading, found))

    def calm_before(self, epoch: int) -> int:
        """The last epoch before ``epoch`` that was YELLOW at most, not longer than three back; else the one before."""
        calm = [each for each, level in self._fresh.items() if each < epoch and level <= RiskLevel.YELLOW]
        return max(calm) if calm and max(calm) >= epoch - WINDOWS else epoch - 1

    def _settle(self, fresh: RiskLevel) -> None:
        if fresh >= self._level:
            self._level, self._below = fresh, []
            return
        self._below.append(fresh)
        if len(self._below) >= WINDOWS:
            self._level, self._below = max(self._below[-WINDOWS:]), []

    def _why(self, fresh: RiskLevel, score: float, leading: str, found: Mapping[str, Signal]) -> str:
        if self._level is RiskLevel.GREEN:
            return ""
        if fresh < self._level:
            return f"{self._level.name}: {len(self._below)} of {WINDOWS} boundaries below it, now {score:.2f}"
        limit = THRESHOLDS[self._level]
        sign = ">=" if score >= limit else "again, <"
        return f"{self._level.name} {score:.2f} {sign} {limit:g}, {leading}: {found[leading].text}"


def level_of(found: Mapping[str, Signal]) -> tuple[RiskLevel, float]:
    """The level of a set of signals and its score; beyond ORANGE only by those that mean damage."""
    whole, damage = together(found), together({name: found[name] for name in DAMAGE})
    return max(min(_level(whole), RiskLevel.ORANGE), _level(damage)), whole


def together(found: Mapping[str, Signal]) -> float:
    """The chance that at least one of them means trouble, were they independent."""
    return 1.0 - math.prod(1.0 - WEIGHTS[name] * signal.value for name, signal in found.items())


def performance(states: Sequence[SystemState]) -> Signal:
    """How far the validation loss is above its median of the three epochs before, in logarithms."""
    if len(states) <= WINDOWS:
        return Signal()
    floor = max(_LOSS_FLOOR * states[0].validation_loss, 1e-12)
    logs = [math.log(max(state.validation_loss, floor)) for state in states[-_HISTORY - 1 :]]
    rise = logs[-1] - median(logs[-WINDOWS - 1 : -1])
    lower = max(0.1, 3.0 * _movement(logs[:-1]))
    text = f"loss {states[-1].validation_loss:.3g} is {math.exp(min(rise, 50.0)):.1f}x its median"
    return Signal(_ramp(rise, lower, max(math.log(4.0), 4.0 * lower)), text)


def gradient(levels: Sequence[float]) -> Signal:
    """How many decades the largest layer's gradient is above its own median."""
    known = list(levels)
    if len(known) <= WINDOWS:
        return Signal()
    if not math.isfinite(known[-1]):
        return Signal(1.0, "a layer's gradient is not finite")
    before = [each for each in known[:-1] if math.isfinite(each)]
    if len(before) < WINDOWS:
        return Signal()
    rise, lower = known[-1] - median(before), max(1.0, 4.0 * _movement(before))
    return Signal(_ramp(rise, lower, lower + 2.0), f"gradient {10 ** min(rise, 30.0):.3g}x its median")


def resource(state: SystemState) -> Signal:
    """How much of the memory is taken, beyond nine tenths."""
    total, free = state.hardware.memory_total_mb, state.hardware.memory_free_mb
    if total <= 0.0:
        return Signal()
    taken = 1.0 - free / total
    return Signal(_ramp(taken, 0.92, 0.98), f"{100 * taken:.0f}% of the memory is taken")


def latency(answers_ms: Sequence[float]) -> Signal:
    """The median of the last answers against their budget; less than five say nothing."""
    if len(answers_ms) < _ANSWERS:
        return Signal()
    usual = median(answers_ms)
    return Signal(_ramp(usual / DECIDE_MS.limit, 1.0, 2.0), f"answers take {usual:.0f} of {DECIDE_MS.limit:g} ms")


def lifecycle(states: Sequence[SystemState], slots: int) -> Signal:
    """The share of the slots whose seed was removed within three epochs."""
    removed = 0
    for before, after in itertools.pairwise(states[-WINDOWS - 1 :]):
        gone = {seed.slot for seed in before.seeds if seed.stage in _REMOVED}
        removed += sum(seed.stage in _REMOVED and seed.slot not in gone for seed in after.seeds)
    share = removed / max(1, slots)
    return Signal(_ramp(share, 1.0 / 3.0, 1.0), f"{removed} seeds removed in {WINDOWS} epochs")


def _movement(values: Sequence[float]) -> float:
    """Median absolute deviation of the steps from one value to the next: what is usual, whatever the trend."""
    steps = [after - before for before, after in itertools.pairwise(values)]
    return median(abs(step - median(steps)) for step in steps) if steps else 0.0


def _ramp(value: float, lower: float, upper: float) -> float:
    return min(1.0, max(0.0, (value - lower) / (upper - lower)))


def _level(score: float) -> RiskLevel:
    return max(level for level, threshold in THRESHOLDS.items() if score >= threshold)
