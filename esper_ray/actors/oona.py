"""The actor that keeps the bus: trims it, measures it, tells Nissa. The messages themselves go past it."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import asdict
from typing import Any

import esper_ray
from esper_ray import config as configuration
from esper_ray.actors.resources import take_priority
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.oona.bus import connect_keeper, connect_publisher
from esper_ray.oona.keeper import BusReport
from esper_ray.oona.transport import BusAway

log = logging.getLogger(__name__)

_ROUND_SECONDS = 2.0


class OonaActor:
    """Has no state of its own: a new one goes on where the last one ended."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("oona")
        config = configuration.build(config_tree)
        self._keeper = connect_keeper(config)
        self._publisher = connect_publisher(config, "oona")
        self._report: BusReport | None = None
        self._fault = "not reached yet"
        self._told: dict[tuple[str, ...], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="oona-keeper", daemon=True)
        self._thread.start()

    def ping(self) -> dict[str, Any]:
        return {"name": "oona", "pid": os.getpid(), "version": esper_ray.__version__}

    def health(self) -> dict[str, Any]:
        """Whether Redis answers, the depth of each stream, the dead letters."""
        report = self._report
        return {
            "ok": not self._fault,
            "fault": self._fault,
            "streams": {} if report is None else {name: asdict(state) for name, state in report.streams.items()},
            "publisher": dict(self._publisher.counters),
        }

    def dead_letters(self, stream: str, count: int = 100) -> list[dict[str, Any]]:
        """The oldest messages of a stream that nobody could use.

        Raises:
            BusAway: the bus cannot be reached.
        """
        return [asdict(letter) for letter in self._keeper.dead_letters(stream, count=count)]

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_ROUND_SECONDS * 3)
        self._publisher.close()

    def _keep(self) -> None:
        while not self._stop.is_set():
            try:
                self._report = self._keeper.round()
                self._tell(self._report)
                self._fault = ""
            except Exception as error:
                # A control loop outlives its faults: this one is tried again in the next round, and shown until then.
                self._fault = str(error) or repr(error)
                log.warning("the bus could not be kept: %s", error, exc_info=not isinstance(error, BusAway))
            self._stop.wait(_ROUND_SECONDS)

    def _tell(self, report: BusReport) -> None:
        """Only what changed: a bus at rest writes nothing into anybody's store."""
        points = {(point.key, *point.labels.values()): point for point in report.points()}
        changed = [point for name, point in points.items() if self._told.get(name) != point.value]
        publish_telemetry(self._publisher, "oona", "", 0, [*changed, *report.dropped_points()])
        self._told = {name: point.value for name, point in points.items()}
