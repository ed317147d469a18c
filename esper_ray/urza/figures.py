"""What Urza counts: which tier served each kernel, what was not there, how long the slowest fetch took."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from esper_ray.contracts.enums import TelemetryLevel
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.ports import Publisher
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.reliability.clock import Clock
from esper_ray.urza.checks import Finding

Outcome = Literal["memory", "shared", "disk", "missing", "corrupt", "unavailable"]
TIERS: tuple[Outcome, ...] = ("memory", "shared", "disk")
_TELL_SECONDS = 1.0


class Figures:
    """Counts of fetches by outcome, safe for threads; sent at most once a second, as differences.

    Args:
        gauges: further points, asked for when figures are sent.
    """

    def __init__(self, publisher: Publisher | None, clock: Clock, gauges: Callable[[], Iterable[MetricPoint]]) -> None:
        self._publisher, self._clock, self._gauges = publisher, clock, gauges
        self._lock = threading.Lock()
        self._counts: Counter[Outcome] = Counter()
        self._told: Counter[Outcome] = Counter()
        self._told_at = clock.monotonic()
        self._slowest_ms = 0.0

    def count(self, outcome: Outcome, ms: float = 0.0) -> None:
        """A fetch ended so, after ``ms``."""
        with self._lock:
            self._counts[outcome] += 1
            self._slowest_ms = max(self._slowest_ms, ms)
        if self._clock.monotonic() - self._told_at >= _TELL_SECONDS:
            self.flush()

    def read(self) -> dict[Outcome, int]:
        """The counts since the start, by outcome."""
        with self._lock:
            return dict(self._counts)

    def withdrew(self, lost: Iterable[Finding]) -> None:
        """Tell at once which artifacts were withdrawn, and why."""
        if self._publisher is not None:
            events = [
                event(
                    "artifact.withdrawn",
                    {"kernel": each.kernel, "kind": each.kind, "reason": each.why},
                    level=TelemetryLevel.ERROR,
                )
                for each in lost
            ]
            publish_telemetry(self._publisher, "urza", "", 0, events=events)

    def flush(self) -> None:
        """Send what was not sent yet."""
        if self._publisher is None:
            return
        with self._lock:
            now = self._counts.copy()
            news = {name: float(now[name] - self._told[name]) for name in now | self._told}
            slowest, self._slowest_ms = self._slowest_ms, 0.0
            self._told, self._told_at = now, self._clock.monotonic()
        points = [
            *(MetricPoint("uh", news.get(tier, 0.0), {"tier": tier}) for tier in TIERS),
            MetricPoint("um", news.get("missing", 0.0)),
            MetricPoint("ux", news.get("corrupt", 0.0)),
            MetricPoint("us", slowest),
            *self._gauges(),
        ]
        publish_telemetry(self._publisher, "urza", "", 0, points)
