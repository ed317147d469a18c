"""Karn at the counter: answers queries from the catalogue, from the safe pool when it must, and keeps count.

A fault inside the catalogue never leaves a decider without an answer: it gets the safe pool, BP001-BP010, and the
answer says so. After three such faults in a row the catalogue is left alone until the breaker lets a query try again.
Outcomes of blueprints are written down for people to read; no answer depends on them.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from esper_ray.contracts.enums import BlueprintTier, CircuitBreakerState, FieldReportOutcome
from esper_ray.contracts.messages import FieldReport, blueprint_name
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.catalog import CATALOG, Blueprint, Catalog, QueryAnswer, Wanted
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.journal import Journal

FAILURES, OPEN_SECONDS = 3, 30.0
_STREAM = "outcomes"
_TIMED = 4096


@dataclass(slots=True)
class Usage:
    """What became of one blueprint's germinations. ``gain`` is the mean counterfactual gain where it was measured."""

    reports: int = 0
    success: int = 0
    neutral: int = 0
    regression: int = 0
    aborted: int = 0
    gain: float | None = None


class Librarian:
    """Answers queries.

    Args:
        folder: where the usage log is kept; None keeps none.
        on_breaker: told of each change of the breaker.
    """

    def __init__(
        self,
        catalog: Catalog = CATALOG,
        *,
        folder: Path | None = None,
        clock: Clock = SYSTEM_CLOCK,
        on_breaker: Callable[[str, CircuitBreakerState], None] | None = None,
    ) -> None:
        self.breaker = Breaker(
            "karn.catalogue", failures=FAILURES, open_seconds=OPEN_SECONDS, clock=clock, on_change=on_breaker
        )
        self._catalog, self._conservative = catalog, ""
        self._journal = Journal(folder / "karn.db", clock=clock) if folder is not None else None
        self._counts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=_TIMED)

    @property
    def conservative(self) -> str:
        """Why only the safe pool is given out; empty in ordinary times."""
        return self._conservative

    def be_conservative(self, reason: str) -> None:
        """Give out the safe pool alone, until `be_ordinary`."""
        self._conservative = reason

    def be_ordinary(self) -> None:
        self._conservative = ""

    def query(self, signature: SlotSignature, **wanted: Unpack[Wanted]) -> QueryAnswer:
        """`Catalog.query` with the safe pool behind it; the answer's ``note`` says where it took that."""
        started = time.perf_counter()
        try:
            if self._conservative:
                return self._pool(signature, f"conservative mode, {self._conservative}")
            if not self.breaker.allow():
                return self._pool(signature, "the catalogue failed three times and is being left alone")
            try:
                answer = self._catalog.query(signature, **wanted)
            except BlueprintError:
                self.breaker.success()
                raise
            except Exception as error:
                self.breaker.failure()
                return self._pool(signature, f"the catalogue failed: {type(error).__name__}: {error}")
            self.breaker.success()
            self._counts["answered"] += 1
            return answer
        finally:
            self._seconds.append(time.perf_counter() - started)

    def get(
        self,
        identifier: str,
        *,
        tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
        approved: Collection[str] = frozenset(),
    ) -> Blueprint:
        """`Catalog.get`."""
        started = time.perf_counter()
        try:
            return self._catalog.get(identifier, tier_ceiling=tier_ceiling, approved=approved)
        finally:
            self._seconds.append(time.perf_counter() - started)

    def note(self, report: FieldReport) -> bool:
        """Write down what became of a germination; whether it was news. On disk when this returns."""
        if self._journal is None or not report.blueprint:
            return False
        key, before = f"{report.run}/{report.report_id}", self._journal.count(_STREAM)
        row = {
            "blueprint": blueprint_name(report.blueprint),
            "outcome": report.outcome.name.lower(),
            "gain": report.metrics.get("g"),
        }
        self._journal.append(_STREAM, json.dumps(row).encode(), key=key)
        return self._journal.count(_STREAM) > before

    def usage(self) -> dict[str, dict[str, Any]]:
        """For each blueprint that was ever grown the fields of `Usage`."""
        found: dict[str, Usage] = {}
        gains: dict[str, list[float]] = {}
        for entry in self._journal.read(_STREAM) if self._journal is not None else ():
            row = json.loads(entry.payload)
            usage = found.setdefault(row["blueprint"], Usage())
            usage.reports += 1
            if row["outcome"] in _OUTCOMES:
                setattr(usage, row["outcome"], getattr(usage, row["outcome"]) + 1)
            if row["gain"] is not None:
                gains.setdefault(row["blueprint"], []).append(row["gain"])
                usage.gain = sum(gains[row["blueprint"]]) / len(gains[row["blueprint"]])
        return {name: asdict(usage) for name, usage in sorted(found.items())}

    def health(self) -> dict[str, Any]:
        """Queries answered and sent to the safe pool, the breaker, and the 99th percentile of the last answers."""
        seconds = sorted(self._seconds)
        return {
            "blueprints": len(list(self._catalog)),
            "answered": self._counts["answered"],
            "safe_pool": self._counts["safe_pool"],
            "breaker": self.breaker.state.name.lower(),
            "conservative": self._conservative,
            "lookup_p99_ms": seconds[int(0.99 * (len(seconds) - 1))] * 1e3 if seconds else None,
        }

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _pool(self, signature: SlotSignature, why: str) -> QueryAnswer:
        self._counts["safe_pool"] += 1
        return self._catalog.safe_pool(signature, why)


_OUTCOMES = {each.name.lower() for each in FieldReportOutcome if each is not FieldReportOutcome.UNSPECIFIED}
