"""The one circuit breaker: closed, open after repeated failures, half-open for a single probe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock


class Breaker:
    """Stops calling what keeps failing.

    Args:
        name: shown in metrics and errors.
        failures: consecutive failures that open it.
        open_seconds: how long it stays open before one probe is let through.
        on_change: called with (name, state) after each change, outside the lock.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int = 3,
        open_seconds: float = 30.0,
        clock: Clock = SYSTEM_CLOCK,
        on_change: Callable[[str, CircuitBreakerState], None] | None = None,
    ) -> None:
        self.name = name
        self._limit, self._open_seconds, self._clock, self._on_change = (
            failures,
            open_seconds,
            clock,
            on_change,
        )
        self._lock = threading.Lock()
        self._failures = 0
        self._opened_at = 0.0
        self._state = CircuitBreakerState.CLOSED

    @property
    def state(self) -> CircuitBreakerState:
        return self._state

    def allow(self) -> bool:
        """Whether a call may be made now; in the half-open state exactly one may."""
        with self._lock:
            if self._state is CircuitBreakerState.CLOSED:
                return True
            waited = self._clock.monotonic() - self._opened_at
            if self._state is CircuitBreakerState.OPEN and waited >= self._open_seconds:
                changed = self._move(CircuitBreakerState.HALF_OPEN)
            else:
                return False
        self._tell(changed)
        return True

    def success(self) -> None:
        """The call worked: closed again."""
        with self._lock:
            self._failures = 0
            changed = self._move(CircuitBreakerState.CLOSED)
        self._tell(changed)

    def failure(self) -> None:
        """The call failed: counted, and the breaker opens at the limit or when the probe fails."""
        with self._lock:
            self._failures += 1
            changed = False
            if self._state is CircuitBreakerState.HALF_OPEN or self._failures >= self._limit:
                self._opened_at = self._clock.monotonic()
                changed = self._move(CircuitBreakerState.OPEN)
        self._tell(changed)

    def save(self) -> dict[str, float]:
        """State, failures and the time of opening, for a breaker that is to outlive its process."""
        return {"state": int(self._state), "failures": self._failures, "opened_at": self._opened_at}

    def load(self, data: Mapping[str, float]) -> None:
        """Go on from what `save` gave; its clock must be one that goes on as well. Nobody is told."""
        self._state = CircuitBreakerState(int(data["state"]))
        self._failures, self._opened_at = int(data["failures"]), float(data["opened_at"])

    def _move(self, state: CircuitBreakerState) -> bool:
        changed, self._state = self._state is not state, state
        return changed

    def _tell(self, changed: bool) -> None:
        if changed and self._on_change is not None:
            self._on_change(self.name, self._state)
