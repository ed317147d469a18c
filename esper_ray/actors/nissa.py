"""The actor around Nissa: a reader on the bus, the page's server, and Nissa itself."""

from __future__ import annotations

import os
from typing import Any

import esper_ray
from esper_ray import config as configuration
from esper_ray.actors.resources import take_priority
from esper_ray.errors import EnvironmentFault
from esper_ray.nissa.api import create_app
from esper_ray.nissa.core import Nissa
from esper_ray.nissa.serve import Server
from esper_ray.nissa.token import load_token
from esper_ray.oona.bus import connect_consumer
from esper_ray.oona.streams import STREAMS


class NissaActor:
    """Success of the constructor means: recovered from the event store, listening, reading the bus.

    Raises:
        EnvironmentFault: the port is in use, or the event store cannot be used.
    """

    def __init__(self, config_tree: dict[str, Any]) -> None:
        take_priority("nissa")
        config = configuration.build(config_tree)
        self._nissa = Nissa(config)
        try:
            self._server = Server(
                create_app(self._nissa, load_token(config.home)), config.nissa.host, config.nissa.port
            )
        except EnvironmentFault:
            self._nissa.close()
            raise
        self._consumer = connect_consumer(config, "nissa", STREAMS, self._nissa.ingest.handle, tell=self._nissa.tell)
        self._nissa.checks["bus"] = self._consumer.connected
        self._server.start()
        self._consumer.start()

    def ping(self) -> dict[str, Any]:
        return {"name": "nissa", "pid": os.getpid(), "version": esper_ray.__version__}

    def health(self) -> dict[str, Any]:
        """What works, and what the reader has done so far."""
        return {
            "ok": self._server.alive() and all(self._nissa.readiness().values()),
            "ready": dict(self._nissa.readiness()),
            "recovered": self._nissa.recovered,
            "consumer": dict(self._consumer.counters),
        }

    def address(self) -> str:
        """The page's address."""
        return self._server.address

    def status(self) -> dict[str, Any]:
        return self._nissa.status()

    def run(self, name: str) -> dict[str, Any] | None:
        return self._nissa.run(name)

    def events(self, query: str = "", run: str = "", kind: str = "", limit: int = 100) -> list[dict[str, Any]]:
        return self._nissa.events(query, run=run, kind=kind, limit=limit)

    def alerts(self) -> list[dict[str, Any]]:
        return self._nissa.alert_list()

    def stop(self) -> None:
        """End in order; what was not acknowledged is read again by the next one."""
        self._consumer.stop()
        self._server.stop()
        self._nissa.close()
