"""Karn's shell: the catalogue of blueprints as an actor.

Contract: every answer follows from the table. The usage log is on disk before a report is acknowledged, and counts a
report once however often it comes; without the bus there is no log, and answers are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack

import esper_ray
from esper_ray.actors.resources import take_priority
from esper_ray.config import build
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BlueprintTier, BusMessageType, CircuitBreakerState
from esper_ray.contracts.messages import EventEnvelope, MetricPoint
from esper_ray.contracts.ports import SlotSignature
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.karn.catalog import Blueprint, Offer, QueryAnswer, Wanted
from esper_ray.karn.librarian import Librarian
from esper_ray.oona.bus import connect_consumer, connect_publisher
from esper_ray.oona.streams import NORMAL

GROUP = "karn"


class KarnActor:
    """Answers which blueprints there are and which of them fit a slot."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("karn")
        config = build(config_tree)
        self._publisher = connect_publisher(config, source="karn")
        self._librarian = Librarian(folder=config.home / "journals", on_breaker=self._tell)
        self._consumer = connect_consumer(config, GROUP, (NORMAL,), self._handle, tell=self._tell_of_reading)
        self._consumer.start()

    def query(self, signature: str, **wanted: Unpack[Wanted]) -> QueryAnswer:
        """What may grow in that slot; see `Librarian.query`."""
        return self._librarian.query(SlotSignature.parse(signature), **wanted)

    def offered(self, signature: str, approved: Sequence[str], offer: Offer) -> QueryAnswer:
        """What a decider is offered for that slot, in a run with these approvals."""
        return self.query(signature, approved=approved, offer=offer)

    def get(
        self, identifier: str, *, tier_ceiling: int = BlueprintTier.SAFE, approved: Sequence[str] = ()
    ) -> Blueprint:
        """One blueprint, if it is approved."""
        return self._librarian.get(identifier, tier_ceiling=BlueprintTier(tier_ceiling), approved=approved)

    def conservative(self, reason: str) -> None:
        """Give out the safe pool alone from now on; an empty reason ends it."""
        if reason:
            self._librarian.be_conservative(reason)
        else:
            self._librarian.be_ordinary()

    def usage(self) -> dict[str, dict[str, Any]]:
        """What became of each blueprint's germinations."""
        return self._librarian.usage()

    def ping(self) -> dict[str, Any]:
        return {"name": "karn", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        return {**self.ping(), "healthy": True, **self._librarian.health()}

    def stop(self) -> None:
        """End in order; what was not acknowledged is read again by the next one."""
        self._consumer.stop()
        self._publisher.close()
        self._librarian.close()

    def _handle(self, envelope: EventEnvelope) -> None:
        if envelope.type is BusMessageType.FIELD_REPORT:
            self._librarian.note(codec.decode_report(envelope.payload))

    def _tell_of_reading(self, points: Sequence[MetricPoint]) -> None:
        publish_telemetry(self._publisher, "karn", "", 0, points)

    def _tell(self, breaker: str, state: CircuitBreakerState) -> None:
        publish_telemetry(self._publisher, "karn", "", 0, [MetricPoint("ob", float(state), {"breaker": breaker})])
