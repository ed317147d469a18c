"""One message in: kept once, then counted, judged and shown. The handler that the bus's reader is given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from esper_ray.contracts.messages import (
    EmergencySignal,
    EventEnvelope,
    FieldReport,
    MetricPoint,
    PolicyUpdate,
    TelemetryEvent,
    TelemetryPacket,
)
from esper_ray.errors import ContractError
from esper_ray.nissa.alerts import Alert, Alerts
from esper_ray.nissa.events import EventStore
from esper_ray.nissa.metrics import Metrics
from esper_ray.nissa.records import Message, decode, to_record
from esper_ray.nissa.view import View

log = logging.getLogger(__name__)

ACKNOWLEDGED = "alert.acknowledged"


class Ingest:
    """Folds messages into metrics, alerts and view, each event id once; safe for threads.

    ``version`` goes up with every change, for those who wait for one.
    """

    def __init__(self, store: EventStore, metrics: Metrics, alerts: Alerts, view: View) -> None:
        self._store, self._metrics, self._alerts, self._view = store, metrics, alerts, view
        self.lock = threading.RLock()
        self.version = 0

    def handle(self, envelope: EventEnvelope) -> None:
        """Have the effect of a message, unless it has been had before.

        Raises:
            ContractError: the payload is no valid message of its type.
        """
        message = decode(envelope.type, envelope.payload)
        if message is None:
            self._metrics.count("nx", {"reason": "not_for_nissa"})
            return
        record = to_record(envelope, message)
        with self.lock:
            if not self._store.put(record):
                self._metrics.count("nu")
                return
            self._metrics.count("nt", {"type": envelope.type.name.lower()})
            self._apply(message)

    def recover(self, *, since_ns: int = 0) -> int:
        """Derive everything anew from the store; returns the number of records."""
        count = 0
        with self.lock:
            for record in self._store.replay(since_ns=since_ns):
                try:
                    message = decode(record.type, record.payload)
                except ContractError as error:
                    log.warning("a stored record cannot be read any more: %s", error)
                    continue
                if message is not None:
                    self._apply(message)
                    count += 1
        return count

    def tick(self, now_ns: int) -> None:
        """Let time pass for the alerts."""
        with self.lock:
            self._changed(self._alerts.tick(now_ns))

    def observe(self, points: Iterable[MetricPoint], *, run: str, at_ns: int) -> None:
        """Count points in and judge them; the caller holds the lock."""
        for point in points:
            refused = self._metrics.apply(point, run=run)
            if refused:
                self._metrics.count("nx", {"reason": refused})
                continue
            alert = self._alerts.observe(point, run=run, at_ns=at_ns)
            self._changed([alert] if alert else [])

    def _apply(self, message: Message) -> None:
        self.version += 1
        if isinstance(message, TelemetryPacket):
            self._apply_telemetry(message)
        elif isinstance(message, FieldReport):
            self._view.apply_report(message)
        elif isinstance(message, EmergencySignal):
            self._view.apply_emergency(message)
        elif isinstance(message, PolicyUpdate):
            self._view.school.apply_promotion(message)

    def _apply_telemetry(self, packet: TelemetryPacket) -> None:
        self.observe(packet.metrics, run=packet.run, at_ns=packet.timestamp_ns)
        for event in packet.events:
            self._apply_event(packet, event)
        self._view.apply_telemetry(packet)

    def _apply_event(self, packet: TelemetryPacket, event: TelemetryEvent) -> None:
        if event.kind == "run.finished":
            self._changed(self._alerts.finish(packet.run, packet.timestamp_ns))
        elif event.kind == ACKNOWLEDGED:
            self._alerts.acknowledge(event.attributes.get("id", ""), packet.timestamp_ns)

    def _changed(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            self.version += 1
            self._metrics.apply(MetricPoint("na", float(alert.firing), {"alert": alert.name}), run=alert.run)
            log.warning("alert %s of %s %s", alert.name, alert.run or "the system", "fires" if alert.firing else "ends")
