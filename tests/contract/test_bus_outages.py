"""Redis is away in each way it can be: no sender waits, nothing durable is lost, no effect is had twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from esper_ray.config import Config, build
from esper_ray.contracts.enums import BusMessageType, CircuitBreakerState, MessagePriority
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.errors import StorageFault
from esper_ray.oona.bus import connect_consumer, connect_publisher
from esper_ray.oona.memory import MemoryTransport
from esper_ray.oona.redis_transport import RedisTransport, connect
from esper_ray.oona.server import ManagedRedis
from esper_ray.oona.spool import Spool
from esper_ray.oona.streams import EMERGENCY, NORMAL, STREAMS
from esper_ray.reliability.journal import Journal
from tests.contract.carriers import PREFERRED, Cable

REPORT, TELEMETRY_TYPE, SIGNAL = (
    BusMessageType.FIELD_REPORT,
    BusMessageType.TELEMETRY,
    BusMessageType.EMERGENCY_SIGNAL,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return build({"home": str(tmp_path), "bus": {"breaker_seconds": 0.1, "claim_seconds": 0.5}})


@pytest.fixture(params=PREFERRED)
def server(request: pytest.FixtureRequest, config: Config) -> Iterator[ManagedRedis]:
    managed = ManagedRedis(config.home, binary=request.param)
    managed.start()
    yield managed
    managed.stop()


class Effects:
    """A reader's effects in a journal, each under the id of its event: a second one with that id is none."""

    def __init__(self, path: Path) -> None:
        self._journal, self._changed = Journal(path, sync=False), threading.Condition()
        self._newest = 0
        self.order: list[bytes] = []

    def __call__(self, envelope: EventEnvelope) -> None:
        with self._changed:
            number = self._journal.append("effects", envelope.payload, key=envelope.event_id.hex())
            if number > self._newest:
                self._newest = number
                self.order.append(envelope.payload)
            self._changed.notify_all()

    def wait(self, wanted: set[bytes], timeout: float = 30.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: wanted <= set(self.order), timeout)

    def counts(self) -> Counter[bytes]:
        return Counter(entry.payload for entry in self._journal.read("effects"))

    def close(self) -> None:
        self._journal.close()


@pytest.fixture
def effects(tmp_path: Path) -> Iterator[Effects]:
    made = Effects(tmp_path / "effects.db")
    yield made
    made.close()


def wait_until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    tick, deadline = threading.Event(), time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        tick.wait(0.005)


class Outage:
    """One server with a cable to it, and the ways in which both fail."""

    def __init__(self, server: ManagedRedis) -> None:
        self.server = server
        self._address = urlsplit(server.url)
        self.cable = Cable(self._address.port or 0)
        self.url = server.url.replace(f":{self._address.port}/", f":{self.cable.port}/")
        self.password = str(self._address.password)

    def begin(self, how: str) -> None:
        assert self.server.pid is not None
        if how == "stopped":
            self.server.stop()
        elif how == "killed":
            os.kill(self.server.pid, signal.SIGKILL)
            wait_until(lambda: not self.server.alive())
        elif how == "frozen":
            os.kill(self.server.pid, signal.SIGSTOP)
        elif how == "cut":
            self.cable.cut()
        elif how == "silent":
            self.cable.silence()
        else:
            self._command(*_CAUSES[how])

    def end(self, how: str) -> None:
        if how in ("stopped", "killed"):
            self.server.start()
        elif how == "frozen":
            assert self.server.pid is not None
            os.kill(self.server.pid, signal.SIGCONT)
        elif how in ("cut", "silent"):
            self.cable.mend()
        else:
            self._command(*(part.replace("PASSWORD", self.password) for part in _CURES[how]))

    def _command(self, *parts: str) -> None:
        """As an administrator. A new password or role counts for connections that are there already, too."""
        url = self.server.url.replace(self.password, "changed") if parts[-1] == self.password else self.server.url
        with connect(url) as client:
            client.execute_command(*parts)
            client.client_kill_filter(_type="normal", skipme=True)

    def close(self) -> None:
        self.cable.close()


_CAUSES = {
    "full": ("CONFIG", "SET", "maxmemory", "1"),
    "read only": ("REPLICAOF", "127.0.0.1", "1"),
    "wrong password": ("CONFIG", "SET", "requirepass", "changed"),
}
_CURES = {
    "full": ("CONFIG", "SET", "maxmemory", "0"),
    "read only": ("REPLICAOF", "NO", "ONE"),
    "wrong password": ("CONFIG", "SET", "requirepass", "PASSWORD"),
}


@pytest.mark.parametrize("how", ["stopped", "killed", "frozen", "full", "read only", "wrong password", "cut", "silent"])
def test_nothing_is_lost_and_nothing_had_twice_when_redis_is(
    how: str, config: Config, server: ManagedRedis, effects: Effects
) -> None:
    outage = Outage(server)
    sender = connect_publisher(config, "tolaria", transport=RedisTransport(lambda: outage.url, "esper"))
    reader = connect_consumer(config, "nissa", STREAMS, effects, transport=RedisTransport(lambda: outage.url, "esper"))
    reader.start()
    before = {b"before-%d" % number for number in range(50)}
    for payload in sorted(before):
        sender.publish(REPORT, payload)
    assert effects.wait(before)
    outage.begin(how)
    during = [b"during-%03d" % number for number in range(300)]
    for payload in during:
        sender.publish(REPORT, payload)
    alarms = [b"alarm-%d" % number for number in range(5)]
    for payload in alarms:
        sender.publish(SIGNAL, payload)
    wait_until(lambda: sender.counters.get("spooled", 0) >= len(during) + len(alarms))
    wait_until(lambda: sender.breaker is not CircuitBreakerState.CLOSED)
    outage.end(how)
    after = [b"after-%d" % number for number in range(50)]
    for payload in after:
        sender.publish(REPORT, payload)
    assert sender.flush(30)
    assert effects.wait(before | set(during) | set(alarms) | set(after))
    wait_until(lambda: sender.unsettled == 0)
    reader.stop()
    sender.close()
    outage.close()
    assert set(effects.counts().values()) == {1}
    assert [payload for payload in effects.order if payload in set(during)] == during
    assert [payload for payload in effects.order if payload.startswith(b"alarm")] == alarms
    assert not [name for name in sender.counters if name.startswith("dropped")]
    assert not list((config.home / "spool").iterdir())


def lose_everything(server: ManagedRedis) -> None:
    """As a disk would that never got the last writes: what was accepted is gone when the server is back."""
    server.stop()
    for path in server.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix in (".aof", ".rdb"):
            path.unlink()
    server.start()


def test_what_redis_accepted_and_lost_is_sent_again_unless_its_readers_had_it(
    config: Config, server: ManagedRedis, effects: Effects
) -> None:
    sender = connect_publisher(config, "tamiyo")
    reader = connect_consumer(config, "nissa", STREAMS, effects)
    sender.publish(REPORT, b"had")
    assert sender.flush(10)
    while not effects.order:
        reader.poll(block_ms=50)
    wait_until(lambda: sender.unsettled == 0)
    lost = [b"%d" % number for number in range(1000)]
    for payload in lost:
        sender.publish(REPORT, payload)
    assert sender.flush(10)
    lose_everything(server)
    wait_until(lambda: sender.counters.get("sent_again", 0) >= len(lost))
    reader.start()
    assert effects.wait({*lost, b"had"})
    wait_until(lambda: sender.unsettled == 0)
    reader.stop()
    sender.close()
    assert [payload for payload in effects.order if payload in {*lost, b"had"}] == [b"had", *lost]
    assert set(effects.counts().values()) == {1}
    assert sender.counters["sent_again"] == len(lost)


def test_what_a_killed_sender_had_sent_and_redis_lost_is_sent_by_its_successor(
    config: Config, server: ManagedRedis, effects: Effects
) -> None:
    script = (
        "import sys, os, signal\n"
        "from esper_ray.config import build\n"
        "from esper_ray.contracts.enums import BusMessageType as T\n"
        "from esper_ray.oona.bus import connect_publisher\n"
        "sender = connect_publisher(build({'home': sys.argv[1]}), 'tamiyo')\n"
        "for number in range(20):\n"
        "    sender.publish(T.FIELD_REPORT, b'%d' % number)\n"
        "assert sender.flush(20)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(config.home)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    lose_everything(server)
    successor = connect_publisher(config, "tamiyo")
    reader = connect_consumer(config, "nissa", STREAMS, effects)
    reader.start()
    assert effects.wait({b"%d" % number for number in range(20)})
    wait_until(lambda: successor.unsettled == 0)
    reader.stop()
    successor.close()
    assert not list((config.home / "spool").iterdir())


def test_a_restart_that_loses_nothing_sends_nothing_again(
    config: Config, server: ManagedRedis, effects: Effects
) -> None:
    sender = connect_publisher(config, "tamiyo")
    for number in range(100):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(10)
    server.stop()
    server.start()
    sender.publish(REPORT, b"100")
    assert sender.flush(20)
    reader = connect_consumer(config, "nissa", STREAMS, effects)
    reader.start()
    wait_until(lambda: sender.unsettled == 0)
    reader.stop()
    sender.close()
    wanted = [b"%d" % number for number in range(101)]
    assert [payload for payload in effects.order if payload in set(wanted)] == wanted
    assert "sent_again" not in sender.counters or not sender.counters["sent_again"]


def test_emergencies_keep_their_order_when_some_had_to_wait(config: Config) -> None:
    transport = MemoryTransport()
    transport.away = True
    slow = build({**config.model_dump(mode="json"), "bus": {"breaker_seconds": 1000.0}})
    sender = connect_publisher(slow, "tolaria", transport=transport)
    for number in range(5):
        sender.publish(SIGNAL, b"%d" % number)
        wait_until(lambda wanted=number + 1: sender.counters.get("spooled", 0) == wanted)  # type: ignore[misc]
    transport.away = False
    sender.publish(SIGNAL, b"5")
    assert sender.flush(10)
    transport.ensure_group("g", STREAMS)
    found = transport.read("g", "a", [EMERGENCY], count=10)
    got: list[bytes] = []
    reader = connect_consumer(config, "h", STREAMS, lambda envelope: got.append(envelope.payload), transport=transport)
    reader.poll()
    assert len(found) == 6
    assert got == [b"%d" % number for number in range(6)]
    sender.close()


def test_with_bus_and_disk_both_away_messages_wait_in_memory(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = MemoryTransport()
    transport.away = True
    full = threading.Event()
    full.set()
    add = Spool.add

    def refuse(spool: Spool, messages: list[object]) -> None:
        if full.is_set():
            raise StorageFault("The disk is full.")
        add(spool, messages)  # type: ignore[arg-type]

    monkeypatch.setattr(Spool, "add", refuse)
    sender = connect_publisher(config, "tolaria", transport=transport)
    for number in range(10):
        sender.publish(REPORT, b"%d" % number)
    wait_until(lambda: sender.counters.get("failures", 0) >= 2)
    assert not sender.flush(0.05)
    transport.away = False
    assert sender.flush(10)
    assert not sender.counters.get("dropped.spool_failed")
    assert transport.state(NORMAL).length == 10
    full.clear()
    sender.close()


class Stuck(MemoryTransport):
    """A server that takes a message up and does not answer, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def append(self, batch):  # type: ignore[no-untyped-def]
        self.entered.set()
        self.go.wait(60)
        return super().append(batch)


def test_a_caller_never_waits_for_the_bus(config: Config) -> None:
    transport = Stuck()
    sender = connect_publisher(config, "tolaria", transport=transport)
    sender.publish(REPORT, b"0")
    assert transport.entered.wait(20)
    for number in range(1, 1000):
        sender.publish((REPORT, TELEMETRY_TYPE, SIGNAL)[number % 3], b"%d" % number)
    assert not transport.go.is_set(), "all of them were handed over while the sender's thread waited for the server"
    assert transport.state(NORMAL).length == 0
    transport.go.set()
    assert sender.flush(30)
    assert sum(transport.state(stream).length for stream in STREAMS) == 1000
    sender.close()


class Faulty(MemoryTransport):
    """Fails in a way that nobody foresaw, as long as ``broken``."""

    broken = False

    def append(self, batch):  # type: ignore[no-untyped-def]
        if self.broken:
            raise RuntimeError("nobody foresaw this")
        return super().append(batch)

    def read(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.broken:
            raise RuntimeError("nobody foresaw this")
        return super().read(*args, **kwargs)


def test_a_fault_while_a_breaker_tries_again_silences_neither_sender_nor_reader(config: Config) -> None:
    transport, got = Faulty(), threading.Event()
    quick = build({**config.model_dump(mode="json"), "bus": {"breaker_seconds": 0.02, "breaker_failures": 1}})
    sender = connect_publisher(quick, "tolaria", transport=transport)
    reader = connect_consumer(quick, "g", STREAMS, lambda _: got.set(), transport=transport)
    reader.start()
    transport.away = True
    sender.publish(REPORT, b"r")
    wait_until(lambda: sender.breaker is CircuitBreakerState.OPEN and reader.counters.get("interruptions", 0) >= 1)
    transport.broken, transport.away = True, False
    failures = sender.counters["failures"]
    wait_until(lambda: sender.counters["failures"] >= failures + 2 and reader.counters.get("faults", 0) >= 2)
    transport.broken = False
    assert sender.flush(10)
    assert got.wait(10)
    reader.stop()
    sender.close()


def test_the_breakers_of_sender_and_reader_are_apart(config: Config) -> None:
    class NoAppend(MemoryTransport):
        def append(self, batch):  # type: ignore[no-untyped-def]
            raise redis.ResponseError("OOM command not allowed")

    transport = NoAppend()
    sender = connect_publisher(config, "tolaria", transport=transport)
    got: list[bytes] = []
    reader = connect_consumer(config, "g", STREAMS, lambda envelope: got.append(envelope.payload), transport=transport)
    reader.start()
    sender.publish(REPORT, b"r", priority=MessagePriority.NORMAL)
    wait_until(lambda: sender.breaker is not CircuitBreakerState.CLOSED)
    wait_until(reader.connected)
    assert "interruptions" not in reader.counters
    reader.stop()
    sender.close(timeout=0.05)
