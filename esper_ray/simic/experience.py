"""What the bus brought: the decisions of every run, and what they led to. No torch here.

A message delivered twice is kept once: its event id is the key under which it is written, in the same transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esper_ray.contracts import codec, learning
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import DecisionRecord, EventEnvelope, FieldReport
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.journal import Journal

RETENTION_NS = 90 * 24 * 3600 * 10**9
_DECISIONS, _REPORTS = "decisions/", "reports/"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What is there of one run. Only what is complete can be learned from; without exploration, only by imitation."""

    run: str
    decisions: int
    reports: int
    complete: bool
    exploration: float
    policies: tuple[str, ...]


class Experience:
    """Decision records and field reports by run, in one journal."""

    def __init__(self, path: Path, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._journal, self._clock = Journal(path, clock=clock), clock

    @classmethod
    def of(cls, home: Path) -> Experience:
        """That of a home folder."""
        return cls(home / "journals" / "experience.db")

    def handle(self, envelope: EventEnvelope) -> bool:
        """Keep one message; False for those that are neither decisions nor reports.

        Raises:
            ContractError: the payload is no valid message of its type.
        """
        if envelope.type is BusMessageType.DECISION_RECORD:
            stream = _DECISIONS + learning.decode_decision(envelope.payload).run
        elif envelope.type is BusMessageType.FIELD_REPORT:
            stream = _REPORTS + codec.decode_report(envelope.payload).run
        else:
            return False
        self._journal.append(stream, envelope.payload, key=envelope.event_id.hex())
        return True

    def decisions(self, run: str) -> list[DecisionRecord]:
        """In the order in which they were taken; of a run that was rolled back, those of its last branch."""
        found = [learning.decode_decision(entry.payload) for entry in self._journal.read(_DECISIONS + run)]
        newest = max((record.branch for record in found), default=0)
        kept = [record for record in found if record.branch == newest]
        return sorted(kept, key=lambda record: (record.epoch, record.terminal, record.place))

    def reports(self, run: str) -> list[FieldReport]:
        return [codec.decode_report(entry.payload) for entry in self._journal.read(_REPORTS + run)]

    def runs(self) -> list[str]:
        """Those that sent decisions, the oldest first."""
        return [stream.removeprefix(_DECISIONS) for stream in self._journal.streams(_DECISIONS)]

    def summary(self, run: str) -> RunSummary:
        decisions = self.decisions(run)
        taken = [record for record in decisions if not record.terminal]
        return RunSummary(
            run=run,
            decisions=len(taken),
            reports=self._journal.count(_REPORTS + run),
            complete=len(taken) < len(decisions),
            exploration=min((record.exploration for record in taken), default=0.0),
            policies=tuple(dict.fromkeys(record.policy_version for record in taken)),
        )

    def forget_old(self) -> int:
        """Drop what is older than three months; returns how many entries."""
        before = self._clock.now_ns() - RETENTION_NS
        names = (*self._journal.streams(_DECISIONS), *self._journal.streams(_REPORTS))
        return sum(self._journal.remove_before(name, before) for name in names)

    def close(self) -> None:
        self._journal.close()
