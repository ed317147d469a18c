"""What the bus costs and holds, on the Redis that a system here would take, beside raw redis-py in the same run.

- ``publish_p95_ms``, ``publish_p99_ms``: from `publish` to Redis's answer, 200 messages/s.
  ``raw_publish_p99_ms``: an XADD.
- ``effect_p99_ms``: from `publish` to the committed effect in another process, an entry of its journal under the
  event's id. ``raw_effect_p99_ms``: from XADD to a blocked XREADGROUP in another process, without any effect.
- ``messages_per_s``: telemetry, with its protobuf built and read, signed, verified, read in a group and acknowledged,
  by one sending and one reading process. ``durable_messages_per_s``: field reports, which are also written to the
  sender's disk. ``effects_per_s``: with a transaction of the reader for each. ``raw_messages_per_s``: as many bytes
  through pipelined XADD, XREADGROUP and XACK; ``raw_redis_ratio``: of that. Each the median of five rounds.
- ``trainer_publish_p99_ms``: how long `publish` holds up a loop that computes, the worst of: the bus there, frozen,
  full, stopped. ``trainer_publish_STATE_p99_ms``: each.
- ``lost``, ``duplicated``: of the numbered field reports sent meanwhile.
- ``recovery_s``: until a reader has worked off the queue it finds, of ``recovery_messages``.
- ``memory_mb``: growth of a sender that publishes five times its buffer of telemetry while the bus is away.
- ``shedding_began_at``, ``shed_low_first``, ``emergency_ms``, ``resumed_below``: a stopped reader and what follows.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import common
from benchmarks.common import Bar, percentile
from esper_ray.config import Config, build
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, FieldReportOutcome, MessagePriority, TelemetryLevel
from esper_ray.contracts.messages import EventEnvelope, FieldReport, MetricPoint, TelemetryPacket
from esper_ray.oona.bus import connect_consumer, connect_keeper, connect_publisher, connect_transport
from esper_ray.oona.publisher import BusPublisher
from esper_ray.oona.redis_transport import connect
from esper_ray.oona.server import ManagedRedis
from esper_ray.oona.streams import STREAMS, TELEMETRY
from esper_ray.oona.transport import Appended, BusAway
from esper_ray.reliability.journal import Journal

BARS = (
    Bar("publish_p95_ms", 25.0),
    Bar("publish_p99_ms", 2.0),
    Bar("effect_p99_ms", 10.0),
    Bar("messages_per_s", 10_000.0, reach=True, above=True),
    Bar("trainer_publish_p99_ms", 0.2),
    Bar("lost", 0),
    Bar("duplicated", 0),
    Bar("recovery_s", 10.0),
    Bar("emergency_ms", 100.0),
)
REPORT, PACKET, SIGNAL = BusMessageType.FIELD_REPORT, BusMessageType.TELEMETRY, BusMessageType.EMERGENCY_SIGNAL
_SPAWN = multiprocessing.get_context("spawn")
_WAIT_SECONDS = 120.0
# Some 9 ms on one thread, about a step of a small host; Tolaria sends far less than ten messages after each.
_PRODUCTS = 16
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    paced: int
    throughput: int
    queue: int
    steps: int


FULL, QUICK = Sizes(3000, 60_000, 100_000, 400), Sizes(1000, 20_000, 100_000, 150)


def report(number: int) -> bytes:
    """A numbered field report of usual size; its time is when it was made."""
    return codec.encode_report(
        FieldReport(
            report_id=number,
            command_id=number,
            run="glyphs-3fa9c2",
            seed=1,
            slot=2,
            blueprint=9,
            outcome=FieldReportOutcome.SUCCESS,
            metrics={"gl": 0.031, "gn": 0.004, "vl": 0.52, "va": 0.86},
            window_epochs=3,
            issued_at_ns=time.monotonic_ns(),
            policy_version="heuristic",
        )
    )


def packet(number: int) -> bytes:
    """A numbered telemetry packet of usual size; its time is when it was made."""
    points = tuple(MetricPoint(key, float(number), {}) for key in ("tl", "vl", "va", "sp"))
    return codec.encode_telemetry(
        TelemetryPacket(
            packet_id=number,
            timestamp_ns=time.monotonic_ns(),
            source="tolaria",
            run="glyphs-3fa9c2",
            epoch=number % 50,
            level=TelemetryLevel.INFO,
            metrics=points,
        )
    )


class Effect:
    """The reader's effect: an entry of its journal under the event's id; a second one with that id is none."""

    def __init__(self, path: Path) -> None:
        self._journal, self._newest, self.count = Journal(path, sync=False), 0, 0
        self.delays: list[float] = []

    def __call__(self, envelope: EventEnvelope) -> None:
        if envelope.type is REPORT:
            told = codec.decode_report(envelope.payload)
            number, at_ns = told.report_id, told.issued_at_ns
        else:
            seen = codec.decode_telemetry(envelope.payload)
            if not seen.run:  # what a sender says about itself
                return
            number, at_ns = seen.packet_id, seen.timestamp_ns
        entry = self._journal.append("effects", b"%d" % number, key=envelope.event_id.hex())
        if entry > self._newest:
            self._newest = entry
            self.count += 1
            self.delays.append((time.monotonic_ns() - at_ns) / 1e9)


class Count:
    """A reader that reads what is inside, and has no other effect."""

    def __init__(self) -> None:
        self.count = 0
        self.delays: list[float] = []

    def __call__(self, envelope: EventEnvelope) -> None:
        if envelope.type is REPORT:
            codec.decode_report(envelope.payload)
        elif not codec.decode_telemetry(envelope.payload).run:
            return
        self.count += 1


def read_all(tree: dict[str, Any], group: str, path: str, wanted: int, ready: Event, done: Queue[Any]) -> None:
    """A reading process, until it had ``wanted`` messages; tells when, and the delays. With no path it only counts."""
    effect = Effect(Path(path)) if path else Count()
    config = build(tree)
    reader = connect_consumer(config, group, STREAMS, effect)
    reader.poll()
    ready.set()
    while effect.count < wanted:
        try:
            reader.poll(block_ms=200)
        except BusAway:
            threading.Event().wait(0.1)
    done.put((time.monotonic(), effect.delays))
    reader.stop()


def raw_read(url: str, key: str, wanted: int, ready: Event, done: Queue[Any]) -> None:
    """The same without any of ours: XREADGROUP and XACK, in batches of 128; answers with the delays."""
    with connect(url) as client:
        client.xgroup_create(key, "g", id="0", mkstream=True)
        ready.set()
        delays: list[float] = []
        while len(delays) < wanted:
            found: Any = client.xreadgroup("g", "a", {key: ">"}, count=128, block=200)
            for _, entries in found or ():
                now = time.monotonic_ns()
                delays += [(now - int.from_bytes(fields[b"e"][:8], "big")) / 1e9 for _, fields in entries]
                client.xack(key, "g", *(id for id, _ in entries))
    done.put((time.monotonic(), delays))


@contextmanager
def reading(target: Callable[..., None], *arguments: Any) -> Iterator[Queue[Any]]:
    """A process that reads; its answer comes in the queue."""
    ready, done = _SPAWN.Event(), _SPAWN.Queue()
    process = _SPAWN.Process(target=target, args=(*arguments, ready, done), daemon=True)
    process.start()
    if not ready.wait(_WAIT_SECONDS):
        raise RuntimeError("the reading process did not begin")
    try:
        yield done
        process.join(_WAIT_SECONDS)
    finally:
        process.kill()
        process.join()


class Timed:
    """A transport that notes how long after `publish` Redis took each message. One kind of message at a time."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.begun: deque[float] = deque()
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def append(self, batch: Sequence[tuple[str, bytes]]) -> Appended:
        answer: Appended = self._inner.append(batch)
        now = time.perf_counter()
        self.seconds += [now - self.begun.popleft() for _ in batch]
        return answer


class Bench:
    """One server, one home."""

    def __init__(self, home: Path, sizes: Sizes) -> None:
        self.sizes, self.home = sizes, home
        self.server = ManagedRedis(home)
        self.server.start()

    def config(self, namespace: str, **bus: Any) -> Config:
        """Of a system of its own on the same server."""
        roomy = {"buffer": 1_000_000, "max_depth": 10**9, "breaker_seconds": 0.5, **bus}
        return build(
            {"home": str(self.home), "ray": {"namespace": namespace}, "bus": {"redis_url": self.server.url, **roomy}}
        )

    def latency(self) -> dict[str, float]:
        config, pause = self.config("latency"), threading.Event()
        timed = Timed(connect_transport(config))
        path = self.home / "latency.db"
        with reading(read_all, config.model_dump(mode="json"), "g", str(path), self.sizes.paced) as done:
            sender = connect_publisher(config, "latency", transport=timed)
            for number in range(self.sizes.paced):
                timed.begun.append(time.perf_counter())
                sender.publish(REPORT, report(number))
                pause.wait(0.005)
            _, delays = done.get(timeout=_WAIT_SECONDS)
            sender.close()
        return {
            **{f"publish_p{share}_ms": percentile(timed.seconds, share) * 1e3 for share in (50, 95, 99)},
            **{f"effect_p{share}_ms": percentile(delays, share) * 1e3 for share in (50, 99)},
            **self._raw_latency(),
        }

    def _raw_latency(self) -> dict[str, float]:
        seconds, pause = [], threading.Event()
        with connect(self.server.url) as client, reading(raw_read, self.server.url, "raw", self.sizes.paced) as done:
            for _ in range(self.sizes.paced):
                begun = time.perf_counter()
                client.xadd("raw", {"e": time.monotonic_ns().to_bytes(8, "big") + bytes(280)})
                seconds.append(time.perf_counter() - begun)
                pause.wait(0.005)
            _, delays = done.get(timeout=_WAIT_SECONDS)
        return {
            "raw_publish_p99_ms": percentile(seconds, 99) * 1e3,
            "raw_effect_p99_ms": percentile(delays, 99) * 1e3,
        }

    def throughput(self) -> dict[str, float]:
        ours = self._through(PACKET, packet)
        durable = self._through(REPORT, report)
        effects = self._through(REPORT, report, effects=True)
        raw = self._raw_through()
        return {
            "messages_per_s": ours,
            "durable_messages_per_s": durable,
            "effects_per_s": effects,
            "raw_messages_per_s": raw,
            "raw_redis_ratio": ours / raw,
        }

    def _through(self, kind: BusMessageType, make: Callable[[int], bytes], *, effects: bool = False) -> float:
        """Messages a second, the median of some rounds: one alone is off by a fifth on a machine with two cores."""
        return statistics.median(self._round(number, kind, make, effects=effects) for number in range(_ROUNDS))

    def _round(self, number: int, kind: BusMessageType, make: Callable[[int], bytes], *, effects: bool) -> float:
        name = f"through-{kind.name.lower()}{'-effects' if effects else ''}-{number}"
        config, count = self.config(name), self.sizes.throughput
        path = str(self.home / f"{name}.db") if effects else ""
        with reading(read_all, config.model_dump(mode="json"), "g", path, count) as done:
            sender = connect_publisher(config, name)
            begun = time.monotonic()
            for message in range(count):
                sender.publish(kind, make(message))
            ended, _ = done.get(timeout=_WAIT_SECONDS)
            sender.close()
        return count / float(ended - begun)

    def _raw_through(self) -> float:
        return statistics.median(self._raw_round(f"raw-{number}") for number in range(_ROUNDS))

    def _raw_round(self, key: str) -> float:
        count = self.sizes.throughput
        with connect(self.server.url) as client, reading(raw_read, self.server.url, key, count) as done:
            begun = time.monotonic()
            for _ in range(0, count, 256):
                pipeline = client.pipeline(transaction=False)
                for _ in range(256):
                    pipeline.xadd(key, {"e": time.monotonic_ns().to_bytes(8, "big") + bytes(280)})
                pipeline.execute()
            ended, _ = done.get(timeout=_WAIT_SECONDS)
        return count / float(ended - begun)

    def trainer(self) -> dict[str, float]:
        """A loop that computes and publishes ten messages after each step, while the bus comes and goes."""
        config, path = self.config("trainer"), self.home / "trainer.db"
        states = self._states()
        total = len(states) * self.sizes.steps * 10
        with reading(read_all, config.model_dump(mode="json"), "g", str(path), total) as done:
            sender = connect_publisher(config, "trainer")
            figures = self._train(sender, states)
            sender.flush(_WAIT_SECONDS)
            done.get(timeout=_WAIT_SECONDS)
            sender.close()
        counts = Counter(entry.payload for entry in Journal(path, sync=False).read("effects"))
        return {
            "trainer_publish_p99_ms": max(figures.values()),
            **figures,
            "lost": total - len(counts),
            "duplicated": sum(counts.values()) - len(counts),
        }

    def _train(
        self, sender: BusPublisher, states: list[tuple[str, Callable[[], object], Callable[[], object]]]
    ) -> dict[str, float]:
        torch.set_num_threads(1)  # as a training process on two cores has it
        weights = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
        sent, figures = 0, {}
        for state, begin, end in states:
            begin()
            calls = []
            for _ in range(self.sizes.steps):
                for _ in range(_PRODUCTS):
                    weights = torch.tanh(weights @ weights)
                for _ in range(10):
                    payload = report(sent)
                    begun = time.perf_counter()
                    sender.publish(REPORT, payload)
                    calls.append(time.perf_counter() - begun)
                    sent += 1
            figures[f"trainer_publish_{state}_p99_ms"] = percentile(calls, 99) * 1e3
            end()
        return figures

    def _states(self) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
        def nothing() -> None:
            return

        def signalled(number: int) -> Callable[[], object]:
            return lambda: os.kill(self.server.pid or 0, number)

        return [
            ("there", nothing, nothing),
            ("frozen", signalled(signal.SIGSTOP), signalled(signal.SIGCONT)),
            ("full", lambda: self._set_memory("1"), lambda: self._set_memory("0")),
            ("stopped", self.server.stop, self.server.start),
        ]

    def _set_memory(self, limit: str) -> None:
        with connect(self.server.url) as client:
            client.config_set("maxmemory", limit)

    def recovery(self) -> dict[str, float]:
        config, count = self.config("recovery"), self.sizes.queue
        connect_consumer(config, "g", STREAMS, lambda _: None).poll()
        sender = connect_publisher(config, "recovery")
        for number in range(count):
            sender.publish(PACKET, packet(number))
        if not sender.flush(_WAIT_SECONDS):
            raise RuntimeError("the queue could not be filled")
        sender.close()
        effect = Count()
        reader = connect_consumer(config, "g", STREAMS, effect)
        begun = time.monotonic()
        while effect.count < count:
            reader.poll(block_ms=200)
        seconds = time.monotonic() - begun
        reader.stop()
        return {"recovery_messages": count, "recovery_s": seconds}

    def memory(self) -> dict[str, float]:
        config = self.config("memory", redis_url="redis://127.0.0.1:1/0", buffer=20_000)
        sender = connect_publisher(config, "memory")
        before = psutil.Process().memory_info().rss
        for number in range(100_000):
            sender.publish(PACKET, packet(number))
        grown = psutil.Process().memory_info().rss - before
        dropped = sender.counters["dropped.buffer_full"]
        sender.close(timeout=0.1)
        return {"memory_mb": grown / 2**20, "memory_dropped": dropped}

    def backpressure(self) -> dict[str, float]:
        """Nobody reads, telemetry comes in; then an emergency, and a reader that comes back."""
        config = self.config("pressure", max_depth=4000, resume_depth=1000, buffer=20_000)
        arrived: dict[bytes, float] = {}

        def handle(envelope: EventEnvelope) -> None:
            if envelope.type is SIGNAL:
                arrived[envelope.payload] = time.monotonic()

        reader = connect_consumer(config, "g", STREAMS, handle)
        reader.poll()
        sender, keeper = connect_publisher(config, "pressure"), connect_keeper(config)
        began = self._fill_until_shed(sender, keeper)
        first = {name for name in sender.counters if name.startswith("shed.")}
        while "shed.telemetry" not in sender.counters:
            self._send(sender, 100)
            keeper.round()
        begun = time.monotonic()
        sender.publish(SIGNAL, b"halt")
        reader.start()
        while b"halt" not in arrived and time.monotonic() < begun + _WAIT_SECONDS:
            threading.Event().wait(0.001)
        while (depth := keeper.round().streams[TELEMETRY].depth) >= 1000:
            threading.Event().wait(0.01)
        # A sender learns of the depth with its next answer, which the report of what it shed brings within a second.
        until, resumed = time.monotonic() + 5.0, False
        while not resumed and time.monotonic() < until:
            shed = sender.counters["shed.low_priority"]
            self._send(sender, 10)
            resumed = sender.counters["shed.low_priority"] == shed
            threading.Event().wait(0.1)
        reader.stop()
        sender.close()
        return {
            "shedding_began_at": began,
            "shed_low_first": int(first == {"shed.low_priority"}),
            "emergency_ms": (arrived.get(b"halt", float("inf")) - begun) * 1e3,
            "resumed_below": depth if resumed else float("inf"),
        }

    def _fill_until_shed(self, sender: BusPublisher, keeper: Any) -> int:
        depth = 0
        while not any(name.startswith("shed.") for name in sender.counters):
            depth = keeper.round().streams[TELEMETRY].depth
            self._send(sender, 100)
        return depth

    @staticmethod
    def _send(sender: BusPublisher, count: int) -> None:
        for number in range(count):
            priority = MessagePriority.LOW if number % 2 else MessagePriority.NORMAL
            sender.publish(PACKET, packet(number), priority=priority)
        sender.flush(_WAIT_SECONDS)


def measure(sizes: Sizes) -> dict[str, Any]:
    """All of it, on a server of its own."""
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home), sizes)
        figures: dict[str, Any] = {}
        try:
            with connect(bench.server.url) as client:
                figures["redis"] = str(client.info("server")["redis_version"])
            for part in (
                bench.latency,
                bench.throughput,
                bench.trainer,
                bench.recovery,
                bench.memory,
                bench.backpressure,
            ):
                begun = time.monotonic()
                figures |= part()
                common.console.print(f"{part.__name__} measured in {time.monotonic() - begun:.0f} s", style="dim")
        finally:
            bench.server.stop()
        return figures


def main() -> None:
    options = common.parser(__doc__).parse_args()
    common.run("bus", BARS, lambda: measure(QUICK if options.quick else FULL), options.json)


if __name__ == "__main__":
    main()
