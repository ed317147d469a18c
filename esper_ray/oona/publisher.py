"""The sending side. ``publish`` appends to a buffer in memory; one thread signs and sends.

What is durable reaches the bus or the spool on disk, and stays on disk at its sender until all readers have
acknowledged it. Telemetry waits in the bounded buffer while the bus is away, and what does not fit is dropped and
counted. A message may arrive twice; its event id stays the same.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from esper_ray.config import BusConfig
from esper_ray.contracts import refusals
from esper_ray.contracts.enums import BusMessageType, CircuitBreakerState, MessagePriority
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.signing import Signer
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.errors import ContractError
from esper_ray.oona.outbox import Outbox
from esper_ray.oona.shedding import Shedder
from esper_ray.oona.spool import Sealed, Spool
from esper_ray.oona.streams import EMERGENCY, KINDS, is_durable, route, ttl_ms
from esper_ray.oona.transport import Transport
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import new_event_id

log = logging.getLogger(__name__)

_BATCH = 256
_GATHER_SECONDS = 0.0005
_IDLE_SECONDS = 1.0
_PARTING_SECONDS = 0.5
_REPORT_SECONDS = 1.0
# How long Python lets a thread compute while another one waits. With its own 5 ms the sender would stand in line that
# long after each answer of Redis, behind a loop that publishes, and the loop behind a sender that signs.
_SWITCH_SECONDS = 0.0005


@dataclass(frozen=True, slots=True)
class _Message:
    type: BusMessageType
    payload: bytes
    priority: MessagePriority
    event_id: bytes
    stream: str


class BusPublisher:
    """Implements `contracts.ports.Publisher`; safe for all threads of one process.

    Args:
        transport: what carries the bus; may be unreachable now.
        spool: where durable messages wait meanwhile; owned by this publisher from here on.
    """

    def __init__(
        self,
        transport: Transport,
        signer: Signer,
        spool: Spool,
        *,
        source: str,
        settings: BusConfig,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._signer, self._source, self._clock = signer, source, clock
        self._limit = settings.buffer
        self._urgent: deque[_Message] = deque()
        self._durable: deque[_Message] = deque()
        self._ordinary: deque[_Message] = deque()
        self._shedder = Shedder(settings.max_depth, settings.resume_depth)
        self._breaker = Breaker(
            f"publish.{source}",
            failures=settings.breaker_failures,
            open_seconds=settings.breaker_seconds,
            clock=clock,
            on_change=self._breaker_changed,
        )
        self._counters: Counter[str] = Counter()
        self._settled, self._busy = threading.Condition(), True
        self._outbox = Outbox(
            transport, spool, self._breaker, clock=clock, counters=self._counters, on_written=self._tell_waiting
        )
        self._reported: Counter[str] = Counter()
        self._reported_at = clock.monotonic()
        self._breaker_points: deque[MetricPoint] = deque(maxlen=16)
        # A bell that is rung without a lock, so that nobody who publishes waits for a sender that was put off the
        # processor while it held one. What rings is told from what has rung by ``_rung``.
        self._bell, self._rung, self._stop = SimpleQueue[None](), False, threading.Event()
        self._taken = 0
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._run, name=f"oona-publish-{source}", daemon=True)
        self._thread.start()

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.NORMAL,
        event_id: bytes | None = None,
    ) -> None:
        """Hand a message over and return at once; what becomes of it shows in `counters`."""
        stream = route(type, priority)
        durable = is_durable(type, priority)
        lane = self._urgent if stream == EMERGENCY else self._durable if durable else self._ordinary
        if self._stop.is_set():
            self._counters["dropped.closed"] += 1
            return
        if len(lane) >= self._limit:
            self._counters["dropped.buffer_full"] += 1
            return
        lane.append(_Message(type, payload, priority, event_id or new_event_id(), stream))
        self._ring()

    def flush(self, timeout: float) -> bool:
        """Wait until all that was published is on the bus, and on disk where it must not be lost.

        Returns False when it is not within ``timeout`` seconds.
        """
        self._ring()
        with self._settled:
            return self._settled.wait_for(
                lambda: not self._busy and not self._waiting() and self._outbox.written(), timeout
            )

    def close(self, timeout: float = 2.0) -> None:
        """Send what is left within ``timeout`` seconds, spool what is durable of the rest, and end."""
        if not self._stop.is_set():
            self.flush(timeout)
            self._stop.set()
            self._ring()
        self._thread.join(timeout + 5.0)

    @property
    def counters(self) -> Mapping[str, int]:
        """published, settled, spooled, replayed, adopted, sent_again, failures, and dropped.* and shed.* by reason.

        ``settled`` are those that had to reach their readers, and that all of them have acknowledged.
        """
        return dict(self._counters)

    @property
    def unsettled(self) -> int:
        """How many messages are on the bus and not known to be acknowledged by all their readers."""
        return self._outbox.unsettled

    @property
    def breaker(self) -> CircuitBreakerState:
        return self._breaker.state

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.put(None)

    def _waiting(self) -> int:
        return len(self._urgent) + len(self._durable) + len(self._ordinary) + self._outbox.owed

    def _run(self) -> None:
        self._guarded(self._outbox.adopt)
        while not self._stop.is_set():
            self._guarded(self._cycle)
            self._report()
            self._busy = False
            self._tell_waiting()
            self._pause()
        self._guarded(self._leave)

    def _tell_waiting(self) -> None:
        with self._settled:
            self._settled.notify_all()

    def _guarded(self, step: object) -> None:
        """The thread outlives any single fault: what it cannot do is logged and counted."""
        assert callable(step)
        try:
            step()
        except Exception:
            self._counters["dropped.fault"] += 1
            log.exception("the sender of %s met a fault and goes on", self._source)

    def _pause(self) -> None:
        pause = _IDLE_SECONDS
        if self._outbox.unsettled:
            pause = min(pause, self._outbox.seconds_to_next_look())
        if self._waiting():
            pause = min(pause, self._outbox.seconds_to_next_try() or 0.0)
            if self._breaker.state is CircuitBreakerState.OPEN:
                pause = 0.1
        with contextlib.suppress(Empty):
            self._bell.get(timeout=pause) if pause else self._bell.get_nowait()
        # One message alone goes at once; where others came with the last one, more are about to come.
        if self._taken > 1 and not self._urgent and len(self._durable) + len(self._ordinary) < _BATCH:
            time.sleep(_GATHER_SECONDS)
        self._rung, self._taken, self._busy = False, 0, True

    def _cycle(self) -> None:
        self._send_urgent()
        # All of them before anything is tried again: what is owed must not wait in memory for a slow answer.
        for _ in range(0, len(self._durable), _BATCH):
            self._outbox.send_durable(self._seal(self._take(self._durable)))
            self._send_urgent()
        if self._outbox.owed and not self._outbox.replay():
            return
        self._shedder.update(self._outbox.depths)
        if ordinary := self._admitted(self._take(self._ordinary)):
            sealed = self._seal(ordinary)
            if sealed and not self._outbox.send_ordinary(sealed):
                self._take_back(ordinary)
        self._outbox.settle()

    def _send_urgent(self) -> None:
        if urgent := self._take(self._urgent):
            self._outbox.send_urgent(self._seal(urgent))

    def _leave(self) -> None:
        """Whatever could not be sent until now waits on disk for the next sender of this source."""
        for lane in (self._urgent, self._durable, self._ordinary):
            while batch := self._take(lane):
                self._outbox.keep(self._seal(batch))
        self._outbox.part(_PARTING_SECONDS)
        self._outbox.close()

    def _take(self, lane: deque[_Message]) -> list[_Message]:
        taken = [lane.popleft() for _ in range(min(_BATCH, len(lane)))]
        self._taken += len(taken)
        return taken

    def _take_back(self, messages: list[_Message]) -> None:
        """What could not be sent goes first again. Others came meanwhile: the latest go where there are too many."""
        self._ordinary.extendleft(reversed(messages))
        for _ in range(len(self._ordinary) - self._limit):
            self._ordinary.pop()
            self._counters["dropped.buffer_full"] += 1

    def _admitted(self, messages: list[_Message]) -> list[_Message]:
        admitted = []
        for message in messages:
            reason = self._shedder.reason(message.stream, message.type, message.priority)
            if reason is None:
                admitted.append(message)
            else:
                self._counters[f"shed.{reason}"] += 1
        return admitted

    def _seal(self, messages: list[_Message]) -> list[Sealed]:
        sealed = []
        for message in messages:
            try:
                data = self._signer.seal(
                    message.payload,
                    message.type,
                    payload_type=KINDS[message.type].payload_type,
                    priority=message.priority,
                    event_id=message.event_id,
                    ttl_ms=ttl_ms(message.type, message.priority),
                )
            except ContractError as error:
                self._counters[f"dropped.{error.reason}"] += 1
                log.error("a message of %s cannot be sent: %s", self._source, error)
            else:
                sealed.append(Sealed(message.stream, message.event_id, data))
        return sealed

    def _breaker_changed(self, name: str, state: CircuitBreakerState) -> None:
        self._breaker_points.append(MetricPoint("ob", float(state), {"breaker": name}))
        log.info("breaker %s is now %s", name, state.name)

    def _report(self) -> None:
        """Tell Nissa what this sender had to do, at most once per second and only when there is something to tell."""
        now = self._clock.monotonic()
        if now - self._reported_at < _REPORT_SECONDS or self._breaker.state is not CircuitBreakerState.CLOSED:
            return
        counts = Counter(self._counters)
        points = [*self._breaker_points, *refusals.take()]
        for name, count in (counts - self._reported).items():
            family, _, reason = name.partition(".")
            if family in _REPORTED:
                points.append(MetricPoint(_REPORTED[family], float(count), {"reason": reason} if reason else {}))
        self._breaker_points.clear()
        self._reported, self._reported_at = counts, now
        publish_telemetry(_Important(self), self._source, "", 0, points)


_REPORTED = {"spooled": "op", "replayed": "oy", "dropped": "ox", "shed": "os"}


class _Important:
    """What a sender says about itself is not shed with the rest."""

    def __init__(self, publisher: BusPublisher) -> None:
        self._publisher = publisher

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.HIGH,
        event_id: bytes | None = None,
    ) -> None:
        self._publisher.publish(type, payload, priority=max(priority, MessagePriority.HIGH), event_id=event_id)
