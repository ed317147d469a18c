"""Simic's ear: keeps what the bus tells of decisions and of what they led to.

Contract: a message is acknowledged after it is on disk, and kept once however often it comes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import esper_ray
from esper_ray import config as configuration
from esper_ray.actors.resources import take_priority
from esper_ray.contracts.messages import EventEnvelope, MetricPoint
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.oona.bus import connect_consumer, connect_publisher
from esper_ray.oona.streams import NORMAL
from esper_ray.reliability.clock import SYSTEM_CLOCK
from esper_ray.simic.experience import Experience

GROUP = "simic"
_TELL_SECONDS = 1.0


class SimicActor:
    """Success of the constructor means: reading the bus. The journal is all the state there is."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("simic")
        config = configuration.build(config_tree)
        self._experience = Experience.of(config.home)
        self._experience.forget_old()
        self._publisher = connect_publisher(config, source="simic")
        # Told now and then: a message about each message would cost more than the message.
        self._untold: Counter[str] = Counter()
        self._tell_at = 0.0
        self._consumer = connect_consumer(config, GROUP, (NORMAL,), self._handle, tell=self._tell_of_reading)
        self._consumer.start()

    def _tell_of_reading(self, points: Sequence[MetricPoint]) -> None:
        publish_telemetry(self._publisher, "simic", "", 0, points)

    def _handle(self, envelope: EventEnvelope) -> None:
        if not self._experience.handle(envelope):
            return
        self._untold[envelope.type.name.lower()] += 1
        self._tell()

    def _tell(self) -> None:
        now = SYSTEM_CLOCK.monotonic()
        if self._untold and now >= self._tell_at:
            points = [MetricPoint("sx", float(count), {"type": name}) for name, count in self._untold.items()]
            self._untold.clear()
            self._tell_at = now + _TELL_SECONDS
            publish_telemetry(self._publisher, "simic", "", 0, points)

    def runs(self) -> list[dict[str, Any]]:
        """What there is to learn from, run by run."""
        return [asdict(self._experience.summary(run)) for run in self._experience.runs()]

    def ping(self) -> dict[str, Any]:
        """The supervisor asks every two seconds: what is left to be told is told then."""
        self._tell()
        return {"name": "simic", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        connected = self._consumer.connected()
        return {**self.ping(), "healthy": connected, "consumer": dict(self._consumer.counters)}

    def stop(self) -> None:
        """End in order; what was not acknowledged is read again by the next one."""
        self._consumer.stop()
        self._publisher.close()
        self._experience.close()
