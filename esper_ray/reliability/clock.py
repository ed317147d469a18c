"""Time, injectable: production uses `SystemClock`, tests advance a `ManualClock` by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where every room gets its time from."""

    def now_ns(self) -> int:
        """Wall clock, nanoseconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.perf_counter()


class ManualClock:
    """Stands still until told to `advance`."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self._start_ns = start_ns
        self._elapsed_ns = 0

    def now_ns(self) -> int:
        return self._start_ns + self._elapsed_ns

    def monotonic(self) -> float:
        return self._elapsed_ns / 1e9

    def advance(self, seconds: float) -> None:
        self._elapsed_ns += round(seconds * 1e9)


SYSTEM_CLOCK = SystemClock()
