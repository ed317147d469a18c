"""Redis stops, hangs, is killed, comes back: nothing durable is lost and no sender waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper_ray.config import Config, build
from esper_ray.contracts.enums import BusMessageType, CircuitBreakerState, MessagePriority
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.oona.bus import connect_consumer, connect_publisher, connect_transport
from esper_ray.oona.memory import MemoryTransport
from esper_ray.oona.server import ManagedRedis
from esper_ray.oona.streams import NORMAL, STREAMS, TELEMETRY

REPORT, TELEMETRY_TYPE, SIGNAL = (
    BusMessageType.FIELD_REPORT,
    BusMessageType.TELEMETRY,
    BusMessageType.EMERGENCY_SIGNAL,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return build({"home": str(tmp_path), "bus": {"breaker_seconds": 0.1, "claim_seconds": 0.5}})


@pytest.fixture
def server(config: Config) -> Iterator[ManagedRedis]:
    managed = ManagedRedis(config.home)
    managed.start()
    yield managed
    managed.stop()


class Effects:
    """Counts the effects by payload and lets a test wait for them."""

    def __init__(self) -> None:
        self.counts: Counter[bytes] = Counter()
        self.order: list[bytes] = []
        self._changed = threading.Condition()

    def __call__(self, envelope: EventEnvelope) -> None:
        with self._changed:
            self.counts[envelope.payload] += 1
            self.order.append(envelope.payload)
            self._changed.notify_all()

    def wait(self, wanted: set[bytes], timeout: float = 20.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: wanted <= set(self.counts), timeout)


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    tick, deadline = threading.Event(), time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        tick.wait(0.005)


def test_redis_stopped_and_started_again_loses_nothing_and_repeats_no_effect(
    config: Config, server: ManagedRedis
) -> None:
    effects = Effects()
    sender = connect_publisher(config, "tamiyo")
    reader = connect_consumer(config, "nissa", STREAMS, effects)
    reader.start()
    before = {b"before-%d" % number for number in range(50)}
    for payload in sorted(before):
        sender.publish(REPORT, payload)
    assert effects.wait(before)
    server.stop()
    during = [b"during-%03d" % number for number in range(200)]
    for payload in during:
        sender.publish(REPORT, payload)
    wait_until(lambda: sender.counters.get("spooled", 0) >= len(during))
    wait_until(lambda: sender.breaker is not CircuitBreakerState.CLOSED)
    server.start()
    after = [b"after-%d" % number for number in range(50)]
    for payload in after:
        sender.publish(REPORT, payload)
    assert sender.flush(20)
    assert effects.wait(before | set(during) | set(after))
    reader.stop()
    sender.close()
    assert set(effects.counts.values()) == {1}
    assert [payload for payload in effects.order if payload.startswith(b"during")] == during
    assert not list((config.home / "spool").glob("*.db")), "an empty spool leaves no file"


def test_a_redis_that_is_killed_keeps_its_port_and_its_data(config: Config, server: ManagedRedis) -> None:
    url = server.url
    sender = connect_publisher(config, "tamiyo")
    sender.publish(REPORT, b"kept")
    assert sender.flush(10)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive())
    assert server.start() == url
    sender.publish(REPORT, b"next")
    assert sender.flush(20)
    effects = Effects()
    reader = connect_consumer(config, "late", STREAMS, effects)
    reader.start()
    assert effects.wait({b"kept", b"next"})
    reader.stop()
    sender.close()


def test_a_redis_that_hangs_gets_all_of_it_later(config: Config, server: ManagedRedis) -> None:
    sender = connect_publisher(config, "tolaria")
    sender.publish(REPORT, b"connected")
    assert sender.flush(10)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        for number in range(2000):
            sender.publish(TELEMETRY_TYPE if number % 2 else REPORT, b"%d" % number)
        wait_until(lambda: sender.counters.get("spooled", 0) >= 1000)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert sender.flush(30)
    effects = Effects()
    reader = connect_consumer(config, "late", STREAMS, effects)
    reader.start()
    assert effects.wait({b"%d" % number for number in range(2000)})
    assert max(effects.counts.values()) == 1, "what arrived twice had one effect"
    reader.stop()
    sender.close()


def test_while_the_bus_is_away_telemetry_is_bounded_and_counted_and_commands_are_on_disk(config: Config) -> None:
    transport = MemoryTransport()
    transport.away = True
    small = build({**config.model_dump(mode="json"), "bus": {"buffer": 64, "breaker_seconds": 0.05}})
    sender = connect_publisher(small, "tolaria", transport=transport)
    for number in range(100):
        sender.publish(TELEMETRY_TYPE, b"t%d" % number)
    sender.publish(REPORT, b"report")
    sender.publish(SIGNAL, b"halt")
    wait_until(lambda: sender.counters.get("spooled", 0) == 2)
    assert sender.counters["dropped.buffer_full"] == 36
    transport.away = False
    assert sender.flush(10)
    assert transport.state(TELEMETRY).length == 64
    assert transport.state(NORMAL).length == 1
    sender.close()


def test_what_a_killed_sender_had_spooled_is_sent_by_its_successor(config: Config) -> None:
    script = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from esper_ray.config import build\n"
        "from esper_ray.contracts.enums import BusMessageType as T\n"
        "from esper_ray.oona.bus import connect_publisher\n"
        "sender = connect_publisher(build({'home': sys.argv[1]}), 'tamiyo')\n"
        "for number in range(20):\n"
        "    sender.publish(T.FIELD_REPORT, b'%d' % number)\n"
        "while sender.counters.get('spooled', 0) < 20:\n"
        "    sender.flush(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(config.home)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    transport = MemoryTransport()
    other = connect_publisher(config, "urza", transport=transport)
    assert other.flush(5)
    assert transport.state(NORMAL).length == 0, "another source does not take it over"
    successor = connect_publisher(config, "tamiyo", transport=transport)
    successor.publish(REPORT, b"20")
    assert successor.flush(10)
    assert successor.counters["adopted"] == 20
    effects = Effects()
    reader = connect_consumer(config, "g", STREAMS, effects, transport=transport)
    while reader.poll():
        pass
    assert sorted(effects.order, key=int) == [b"%d" % number for number in range(21)]
    for sender in (other, successor):
        sender.close()


def test_close_leaves_what_could_not_be_sent_on_disk(config: Config) -> None:
    transport = MemoryTransport()
    transport.away = True
    sender = connect_publisher(config, "tolaria", transport=transport)
    sender.publish(REPORT, b"r")
    sender.publish(TELEMETRY_TYPE, b"t")
    sender.close(timeout=0.05)
    sender.publish(REPORT, b"too late")
    assert sender.counters["dropped.closed"] == 1
    transport.away = False
    successor = connect_publisher(config, "tolaria", transport=transport)
    wait_until(lambda: successor.counters.get("replayed", 0) == 2)
    successor.close()
    assert transport.state(NORMAL).length == transport.state(TELEMETRY).length == 1


def test_a_sender_tells_what_it_had_to_leave_out(config: Config) -> None:
    from esper_ray.contracts import codec

    transport = MemoryTransport()
    transport.away = True
    sender = connect_publisher(config, "tolaria", transport=transport)
    sender.publish(REPORT, b"r")
    wait_until(lambda: sender.counters.get("spooled", 0) == 1)
    transport.away = False
    told: dict[str, float] = {}

    def note(envelope: EventEnvelope) -> None:
        if envelope.type is TELEMETRY_TYPE:
            told.update({point.key: point.value for point in codec.decode_telemetry(envelope.payload).metrics})

    reader = connect_consumer(config, "g", STREAMS, note, transport=transport)
    wait_until(lambda: reader.poll(block_ms=20) >= 0 and {"op", "oy"} <= set(told))
    assert told["op"] == told["oy"] == 1.0
    sender.close()


def test_an_emergency_does_not_wait_for_the_breaker(config: Config) -> None:
    transport = MemoryTransport()
    transport.away = True
    slow = build({**config.model_dump(mode="json"), "bus": {"breaker_seconds": 1000.0}})
    sender = connect_publisher(slow, "tolaria", transport=transport)
    sender.publish(REPORT, b"r")
    wait_until(lambda: sender.breaker is CircuitBreakerState.OPEN)
    transport.away = False
    sender.publish(REPORT, b"now", priority=MessagePriority.CRITICAL)
    assert sender.flush(5)
    sender.close()


def test_a_sender_may_start_before_there_is_any_redis(config: Config) -> None:
    sender = connect_publisher(config, "karn")
    sender.publish(REPORT, b"early")
    wait_until(lambda: sender.counters.get("spooled", 0) == 1)
    managed = ManagedRedis(config.home)
    managed.start()
    try:
        assert sender.flush(10)
        transport = connect_transport(config)
        assert transport.state(NORMAL).length == 1
        transport.close()
    finally:
        sender.close()
        managed.stop()
