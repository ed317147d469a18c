"""What Tamiyo tells: field reports, decision records, policies that were refused, the risk of a run.

A report is in her journal before it is sent, and sent again when she comes back: whether the last ones got out before a
kill is not known, and whoever takes them in takes each event id once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from esper_ray.contracts import codec, learning
from esper_ray.contracts.enums import BusMessageType, FieldReportOutcome, RiskLevel, TelemetryLevel
from esper_ray.contracts.messages import AdaptationCommand, DecisionRecord, FieldReport, MetricPoint
from esper_ray.contracts.ports import Publisher
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.errors import PolicyRefused
from esper_ray.reliability.clock import Clock
from esper_ray.reliability.failpoints import passing
from esper_ray.reliability.ids import derive_seed
from esper_ray.reliability.journal import Journal
from esper_ray.tamiyo import graph, observations
from esper_ray.tamiyo.brains import Step
from esper_ray.tamiyo.reports import Observation
from esper_ray.tamiyo.risk import Risk
from esper_ray.tamiyo.view import RunView

_LOUDNESS = {
    RiskLevel.ORANGE: TelemetryLevel.WARNING,
    RiskLevel.RED: TelemetryLevel.ERROR,
    RiskLevel.CRITICAL: TelemetryLevel.ERROR,
}


class Telling:
    """Tamiyo's way out.

    Args:
        publisher: None keeps the reports in the journal only.
        home: where observations go; None keeps none, and then no decision is recorded for Simic.
    """

    def __init__(self, journal: Journal, publisher: Publisher | None, home: Path | None, clock: Clock) -> None:
        self._journal, self._publisher, self._clock = journal, publisher, clock
        self._after = observations.Aftermath(home / "observations") if home is not None else None

    def records(
        self, view: RunView, version: str, steps: Sequence[Step], issued: Sequence[AdaptationCommand]
    ) -> list[bytes]:
        """The steps of a decision as Simic gets them; none where nothing is to be learned from this run."""
        if not self._learnable(view):
            return []
        return [
            learning.encode_decision(
                step.record(
                    command_id=each.command_id,
                    version=version,
                    view=view,
                    digest=graph.observation_digest(step.observation),
                    place=place,
                )
            )
            for place, (step, each) in enumerate(zip(steps, issued, strict=True))
        ]

    def _learnable(self, view: RunView) -> bool:
        return self._after is not None and view.config.record and bool(view.opening.candidates)

    def decision(self, view: RunView, steps: Sequence[Step], records: Sequence[bytes]) -> None:
        """Keep the observations and send the records, soon; then where the run's risk stands."""
        if self._after is None:
            return
        if records:
            self._after.put([step.observation for step in steps], lambda: self.send_records(records))
        risk, epoch, told = view.risk, view.now.epoch, view.told
        view.told = risk.level
        self._after.put((), lambda: self._risk(view.opening.run, epoch, risk, told))

    def _risk(self, run: str, epoch: int, risk: Risk, before: RiskLevel) -> None:
        """The level as a gauge, and each change of it as an event."""
        if self._publisher is None:
            return
        events = []
        if risk.level is not before:
            named = {"level": risk.level.name, "before": before.name, "signal": risk.signal, "score": risk.score}
            events.append(
                event("risk", {**named, "why": risk.why}, level=_LOUDNESS.get(risk.level, TelemetryLevel.INFO))
            )
        point = MetricPoint("rk", float(risk.level))
        publish_telemetry(self._publisher, "tamiyo", run, epoch, [point], events, clock=self._clock)

    def send_records(self, records: Iterable[bytes]) -> None:
        if self._publisher is None:
            return
        for data in records:
            record = learning.decode_decision(data)
            event_id = derive_seed(record.run, "record", record.command_id, record.terminal).to_bytes(8, "big")
            self._publisher.publish(BusMessageType.DECISION_RECORD, data, event_id=event_id)
            passing("tamiyo.told")

    def end(self, view: RunView) -> None:
        """Tell Simic that a run is over and may be learned from; not where a person decided in its middle."""
        if self._after is None or not view.states or not self._learnable(view) or view.by_hand:
            return
        last = graph.observe(view)
        record = DecisionRecord(
            command_id=derive_seed(view.opening.run, "end", view.now.branch, view.now.epoch),
            policy_version=view.opening.controller,
            run=view.opening.run,
            epoch=view.now.epoch,
            branch=view.now.branch,
            observation_digest=graph.observation_digest(last),
            terminal=True,
        )
        self._after.put([last], lambda: self.send_records([learning.encode_decision(record)]))

    def report(self, run: str, observation: Observation, outcome: FieldReportOutcome, notes: str) -> None:
        """File a report and send it, soon."""
        report = observation.report(run, outcome, notes, self._clock.now_ns())
        if self._after is None:
            self._file(report)
        else:
            self._after.put((), lambda: self._file(report))

    def _file(self, report: FieldReport) -> None:
        """Make a report durable, then tell it."""
        key = str(report.report_id)
        if self._journal.get("reports", key) is not None:
            return
        payload = codec.encode_report(report)
        self._journal.append("reports", payload, key=key)
        passing("tamiyo.report")
        self._send_report(report, payload)
        passing("tamiyo.reported")

    def _send_report(self, report: FieldReport, payload: bytes) -> None:
        if self._publisher is not None:
            event_id = report.report_id.to_bytes(8, "big")
            self._publisher.publish(BusMessageType.FIELD_REPORT, payload, event_id=event_id)

    def reports(self) -> list[FieldReport]:
        """Those that are still in the journal."""
        self.flush()
        return [codec.decode_report(entry.payload) for entry in self._journal.read("reports")]

    def send_reports_again(self) -> None:
        for entry in self._journal.read("reports"):
            self._send_report(codec.decode_report(entry.payload), entry.payload)

    def refused_policy(self, policy_id: str, fault: PolicyRefused) -> None:
        if self._publisher is not None:
            point = MetricPoint("pr", 1.0, {"reason": fault.reason})
            told = event("policy.refused", {"policy": policy_id, "reason": fault.reason}, message=str(fault))
            publish_telemetry(self._publisher, "tamiyo", "", 0, [point], [told], clock=self._clock)

    def flush(self) -> None:
        """Wait until all that was left to do is done."""
        if self._after is not None:
            self._after.flush()
