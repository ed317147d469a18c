"""`esper bus`: dead letters are listed with their reason, put back once, and dropped for good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper_ray.cli.app import app
from esper_ray.config import Config, build
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.errors import BusError, ConfigError
from esper_ray.oona.bus import connect_consumer, connect_publisher, connect_transport
from esper_ray.oona.server import ManagedRedis
from esper_ray.oona.streams import NORMAL, STREAMS

runner = CliRunner()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.setenv("ESPER_HOME", str(tmp_path))
    monkeypatch.delenv("ESPER_REDIS_URL", raising=False)
    server = ManagedRedis(tmp_path)
    server.start()
    yield build({"home": str(tmp_path), "bus": {"max_deliveries": 1}})
    server.stop()


def bus(*arguments: str) -> str:
    result = runner.invoke(app, ["bus", *arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.output


def letters() -> list[dict[str, object]]:
    return [json.loads(line) for line in bus("dead-letters", "list", "--json").splitlines()]


def test_dead_letters_are_listed_replayed_and_dropped(config: Config) -> None:
    mended: list[bytes] = []
    broken = True

    def handler(envelope: EventEnvelope) -> None:
        if envelope.type is not BusMessageType.FIELD_REPORT:
            return
        if broken:
            raise RuntimeError("cannot digest this")
        mended.append(envelope.payload)

    transport = connect_transport(config)
    reader = connect_consumer(config, "nissa", STREAMS, handler, name="a")
    sender = connect_publisher(config, "tamiyo")
    for number in range(3):
        sender.publish(BusMessageType.FIELD_REPORT, b"%d" % number)
    assert sender.flush(10)
    transport.append([(NORMAL, b"noise")])
    while transport.state(NORMAL).dead < 4:
        reader.poll(block_ms=20)
    first, second, third, noise = letters()
    assert first["type"] == "field_report"
    assert (first["source"], first["group"], first["deliveries"]) == ("tamiyo", "nissa", 1)
    assert first["reason"] == "handler_failed: RuntimeError: cannot digest this"
    assert (noise["type"], noise["bytes"]) == ("unreadable", 5)
    assert str(first["letter"]) in bus("dead-letters", "list")
    assert "4" in bus("status")
    broken = False
    assert bus("dead-letters", "replay", str(second["letter"])).startswith("1 of 1")
    assert bus("dead-letters", "replay", str(second["letter"])).startswith("0 of 1")
    assert bus("dead-letters", "replay", "--all", "--reason", "handler_failed").startswith("2 of 2")
    assert bus("dead-letters", "drop", "--all", "--stream", NORMAL).startswith("1 of 1")
    assert "no dead letters" in bus("dead-letters", "list")
    while len(mended) < 3:
        reader.poll(block_ms=20)
    assert mended == [b"1", b"0", b"2"]
    streams = {row["stream"]: row for row in map(json.loads, bus("status", "--json").splitlines())}
    assert streams[NORMAL]["groups"]["nissa"]["pending"] == 0
    assert streams[NORMAL]["dead_letters"] == 0
    assert third["letter"] != first["letter"]
    reader.stop()
    sender.close()
    transport.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dead-letters", "replay"), "Which dead letters"),
        (("dead-letters", "drop", "oona.normal/1-0", "--all"), "Which dead letters"),
        (("dead-letters", "drop", "oona.normal"), "names no dead letter"),
        (("dead-letters", "list", "--stream", "oona.none"), "no stream oona.none"),
    ],
)
def test_a_mistake_is_told(config: Config, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bus(*arguments)


def test_a_bus_that_was_never_started_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_HOME", str(tmp_path))
    monkeypatch.delenv("ESPER_REDIS_URL", raising=False)
    with pytest.raises(BusError, match="no address") as told:
        bus("status")
    assert "esper up" in told.value.remedy
