"""The two shells, without Ray: telemetry goes over a real Redis and shows on the page's interface."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from esper_ray.actors.nissa import NissaActor
from esper_ray.actors.oona import OonaActor
from esper_ray.config import build
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.telemetry import event, publish_telemetry
from esper_ray.errors import EnvironmentFault
from esper_ray.oona.bus import connect_publisher
from esper_ray.oona.publisher import BusPublisher
from esper_ray.oona.server import ManagedRedis


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    bus = {"breaker_seconds": 0.2, "claim_seconds": 0.2}
    return {"home": str(tmp_path), "bus": bus, "nissa": {"port": 0}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagedRedis]:
    managed = ManagedRedis(tmp_path)
    managed.start()
    yield managed
    managed.stop()


@pytest.fixture
def publisher(tree: dict[str, Any], server: ManagedRedis) -> Iterator[BusPublisher]:
    assert server.alive()
    made = connect_publisher(build(tree), "tolaria")
    yield made
    made.close()


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    tick, deadline = threading.Event(), time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        tick.wait(0.01)


def send_epoch(publisher: BusPublisher, epoch: int) -> None:
    points = [MetricPoint("va", 0.5 + epoch / 100), MetricPoint("md", 1.0)]
    publish_telemetry(publisher, "tolaria", "r-1", epoch, points, [event("decision", {"epoch": epoch, "why": "test"})])


def test_telemetry_shows_on_the_interface_and_survives_a_new_actor(
    tree: dict[str, Any], publisher: BusPublisher
) -> None:
    first = NissaActor(tree)
    assert first.ping()["name"] == "nissa"
    for epoch in (1, 2, 3):
        send_epoch(publisher, epoch)
    run = lambda actor: actor.run("r-1") or {"epoch": 0}  # noqa: E731
    wait_until(lambda: run(first)["epoch"] == 3)
    with httpx.Client(base_url=first.address()) as client:
        assert client.get("/api/runs/r-1").json()["totals"]["missed_deadlines"] == 3.0
        wait_until(lambda: bool(client.get("/readyz").status_code == 200))
        assert "esper_validation_accuracy" in client.get("/metrics").text
    assert first.health()["ok"]
    first.stop()
    send_epoch(publisher, 4)
    second = NissaActor(tree)
    assert run(second)["epoch"] >= 3, "from the event store, before the bus brings anything"
    wait_until(lambda: run(second)["epoch"] == 4)
    assert run(second)["totals"]["missed_deadlines"] == 4.0, "each message had its effect once"
    assert [found["epoch"] for found in second.events("decision", limit=2)] == [4, 3]
    assert second.status()["current"] == "r-1"
    assert second.alerts() == []
    second.stop()


def test_a_port_in_use_is_told_with_what_to_set(tree: dict[str, Any]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"Port {port} on 127.0.0.1 is in use") as caught:
            NissaActor({**tree, "nissa": {"port": port}})
    assert "nissa.port" in caught.value.remedy
    with pytest.raises(EnvironmentFault, match="cannot listen"):
        NissaActor({**tree, "nissa": {"port": 0, "host": "192.0.2.1"}})


def test_the_keeper_measures_tells_and_comes_back_after_redis(
    tree: dict[str, Any], server: ManagedRedis, publisher: BusPublisher
) -> None:
    nissa, keeper = NissaActor(tree), OonaActor(tree)
    publisher.publish(BusMessageType.FIELD_REPORT, b"not a report")
    streams = lambda: nissa.status()["streams"].get("oona.normal", {})  # noqa: E731
    wait_until(lambda: streams().get("dead_letters") == 1.0)
    (letter,) = keeper.dead_letters("oona.normal")
    assert letter["reason"].startswith("malformed")
    told = lambda: httpx.get(f"{nissa.address()}/metrics").text  # noqa: E731
    wait_until(lambda: 'esper_bus_reader_total{group="nissa",outcome="buried"' in told())
    assert keeper.health()["ok"]
    assert keeper.ping()["name"] == "oona"
    server.stop()
    wait_until(lambda: not keeper.health()["ok"])
    server.start()
    wait_until(lambda: bool(keeper.health()["ok"]))
    send_epoch(publisher, 1)
    wait_until(lambda: (nissa.run("r-1") or {"epoch": 0})["epoch"] == 1)
    keeper.stop()
    nissa.stop()
