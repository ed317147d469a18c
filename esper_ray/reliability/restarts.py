"""How often something that died is started again: at once at first, then ever more slowly, for ever."""

from __future__ import annotations

from dataclasses import dataclass

from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock


@dataclass(slots=True)
class _Record:
    restarts: int = 0
    failures: int = 0
    not_before: float = 0.0
    process: int = 0
    error: str = ""


class Restarts:
    """Counts restarts by name and says when the next attempt may be made.

    Args:
        first_seconds: pause after the second failure in a row; the first is answered at once.
        longest_seconds: the pause doubles up to this.
    """

    def __init__(
        self, *, first_seconds: float = 0.5, longest_seconds: float = 30.0, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._first, self._longest, self._clock = first_seconds, longest_seconds, clock
        self._records: dict[str, _Record] = {}

    def seen(self, name: str, process: int) -> bool:
        """It answered from ``process``; True when that is another process than before: it was restarted."""
        record = self._record(name)
        changed = record.process not in (0, process)
        record.restarts += changed
        record.process, record.failures, record.error = process, 0, ""
        return changed

    def died(self, name: str, error: str) -> None:
        """It is dead; the pause until `may_start` grows with each failure in a row."""
        record = self._record(name)
        pause = 0.0 if record.failures == 0 else min(self._first * 2 ** (record.failures - 1), self._longest)
        record.failures += 1
        record.error = error
        record.not_before = self._clock.monotonic() + pause

    def may_start(self, name: str) -> bool:
        return self._clock.monotonic() >= self._record(name).not_before

    def count(self, name: str) -> int:
        """Restarts since this process began to watch."""
        return self._record(name).restarts

    def error(self, name: str) -> str:
        """Why it is dead, empty while it lives."""
        return self._record(name).error

    def _record(self, name: str) -> _Record:
        return self._records.setdefault(name, _Record())
