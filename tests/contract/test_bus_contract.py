"""What the bus promises, whatever carries it: the same tests in this process and on each Redis (`carriers`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from esper_ray.config import Config, build
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.contracts.messages import EventEnvelope, MetricPoint
from esper_ray.contracts.signing import KeyRing, Signer, load_keys
from esper_ray.oona.bus import connect_consumer, connect_keeper, connect_publisher
from esper_ray.oona.consumer import Consumer
from esper_ray.oona.memory import MemoryTransport
from esper_ray.oona.publisher import BusPublisher
from esper_ray.oona.redis_transport import RedisTransport, connect
from esper_ray.oona.server import ManagedRedis
from esper_ray.oona.streams import EMERGENCY, NORMAL, STREAMS, TELEMETRY
from esper_ray.oona.transport import Transport
from esper_ray.reliability.clock import ManualClock
from tests.contract.carriers import SERVERS

REPORT, TELEMETRY_TYPE, SIGNAL = (
    BusMessageType.FIELD_REPORT,
    BusMessageType.TELEMETRY,
    BusMessageType.EMERGENCY_SIGNAL,
)
BUS = {"claim_seconds": 0.02, "max_deliveries": 3, "max_depth": 40, "resume_depth": 10}


@pytest.fixture(scope="module", params=["memory", *SERVERS])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedRedis | None]:
    if request.param == "memory":
        yield None
        return
    managed = ManagedRedis(tmp_path_factory.mktemp("redis"), binary=request.param)
    managed.start()
    yield managed
    managed.stop()


@pytest.fixture
def new_transport(server: ManagedRedis | None, tmp_path: Path) -> Callable[[], Transport]:
    if server is None:
        shared = MemoryTransport()
        return lambda: shared
    return lambda: RedisTransport(lambda: server.url, tmp_path.name)


class Rig:
    """A system on one transport; everything it made is closed at the end."""

    def __init__(self, home: Path, new_transport: Callable[[], Transport]) -> None:
        self.config: Config = build({"home": str(home), "bus": BUS})
        self.transport, self._new = new_transport(), new_transport
        self._open: list[Callable[[], None]] = [self.transport.close]
        self.got: list[EventEnvelope] = []

    def publisher(self, source: str = "tolaria") -> BusPublisher:
        made = connect_publisher(self.config, source, transport=self._new())
        self._open.append(made.close)
        return made

    def consumer(
        self,
        handler: Callable[[EventEnvelope], None] | None = None,
        name: str = "a",
        group: str = "nissa",
        tell: Callable[[Sequence[MetricPoint]], None] = lambda _: None,
    ) -> Consumer:
        made = connect_consumer(
            self.config, group, STREAMS, handler or self.got.append, name=name, tell=tell, transport=self._new()
        )
        self._open.append(made.stop)
        return made

    def payloads(self) -> list[bytes]:
        return [envelope.payload for envelope in self.got]

    def close(self) -> None:
        for close in reversed(self._open):
            close()


@pytest.fixture
def rig(tmp_path: Path, new_transport: Callable[[], Transport]) -> Iterator[Rig]:
    made = Rig(tmp_path, new_transport)
    yield made
    made.close()


def drain(consumer: Consumer, until: Callable[[], bool], rounds: int = 400) -> None:
    """Poll until the condition holds; each round waits a little for the carrier, never for a fixed time."""
    for _ in range(rounds):
        consumer.poll(block_ms=10)
        if until():
            return
    raise AssertionError("it did not come about")


def test_what_is_published_arrives_signed_and_in_order(rig: Rig) -> None:
    sender = rig.publisher()
    for number in range(100):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    reader = rig.consumer()
    drain(reader, lambda: len(rig.got) == 100)
    assert rig.payloads() == [b"%d" % number for number in range(100)]
    assert {envelope.source for envelope in rig.got} == {"tolaria"}
    assert {envelope.payload_type for envelope in rig.got} == {"FieldReport"}
    assert rig.transport.state(NORMAL).groups["nissa"].pending == 0


def test_an_emergency_is_read_before_what_was_sent_earlier(rig: Rig) -> None:
    sender = rig.publisher()
    for number in range(10):
        sender.publish(REPORT, b"%d" % number)
        sender.publish(TELEMETRY_TYPE, b"t%d" % number)
    assert sender.flush(5)
    sender.publish(SIGNAL, b"halt")
    sender.publish(REPORT, b"critical", priority=MessagePriority.CRITICAL)
    assert sender.flush(5)
    drain(rig.consumer(), lambda: len(rig.got) == 22)
    assert rig.payloads()[:2] == [b"halt", b"critical"]


def test_each_group_gets_every_message_and_readers_of_one_group_share(rig: Rig) -> None:
    first: list[EventEnvelope] = []
    second: list[EventEnvelope] = []
    other: list[EventEnvelope] = []
    sender = rig.publisher()
    readers = [rig.consumer(first.append, "a"), rig.consumer(second.append, "b"), rig.consumer(other.append, "a", "x")]
    for reader in readers:
        reader.poll()
    for number in range(50):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    for _ in range(10):
        for reader in readers:
            reader.poll(block_ms=5)
    assert sorted(e.payload for e in first + second) == sorted(b"%d" % number for number in range(50))
    assert len(other) == 50


def test_what_a_dead_reader_left_is_handed_out_again(rig: Rig) -> None:
    sender = rig.publisher()
    sender.publish(REPORT, b"precious")
    assert sender.flush(5)
    rig.consumer().poll()  # joins the group
    rig.got.clear()
    sender.publish(REPORT, b"taken by one who dies")
    assert sender.flush(5)
    while not rig.transport.read("nissa", "dead", STREAMS, count=10, block_ms=10):
        pass
    survivor = rig.consumer(name="b")
    drain(survivor, lambda: bool(rig.got))
    assert rig.payloads() == [b"taken by one who dies"]
    assert survivor.counters["redelivered"] == 1
    assert rig.transport.state(NORMAL).groups["nissa"].pending == 0


def test_a_handler_that_fails_gets_the_message_again_and_then_it_is_put_aside_with_the_reason(rig: Rig) -> None:
    attempts: list[bytes] = []

    def handler(envelope: EventEnvelope) -> None:
        attempts.append(envelope.payload)
        if envelope.payload == b"poison" or (envelope.payload == b"flaky" and attempts.count(b"flaky") == 1):
            raise RuntimeError("cannot digest this")

    sender = rig.publisher()
    for payload in (b"poison", b"flaky", b"good"):
        sender.publish(REPORT, payload)
    assert sender.flush(5)
    reader = rig.consumer(handler)
    drain(reader, lambda: rig.transport.state(NORMAL).dead == 1 and attempts.count(b"flaky") == 2)
    assert attempts.count(b"poison") == 3
    assert attempts.count(b"good") == 1
    (letter,) = rig.transport.dead_letters(NORMAL)
    assert letter.reason == "handler_failed: RuntimeError: cannot digest this"
    assert (letter.group, letter.deliveries) == ("nissa", 3)
    assert rig.transport.state(NORMAL).groups["nissa"].pending == 0


def test_a_message_that_kills_its_readers_ends_in_the_dead_letters(rig: Rig) -> None:
    sender = rig.publisher()
    sender.publish(REPORT, b"deadly")
    assert sender.flush(5)
    rig.transport.ensure_group("nissa", STREAMS)
    assert rig.transport.read("nissa", "dead-1", STREAMS, count=10)
    for number in (2, 3):
        assert rig.transport.claim("nissa", f"dead-{number}", NORMAL, idle_ms=0, count=10)[0].count == number
    drain(rig.consumer(), lambda: rig.transport.state(NORMAL).dead == 1)
    assert not rig.got
    assert rig.transport.dead_letters(NORMAL)[0].reason.startswith("too_many_deliveries")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"noise", "malformed"),
        (Signer(KeyRing((("kx", b"x" * 32),)), "stranger").seal(b"p", REPORT, payload_type="x"), "unknown_key"),
    ],
)
def test_what_is_not_genuine_is_never_handed_over(rig: Rig, data: bytes, reason: str) -> None:
    rig.transport.append([(NORMAL, data)])
    drain(rig.consumer(), lambda: rig.transport.state(NORMAL).dead == 1)
    assert not rig.got
    assert rig.transport.dead_letters(NORMAL)[0].reason.startswith(reason)
    assert rig.transport.dead_letters(NORMAL)[0].data == data


def test_the_same_event_id_twice_has_one_effect(rig: Rig) -> None:
    sender = rig.publisher()
    for _ in range(3):
        sender.publish(REPORT, b"once", event_id=b"12345678")
    assert sender.flush(5)
    reader = rig.consumer()
    drain(reader, lambda: reader.counters.get("duplicates", 0) == 2)
    assert rig.payloads() == [b"once"]


def test_trimming_keeps_all_that_some_group_has_not_acknowledged(rig: Rig) -> None:
    sender, keeper = rig.publisher(), connect_keeper(rig.config, transport=rig.transport)
    quick, slow = rig.consumer(), "slow"
    quick.poll()
    rig.transport.ensure_group(slow, STREAMS)
    for number in range(30):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    drain(quick, lambda: len(rig.got) == 30)
    taken = rig.transport.read(slow, "s", [NORMAL], count=20)
    rig.transport.ack(slow, NORMAL, [delivery.id for delivery in taken[:5] + taken[6:]])
    report = keeper.round()
    assert report.streams[NORMAL].depth == 25, "the sixth is in work, so nothing from there on may go"
    rig.transport.ack(slow, NORMAL, [taken[5].id])
    assert keeper.round().streams[NORMAL].depth == 10
    rest = rig.transport.read(slow, "s", [NORMAL], count=99)
    assert len(rest) == 10
    rig.transport.ack(slow, NORMAL, [delivery.id for delivery in rest])
    assert keeper.round().streams[NORMAL].depth == 0


def test_with_no_reader_at_all_a_stream_keeps_its_newest(rig: Rig) -> None:
    sender = rig.publisher()
    for number in range(60):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    state = connect_keeper(rig.config, transport=rig.transport).round().streams[NORMAL]
    assert (state.length, state.depth) == (40, 0)
    drain(rig.consumer(), lambda: len(rig.got) == 40)
    assert rig.payloads()[0] == b"20"


def test_a_deep_queue_sheds_low_priorities_then_telemetry_and_never_what_is_owed(rig: Rig) -> None:
    sender, keeper = rig.publisher(), connect_keeper(rig.config, transport=rig.transport)
    reader = rig.consumer()
    reader.poll()

    def send(payload: bytes, priority: MessagePriority = MessagePriority.NORMAL) -> Any:
        sender.publish(TELEMETRY_TYPE, payload, priority=priority)
        sender.publish(REPORT, b"report")
        sender.publish(SIGNAL, b"signal")
        assert sender.flush(5)
        keeper.round()
        return {key: count for key, count in sender.counters.items() if key.startswith("shed")}

    for _ in range(45):
        send(b"fill")
    assert send(b"low", MessagePriority.LOW) == {"shed.low_priority": 1}
    while keeper.round().streams[TELEMETRY].depth <= 60:
        send(b"fill")
    assert send(b"fill") == {"shed.low_priority": 1, "shed.telemetry": 1}
    assert send(b"warning", MessagePriority.HIGH) == {"shed.low_priority": 1, "shed.telemetry": 1}
    drain(reader, lambda: keeper.round().streams[TELEMETRY].depth < 10)
    before = sum(send(b"first after").values())
    assert sum(send(b"fill", MessagePriority.LOW).values()) == before, "shedding ended"
    drain(reader, lambda: keeper.round().streams[NORMAL].depth == 0)
    reports = sum(1 for payload in rig.payloads() if payload == b"report")
    assert reports == sum(1 for payload in rig.payloads() if payload == b"signal")
    assert b"warning" in rig.payloads()
    assert b"low" not in rig.payloads()


def test_a_message_that_is_too_large_is_refused_at_its_sender_and_counted(rig: Rig) -> None:
    sender = rig.publisher()
    sender.publish(REPORT, b"x" * 300_000)
    sender.publish(REPORT, b"fits")
    assert sender.flush(5)
    drain(rig.consumer(), lambda: bool(rig.got))
    assert rig.payloads() == [b"fits"]
    assert sender.counters["dropped.too_large"] == 1


def test_a_running_reader_takes_messages_as_they_come_and_stops_when_told(rig: Rig) -> None:
    arrived = threading.Event()
    reader = rig.consumer(lambda _: arrived.set())
    reader.start()
    rig.publisher().publish(SIGNAL, b"halt")
    assert arrived.wait(5)
    reader.stop()
    assert rig.transport.state(EMERGENCY).groups["nissa"].pending == 0


def test_an_expired_message_is_counted_and_not_handed_over(rig: Rig) -> None:
    long_ago = ManualClock()
    signer = Signer(load_keys(rig.config.home / "keys" / "signing"), "s", clock=long_ago)
    rig.transport.append([(NORMAL, signer.seal(b"old", REPORT, payload_type="FieldReport", ttl_ms=1))])
    reader = rig.consumer()
    drain(reader, lambda: reader.counters.get("expired", 0) == 1)
    assert not rig.got


def test_an_emergency_overtakes_what_its_reader_has_in_hand_already(rig: Rig) -> None:
    clock, order = ManualClock(), []
    sender = rig.publisher()

    def handler(envelope: EventEnvelope) -> None:
        order.append(envelope.payload)
        clock.advance(0.015)
        if envelope.payload == b"3":
            sender.publish(SIGNAL, b"halt")
            assert sender.flush(5)

    for number in range(20):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    reader = connect_consumer(rig.config, "nissa", STREAMS, handler, name="a", transport=rig.transport, clock=clock)
    drain(reader, lambda: len(order) == 21)
    assert order.index(b"halt") <= 5, "not behind the rest of the batch"


def test_however_much_is_in_work_the_deliveries_of_each_message_are_counted(rig: Rig) -> None:
    sender = rig.publisher()
    for number in range(400):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(10)
    rig.transport.ensure_group("g", STREAMS)
    while rig.transport.read("g", "a", [NORMAL], count=100):
        pass
    for wanted in (2, 3):
        taken = rig.transport.claim("g", "a", NORMAL, idle_ms=0, count=400)
        assert [delivery.count for delivery in taken] == [wanted] * 400
    assert rig.transport.claim("g", "a", NORMAL, idle_ms=60_000, count=400) == []


def test_a_dead_letter_that_is_revived_has_its_effect_and_a_dropped_one_never(rig: Rig) -> None:
    broken = True

    def handler(envelope: EventEnvelope) -> None:
        if broken:
            raise RuntimeError("cannot digest this")
        rig.got.append(envelope)

    sender = rig.publisher()
    for payload in (b"wanted", b"unwanted"):
        sender.publish(REPORT, payload)
    assert sender.flush(5)
    reader = rig.consumer(handler)
    drain(reader, lambda: rig.transport.state(NORMAL).dead == 2)
    wanted, unwanted = rig.transport.dead_letters(NORMAL)
    broken = False
    assert rig.transport.revive(NORMAL, wanted.id)
    assert not rig.transport.revive(NORMAL, wanted.id), "once"
    assert rig.transport.drop_dead(NORMAL, unwanted.id)
    assert not rig.transport.drop_dead(NORMAL, unwanted.id)
    assert not rig.transport.revive(NORMAL, unwanted.id)
    drain(reader, lambda: bool(rig.got))
    assert rig.payloads() == [b"wanted"]
    assert rig.transport.state(NORMAL).dead == 0


def test_a_sender_forgets_a_message_when_all_groups_have_acknowledged_it(rig: Rig) -> None:
    sender, keeper = rig.publisher(), connect_keeper(rig.config, transport=rig.transport)
    quick = rig.consumer()
    quick.poll()
    rig.transport.ensure_group("slow", STREAMS)
    for number in range(30):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    assert sender.unsettled == 30
    drain(quick, lambda: len(rig.got) == 30)
    keeper.round()
    slow = rig.consumer(lambda _: None, "s", "slow")
    drain(slow, lambda: sender.counters.get("settled", 0) == 30)
    assert sender.unsettled == 0
    sender.close()
    assert not list((rig.config.home / "spool").iterdir()), "a sender that owes nothing leaves no file"


def test_what_has_a_time_to_live_is_worth_nothing_after_it_and_what_is_owed_has_none(rig: Rig) -> None:
    clock = ManualClock()
    sender = connect_publisher(rig.config, "tolaria", transport=rig.transport, clock=clock)
    state = BusMessageType.SYSTEM_STATE
    sender.publish(REPORT, b"report")
    sender.publish(state, b"old")
    sender.publish(state, b"urgent", priority=MessagePriority.CRITICAL)
    assert sender.flush(5)
    clock.advance(2 * 3600)
    sender.publish(state, b"new")
    assert sender.flush(5)
    reader = connect_consumer(rig.config, "g", STREAMS, rig.got.append, name="a", transport=rig.transport, clock=clock)
    drain(reader, lambda: len(rig.got) == 3)
    assert rig.payloads() == [b"urgent", b"report", b"new"]
    assert reader.counters["expired"] == 1
    assert rig.transport.state(NORMAL).groups["g"].pending == 0
    sender.close()


def test_entries_that_were_removed_by_hand_while_in_work_hold_nobody_up(
    rig: Rig, server: ManagedRedis | None, tmp_path: Path
) -> None:
    if server is None:
        pytest.skip("nobody can remove anything in this process")
    sender = rig.publisher()
    for number in range(3):
        sender.publish(REPORT, b"%d" % number)
    assert sender.flush(5)
    rig.transport.ensure_group("nissa", STREAMS)
    taken = rig.transport.read("nissa", "dead", [NORMAL], count=10)
    client = connect(server.url)
    client.xdel(f"{tmp_path.name}:{NORMAL}", taken[0].id, taken[1].id)
    client.close()
    reader = rig.consumer()
    drain(reader, lambda: rig.transport.state(NORMAL).groups["nissa"].pending == 0)
    assert rig.payloads() == [b"2"]


def test_a_stream_keeps_its_newest_dead_letters_and_tells_how_many_had_to_go(rig: Rig) -> None:
    rig.config = build({"home": str(rig.config.home), "bus": {**BUS, "dead_letters": 3}})
    rig.transport.append([(NORMAL, b"noise %d" % number) for number in range(5)])
    drain(rig.consumer(), lambda: rig.transport.state(NORMAL).dead == 5)
    keeper = connect_keeper(rig.config, transport=rig.transport)
    report = keeper.round()
    assert [letter.data for letter in keeper.dead_letters(NORMAL)] == [b"noise 2", b"noise 3", b"noise 4"]
    assert report.streams[NORMAL].dead == 3
    assert [(point.key, point.value, point.labels) for point in report.dropped_points()] == [
        ("oz", 2.0, {"stream": NORMAL})
    ]
    assert keeper.round().dropped_points() == []


def test_a_reader_tells_what_it_met_besides_messages_that_it_handled(rig: Rig) -> None:
    told: list[MetricPoint] = []
    stopped = threading.Event()

    def fail_once(envelope: EventEnvelope) -> None:
        if not rig.got:
            rig.got.append(envelope)
            raise RuntimeError("the first time")

    def tell(points: Sequence[MetricPoint]) -> None:
        told.extend(points)
        if {point.labels.get("outcome") for point in told} >= {"failed", "redelivered", "buried"}:
            stopped.set()

    rig.transport.append([(NORMAL, b"noise"), (NORMAL, b"more noise")])
    sender = rig.publisher()
    sender.publish(REPORT, b"a")
    reader = rig.consumer(fail_once, tell=tell)
    reader.start()
    assert stopped.wait(20)
    reader.stop()
    found = {point.labels["outcome"]: point.value for point in told if point.key == "or"}
    assert found == {"failed": 1.0, "redelivered": 1.0, "buried": 2.0}
    assert {point.labels["group"] for point in told if point.key == "or"} == {"nissa"}
