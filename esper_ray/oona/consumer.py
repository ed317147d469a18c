"""The receiving side: read, verify, hand over, acknowledge after the effect.

Delivery is at least once. A message whose handler failed, or whose reader died, is handed out again; after
``max_deliveries`` it goes to the dead letters with the reason.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence

from esper_ray.config import Config
from esper_ray.contracts.enums import CircuitBreakerState
from esper_ray.contracts.messages import EventEnvelope, MetricPoint
from esper_ray.contracts.signing import Verifier
from esper_ray.errors import ContractError
from esper_ray.oona.streams import EMERGENCY, in_reading_order
from esper_ray.oona.transport import BusAway, Delivery, Transport
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

Handler = Callable[[EventEnvelope], None]
Tell = Callable[[Sequence[MetricPoint]], None]

_BATCH = 256
_BLOCK_MS = 500
_RETRY_SECONDS = 0.2
_REPORT_SECONDS = 1.0
# While other messages are worked on, an emergency waits no longer than this and the one in hand.
_LOOK_SECONDS = 0.02


class Consumer:
    """One reader of a consumer group.

    Args:
        group: readers of one group share the messages; each group gets all of them.
        name: unique among the group's living readers.
        streams: names of `streams`; emergencies are always read first.
        handler: has its effect, or raises; must bear the same event id twice: whoever keeps what it got writes it under
            that id, in the effect's own transaction.
        tell: is given, at most once a second, what the reader met besides messages that it handled.
        transport: what carries the bus; closed with the consumer.
    """

    def __init__(
        self,
        config: Config,
        group: str,
        name: str,
        streams: Sequence[str],
        handler: Handler,
        *,
        transport: Transport,
        verifier: Verifier,
        tell: Tell = lambda _: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._settings, self._group, self._name, self._handler = config.bus, group, name, handler
        self._streams = in_reading_order(tuple(streams))
        self._transport, self._verifier, self._clock = transport, verifier, clock
        self._breaker = Breaker(
            f"consume.{group}",
            failures=self._settings.breaker_failures,
            open_seconds=self._settings.breaker_seconds,
            clock=clock,
            on_change=self._breaker_changed,
        )
        self._recent = _Recent()
        self._tell, self._told = tell, Counter[str]()
        self._told_at = float("-inf")
        self._breaker_points: list[MetricPoint] = []
        self._claimed_at = self._looked_at = float("-inf")
        self._ready = False
        self._counters: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Read in a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self._run, name=f"oona-consume-{self._group}", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)
        self._transport.close()

    @property
    def counters(self) -> Mapping[str, int]:
        """handled, duplicates, failed, redelivered, expired, interruptions, faults, and buried.* by reason."""
        return dict(self._counters)

    def connected(self) -> bool:
        """Whether it runs and its last round reached the bus."""
        return self._ready and self._thread is not None and self._thread.is_alive()

    def poll(self, *, block_ms: int = 0) -> int:
        """One round: emergencies, then what a dead reader left, then the rest. Returns how many were settled.

        Raises:
            BusAway: nothing is lost; what was not acknowledged comes again.
        """
        if not self._ready:
            self._transport.ensure_group(self._group, self._streams)
            self._ready = True
        settled = self._settle_emergencies()
        settled += self._settle_all(self._claim())
        return settled + self._settle_all(self._read(self._streams, block_ms=0 if settled else block_ms))

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._breaker.allow():
                self._stop.wait(_RETRY_SECONDS)
                continue
            try:
                self._report()
                self.poll(block_ms=_BLOCK_MS)
            except BusAway as error:
                self._counters["interruptions"] += 1
                self._breaker.failure()
                self._ready = False
                log.debug("reading failed: %s", error)
                self._stop.wait(_RETRY_SECONDS)
            except Exception:
                self._counters["faults"] += 1
                self._breaker.failure()
                log.exception("the reader of %s met a fault and goes on", self._group)
                self._stop.wait(_RETRY_SECONDS)
            else:
                self._breaker.success()

    def _report(self) -> None:
        now = self._clock.monotonic()
        if now - self._told_at < _REPORT_SECONDS:
            return
        met = self._counters - self._told
        points, self._breaker_points = self._breaker_points, []
        for outcome in {name.partition(".")[0] for name in met} - {"handled"}:
            count = sum(met[name] for name in met if name.partition(".")[0] == outcome)
            points.append(MetricPoint("or", float(count), {"group": self._group, "outcome": outcome}))
        self._told, self._told_at = self._counters.copy(), now
        if points:
            self._tell(points)

    def _breaker_changed(self, name: str, state: CircuitBreakerState) -> None:
        self._breaker_points.append(MetricPoint("ob", float(state), {"breaker": name}))

    def _read(self, streams: Sequence[str], *, block_ms: int = 0) -> list[Delivery]:
        if not streams:
            return []
        return self._transport.read(self._group, self._name, streams, count=_BATCH, block_ms=block_ms)

    def _claim(self) -> list[Delivery]:
        now = self._clock.monotonic()
        if now - self._claimed_at < self._settings.claim_seconds / 2:
            return []
        self._claimed_at = now
        idle_ms = round(self._settings.claim_seconds * 1000)
        taken = [
            delivery
            for stream in self._streams
            for delivery in self._transport.claim(self._group, self._name, stream, idle_ms=idle_ms, count=_BATCH)
        ]
        self._counters["redelivered"] += len(taken)
        return taken

    def _settle_emergencies(self) -> int:
        self._looked_at = self._clock.monotonic()
        return self._settle_all(self._read([name for name in self._streams if name == EMERGENCY]))

    def _settle_all(self, deliveries: Sequence[Delivery]) -> int:
        done: dict[str, list[str]] = {}
        try:
            for delivery in deliveries:
                if delivery.stream != EMERGENCY and self._clock.monotonic() - self._looked_at > _LOOK_SECONDS:
                    self._settle_emergencies()
                if self._settle(delivery):
                    done.setdefault(delivery.stream, []).append(delivery.id)
        finally:
            for stream, ids in done.items():
                self._transport.ack(self._group, stream, ids)
        return len(deliveries)

    def _settle(self, delivery: Delivery) -> bool:
        """True when the message is to be acknowledged: its effect is there, or it needs none."""
        if delivery.count > self._settings.max_deliveries:
            self._bury(delivery, "too_many_deliveries", f"handed out {delivery.count} times, its readers died")
            return False
        try:
            envelope = self._verifier.open(delivery.data)
        except ContractError as error:
            self._bury(delivery, error.reason, error.what)
            return False
        if envelope.event_id in self._recent:
            self._counters["duplicates"] += 1
            return True
        if envelope.ttl_ms and self._clock.now_ns() > envelope.created_at_ns + envelope.ttl_ms * 1_000_000:
            self._counters["expired"] += 1
            return True
        return self._hand_over(delivery, envelope)

    def _hand_over(self, delivery: Delivery, envelope: EventEnvelope) -> bool:
        try:
            self._handler(envelope)
        except ContractError as error:
            # No repetition makes it a valid message.
            self._bury(delivery, error.reason, error.what)
            return False
        except Exception as error:
            # One message must not stop the reader: it is tried again, and put aside when it keeps failing.
            self._counters["failed"] += 1
            log.warning("handling %s of %s failed: %r", envelope.type.name, envelope.source, error)
            if delivery.count >= self._settings.max_deliveries:
                self._bury(delivery, "handler_failed", f"{type(error).__name__}: {error}")
            return False
        self._recent.add(envelope.event_id)
        self._counters["handled"] += 1
        return True

    def _bury(self, delivery: Delivery, reason: str, detail: str) -> None:
        self._counters[f"buried.{reason}"] += 1
        log.warning("a message of %s goes to the dead letters: %s (%s)", delivery.stream, reason, detail)
        self._transport.bury(self._group, delivery, f"{reason}: {detail}")


class _Recent:
    """The event ids handled last: spares the handler most repetitions, never a guarantee."""

    def __init__(self, size: int = 20_000) -> None:
        self._size, self._ids = size, OrderedDict[bytes, None]()

    def __contains__(self, event_id: bytes) -> bool:
        return event_id in self._ids

    def add(self, event_id: bytes) -> None:
        self._ids[event_id] = None
        if len(self._ids) > self._size:
            self._ids.popitem(last=False)
