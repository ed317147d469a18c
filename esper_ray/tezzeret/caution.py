"""Conservative mode: after repeated failures, or while memory is short, the forge runs one job with the fast strategy.

It lasts for a dwell at least. Then one kernel is made in the ordinary way, and its success ends the mode.
"""

from __future__ import annotations

from collections.abc import Callable

from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import Clock

FAILURES = 3


class Caution:
    """Not safe for threads: the forge's own thread alone asks.

    Args:
        dwell_seconds: how long the mode lasts after the last failure or shortage.
        on_change: called with whether the mode is on, when it begins or ends.
    """

    def __init__(self, dwell_seconds: float, clock: Clock, on_change: Callable[[bool], None]) -> None:
        self._breaker = Breaker("forge", failures=FAILURES, open_seconds=dwell_seconds, clock=clock)
        self._on_change, self._told = on_change, False
        self._failing: set[str] = set()

    @property
    def conservative(self) -> bool:
        """Whether the mode is on; the probe that may end it is a part of it."""
        return self._breaker.state is not CircuitBreakerState.CLOSED

    def may_work_normally(self) -> bool:
        """Asked before each kernel: False in the mode, but for the one probe after its dwell."""
        return self._breaker.allow()

    def failed(self, key: str) -> None:
        """A kernel failed. One that fails again and again counts once: it may be the kernel and not the machine."""
        if key not in self._failing:
            self._failing.add(key)
            self._breaker.failure()
        self._tell()

    def succeeded(self) -> None:
        """A kernel is made. Within the dwell that ends nothing."""
        self._failing.clear()
        if self._breaker.state is not CircuitBreakerState.OPEN:
            self._breaker.success()
        self._tell()

    def short_of_memory(self) -> None:
        """The machine has little memory left: the mode begins, or goes on."""
        for _ in range(FAILURES):
            self._breaker.failure()
        self._tell()

    def abandoned(self) -> None:
        """The work was stopped; a probe that was under way proved nothing."""
        if self._breaker.state is CircuitBreakerState.HALF_OPEN:
            self._breaker.failure()

    def _tell(self) -> None:
        if self.conservative != self._told:
            self._told = self.conservative
            self._on_change(self._told)
