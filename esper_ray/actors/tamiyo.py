"""Tamiyo's shell: decides for Tolaria.

Contract: a decision that `decide` has returned is in Tamiyo's journal; the same state asked again gets the same
commands. A restarted actor knows every open run from its journal, and the promoted policy from the home folder. One
that is promoted while it runs comes over the bus, and decides from the next boundary on. `decide` is answered on a
line as well as through Ray (`actors.line`); one call is worked on at a time.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import esper_ray
from esper_ray.actors.line import Address, LineServer
from esper_ray.actors.resources import take_priority
from esper_ray.config import build
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.learning import decode_policy_update
from esper_ray.contracts.messages import EventEnvelope, FieldReport, MetricPoint
from esper_ray.contracts.ports import RunOpening
from esper_ray.contracts.signing import load_keys
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.errors import PolicyRefused
from esper_ray.oona.bus import connect_consumer, connect_publisher
from esper_ray.oona.streams import POLICY
from esper_ray.tamiyo.controller import Tamiyo

GROUP = "tamiyo"
log = logging.getLogger(__name__)


class TamiyoActor:
    """Answers at the boundary."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("tamiyo")
        config = build(config_tree)
        self._lock = threading.Lock()
        self._publisher = connect_publisher(config, source="tamiyo")
        self._tamiyo = Tamiyo(
            load_keys(config.home / "keys" / "signing"),
            journal=config.home / "journals" / "tamiyo.db",
            publisher=self._publisher,
            home=config.home,
        )
        self._consumer = connect_consumer(config, GROUP, (POLICY,), self._handle, tell=self._tell_of_reading)
        self._consumer.start()
        self._line = LineServer("tamiyo", lambda parts: self.decide(parts[0].decode(), parts[1:]))

    def _tell_of_reading(self, points: Sequence[MetricPoint]) -> None:
        publish_telemetry(self._publisher, "tamiyo", "", 0, points)

    def _handle(self, envelope: EventEnvelope) -> None:
        """A policy that cannot decide is refused aloud, and the message is done with: no repetition mends it."""
        if envelope.type is not BusMessageType.POLICY_UPDATE:
            return
        update = decode_policy_update(envelope.payload)
        try:
            self._tamiyo.offer(update)
        except PolicyRefused as fault:
            log.warning("the policy %s stays out: %s", update.policy_id, fault)

    def open_run(self, opening: RunOpening) -> bool:
        """See `Tamiyo.open_run`."""
        with self._lock:
            self._tamiyo.open_run(opening)
        return True

    def decide(self, run: str, state: Sequence[bytes]) -> list[bytes]:
        """See `Tamiyo.decide`."""
        with self._lock:
            return self._tamiyo.decide(run, state)

    def line(self) -> Address | None:
        """Where `decide` is answered without Ray in between; None where this machine has no such thing."""
        return self._line.address

    def close_run(self, run: str) -> bool:
        """See `Tamiyo.close_run`."""
        with self._lock:
            self._tamiyo.close_run(run)
        return True

    def reports(self, run: str) -> list[FieldReport]:
        """See `Tamiyo.reports`."""
        with self._lock:
            return self._tamiyo.reports(run)

    def ping(self) -> dict[str, Any]:
        return {"name": "tamiyo", "pid": os.getpid(), "version": esper_ray.build()}

    def health(self) -> dict[str, Any]:
        return {**self.ping(), "healthy": self._consumer.connected(), "policy": self.policy()}

    def policy(self) -> dict[str, str]:
        """Which policy decides where the controller is auto, which one before it, and why one was refused."""
        return self._tamiyo.seat.describe()
