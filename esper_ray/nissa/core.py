"""Nissa as one object: the store, what is derived from it, and what is asked of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from esper_ray.config import Config
from esper_ray.contracts import codec, refusals
from esper_ray.contracts.budgets import BOUNDARY_MS, BOUNDARY_PARTS
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import EventEnvelope, MetricPoint
from esper_ray.contracts.telemetry import event, split_telemetry
from esper_ray.nissa.alerts import Alerts, alert_rules
from esper_ray.nissa.events import RETENTION_DAYS, EventStore, open_store
from esper_ray.nissa.ingest import ACKNOWLEDGED, Ingest
from esper_ray.nissa.metrics import Metrics
from esper_ray.nissa.records import Record
from esper_ray.nissa.view import View
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import new_event_id

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_PRUNE_TICKS = 3600
_DAY_NS = 86_400_000_000_000


class Nissa:
    """What the page and the interface read; `ingest` is where messages go in.

    Recovers from its store by itself when it is made.

    Raises:
        EnvironmentFault: the event store cannot be used.
    """

    def __init__(self, config: Config, *, clock: Clock = SYSTEM_CLOCK, store: EventStore | None = None) -> None:
        self._clock = clock
        self.store = store or open_store(config)
        self.metrics, self.view = Metrics(), View()
        self.alerts = Alerts(alert_rules(config.nissa))
        # A counter that first appears with a failure in it would show Prometheus no increase.
        self.metrics.count("pv", {"verdict": "failed"}, 0.0)
        self.ingest = Ingest(self.store, self.metrics, self.alerts, self.view)
        self.checks: dict[str, Callable[[], bool]] = {"event store": lambda: self.store.state().reachable}
        self.recovered = self.ingest.recover(since_ns=clock.now_ns() - RETENTION_DAYS * _DAY_NS)
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="nissa-clock", daemon=True)
        self._ticker.start()

    @property
    def version(self) -> int:
        """Goes up with everything that is new."""
        return self.ingest.version

    def status(self) -> dict[str, Any]:
        """The system at a glance: the runs, the newest first, alerts, backends, streams, event store."""
        with self.ingest.lock:
            newest = self.view.newest()
            runs = sorted(self.view.runs.values(), key=lambda run: -run.started_ns)
            return {
                "now_ns": self._clock.now_ns(),
                "version": self.version,
                "current": newest.run if newest else None,
                "runs": [run.summary() for run in runs],
                "alerts": [asdict(alert) for alert in self.alerts.all()],
                "backends": dict(self.view.backends),
                "streams": {name: dict(values) for name, values in self.view.streams.items()},
                "store": asdict(self.store.state()),
                "ready": self.readiness(),
                "budgets": {budget.key: budget.limit for budget in (BOUNDARY_MS, *BOUNDARY_PARTS)},
            }

    def run(self, name: str) -> dict[str, Any] | None:
        """All there is to draw of one run, or None."""
        with self.ingest.lock:
            run = self.view.runs.get(name)
            return run.details() if run else None

    def school(self) -> dict[str, Any]:
        """The trainings of policies, who was promoted, validations and refusals."""
        with self.ingest.lock:
            return self.view.school.details()

    def current(self) -> str:
        """The run that was heard of last, or an empty text."""
        with self.ingest.lock:
            newest = self.view.newest()
            return newest.run if newest else ""

    def alert_list(self) -> list[dict[str, Any]]:
        """Firing alerts first."""
        with self.ingest.lock:
            return [asdict(alert) for alert in self.alerts.all()]

    def acknowledge(self, id: str) -> dict[str, Any] | None:
        """Note, durably, that somebody has seen an alert; None when there is no such alert."""
        with self.ingest.lock:
            known = next((alert for alert in self.alerts.all() if alert.id == id), None)
            if known is None:
                return None
            packets = split_telemetry("nissa", known.run, 0, (), [event(ACKNOWLEDGED, {"id": id})], clock=self._clock)
            for packet in packets:
                self.ingest.handle(
                    EventEnvelope(
                        event_id=new_event_id(),
                        type=BusMessageType.TELEMETRY,
                        source="nissa",
                        created_at_ns=packet.timestamp_ns,
                        payload=codec.encode_telemetry(packet),
                        payload_type="TelemetryPacket",
                    )
                )
            return next(asdict(alert) for alert in self.alerts.all() if alert.id == id)

    def events(self, text: str = "", *, run: str = "", kind: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """Search the event store, newest first."""
        return [_plain(record) for record in self.store.search(text, run=run, kind=kind, limit=limit)]

    def readiness(self) -> Mapping[str, bool]:
        """Which of the things it needs are there."""
        return {name: check() for name, check in self.checks.items()}

    def close(self) -> None:
        self._stop.set()
        self._ticker.join(_TICK_SECONDS * 5)
        self.store.close()

    def tell(self, points: Sequence[MetricPoint]) -> None:
        """What Nissa has to say about itself; it does not go over the bus."""
        with self.ingest.lock:
            self.ingest.observe(points, run="", at_ns=self._clock.now_ns())

    def _tick(self) -> None:
        ticks = 0
        while not self._stop.wait(_TICK_SECONDS):
            try:
                self._look_after(prune=ticks % _PRUNE_TICKS == 0)
            except Exception:
                log.exception("Nissa's clock met a fault and goes on")
            ticks += 1

    def _look_after(self, *, prune: bool) -> None:
        now = self._clock.now_ns()
        self.ingest.tick(now)
        with self.ingest.lock:
            self.metrics.count("nd", value=self.store.state().dropped)
            for point in refusals.take():
                self.metrics.apply(point)
        if prune:
            self.store.prune(now - RETENTION_DAYS * _DAY_NS)


def _plain(record: Record) -> dict[str, Any]:
    return {
        "event_id": record.event_id.hex(),
        "at_ns": record.at_ns,
        "type": record.type.name,
        "source": record.source,
        "run": record.run,
        "epoch": record.epoch,
        "level": record.level.name,
        "kinds": list(record.kinds),
        "text": record.text,
    }
