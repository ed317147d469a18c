"""When an alert holds: what is counted of a metric, how long, and the same as an expression for Prometheus."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.metrics import BY_KEY


@dataclass(frozen=True, slots=True)
class Consecutive:
    """So many observations in a row over a limit; one at or under it clears."""

    limit: float
    count: int

    def counted(self, point: MetricPoint) -> float:
        return point.value

    def holds(self, history: deque[tuple[int, float]], now_ns: int) -> tuple[bool, float]:
        del now_ns
        last = list(history)[-self.count :]
        return len(last) == self.count and all(value > self.limit for _, value in last), last[-1][1] if last else 0.0

    def horizon_ns(self, now_ns: int) -> int:
        del now_ns
        return 0

    def expression(self, metric: str) -> str:
        over = f'increase({metric}_count[10m]) - ignoring(le) increase({metric}_bucket{{le="{self.limit:.1f}"}}[10m])'
        return f"{over} >= {self.count}"

    def text(self, unit: str) -> str:
        return f"over {self.limit:g} {unit} {self.count} times in a row"


@dataclass(frozen=True, slots=True)
class CountWithin:
    """Increments that add up to so many within a time; clears when they have left it."""

    count: float
    seconds: float

    def counted(self, point: MetricPoint) -> float:
        return point.value

    def holds(self, history: deque[tuple[int, float]], now_ns: int) -> tuple[bool, float]:
        since = self.horizon_ns(now_ns)
        total = sum(value for at_ns, value in history if at_ns > since)
        return total >= self.count, total

    def horizon_ns(self, now_ns: int) -> int:
        return now_ns - round(self.seconds * 1e9)

    def expression(self, metric: str) -> str:
        return f"increase({metric}[{self.seconds:.0f}s]) >= {self.count:g}"

    def text(self, unit: str) -> str:
        del unit
        return f"at least {self.count:g} within {self.seconds / 60:g} min"


@dataclass(frozen=True, slots=True)
class LastWas:
    """Increments that carry an outcome: the last one was bad. A better one clears it, and so does time.

    Prometheus knows no order between two counters: there, time alone clears it.
    """

    label: str
    bad: str
    seconds: float

    def counted(self, point: MetricPoint) -> float:
        return point.value if point.labels.get(self.label) == self.bad else 0.0

    def holds(self, history: deque[tuple[int, float]], now_ns: int) -> tuple[bool, float]:
        in_a_row, since = 0.0, self.horizon_ns(now_ns)
        for at_ns, value in reversed(history):
            if value == 0.0 or at_ns <= since:
                break
            in_a_row += value
        return in_a_row > 0.0, in_a_row

    def horizon_ns(self, now_ns: int) -> int:
        return now_ns - round(self.seconds * 1e9)

    def expression(self, metric: str) -> str:
        return f'increase({metric}{{{self.label}="{self.bad}"}}[{self.seconds:.0f}s]) > 0'

    def text(self, unit: str) -> str:
        del unit
        return f"the last {self.label} within {self.seconds / 3600:g} h was {self.bad}"


@dataclass(frozen=True, slots=True)
class Above:
    """The last value of a gauge is over a limit. One that is told when it changes may never be told again by a process
    that is gone: ``seconds`` after it was told it counts no longer, in Prometheus as long as it is served.
    """

    limit: float
    seconds: float = float("inf")

    def counted(self, point: MetricPoint) -> float:
        return point.value

    def holds(self, history: deque[tuple[int, float]], now_ns: int) -> tuple[bool, float]:
        at_ns, last = history[-1] if history else (now_ns, 0.0)
        return last > self.limit and now_ns - at_ns <= self.seconds * 1e9, last

    def expression(self, metric: str) -> str:
        return f"{metric} > {self.limit:g}"

    def text(self, unit: str) -> str:
        del unit
        return f"over {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Lasting:
    """A gauge has been over a limit for so long without a break; one value at or under it clears."""

    limit: float
    seconds: float

    def counted(self, point: MetricPoint) -> float:
        return point.value

    def holds(self, history: deque[tuple[int, float]], now_ns: int) -> tuple[bool, float]:
        since = None
        for at_ns, value in reversed(history):
            if value <= self.limit:
                break
            since = at_ns
        lasted = since is not None and since <= now_ns - round(self.seconds * 1e9)
        return lasted, history[-1][1] if history else 0.0

    def expression(self, metric: str) -> str:
        return f"min_over_time({metric}[{self.seconds:.0f}s]) > {self.limit:g}"

    def text(self, unit: str) -> str:
        del unit
        return f"over {self.limit:g} for {self.seconds / 60:g} min"


@dataclass(frozen=True, slots=True)
class ShareBelow:
    """Of so many or more within a time, too small a share was good: the others are counted by the metrics ``bad``."""

    limit: float
    bad: tuple[str, ...]
    least: float
    seconds: float

    def counted(self, point: MetricPoint) -> float:
        return -point.value if point.key in self.bad else point.value

    def holds(self, history: deque[tuple[int, float]], now_ns: int) -> tuple[bool, float]:
        since = now_ns - round(self.seconds * 1e9)
        recent = [value for at_ns, value in history if at_ns > since]
        asked = sum(map(abs, recent))
        share = sum(value for value in recent if value > 0) / asked if asked else 1.0
        return asked >= self.least and share < self.limit, share

    def expression(self, metric: str) -> str:
        good, *others = (
            f"sum(increase({name}[{self.seconds:.0f}s]))" for name in (metric, *(BY_KEY[key].name for key in self.bad))
        )
        asked = " + ".join((good, *others))
        return f"{good} / ({asked}) < {self.limit:g} and {asked} >= {self.least:g}"

    def text(self, unit: str) -> str:
        del unit
        return f"a share under {self.limit:g} of {self.least:g} or more within {self.seconds / 60:g} min"


Condition = Consecutive | CountWithin | LastWas | Above | Lasting | ShareBelow
