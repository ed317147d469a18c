"""How one sender's thread gets sealed messages out: over the bus, or into the spool and out again in order."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from esper_ray.errors import EnvironmentFault
from esper_ray.oona.ledger import Ledger, Sent
from esper_ray.oona.spool import Sealed, Spool
from esper_ray.oona.streams import STREAMS
from esper_ray.oona.transport import BusAway, Transport
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import Clock

log = logging.getLogger(__name__)

_FIRST_WAIT, _LAST_WAIT = 0.05, 1.0
_FIRST_LOOK, _LAST_LOOK = 0.5, 2.0
_REPLAYED_AT_ONCE = 512
_WRITE_SECONDS = 10.0
_MOST_HOMELESS = 10_000
# Redis may lose the last second (appendfsync everysec). Ordinary messages that are younger are sent again after an
# interruption, as far as memory goes.
_DOUBTFUL_SECONDS, _DOUBTFUL_MESSAGES = 2.0, 4096


class Outbox:
    """Used by the sender's one thread. ``depths`` is what the keeper last announced.

    Args:
        on_written: called by the ledger's thread when what was sent is on disk.
    """

    def __init__(
        self,
        transport: Transport,
        spool: Spool,
        breaker: Breaker,
        *,
        clock: Clock,
        counters: Counter[str],
        on_written: Callable[[], None],
    ) -> None:
        self._transport, self._spool, self._breaker = transport, spool, breaker
        self._ledger = Ledger(spool, on_written)
        self._clock, self._counters = clock, counters
        self._doubtful: deque[tuple[float, Sealed]] = deque(maxlen=_DOUBTFUL_MESSAGES)
        self._homeless: deque[Sealed] = deque()  # neither the bus nor the disk took them
        self._retry_at, self._retry_wait = 0.0, _FIRST_WAIT
        self._look_at, self._look_wait = 0.0, _FIRST_LOOK
        self._run = self._verified = ""
        self.depths: Mapping[str, int] = {}

    @property
    def owed(self) -> int:
        """How many messages wait in the spool, or for it."""
        return self._spool.count + len(self._homeless)

    @property
    def unsettled(self) -> int:
        """How many messages are on the bus and may still have to be sent again."""
        return self._ledger.count

    def written(self) -> bool:
        """Whether all that was sent and must not be lost is on disk as well."""
        return self._ledger.written()

    def send_urgent(self, messages: Sequence[Sealed]) -> None:
        """At once, whatever the breaker says, an emergency being worth a try; behind emergencies that wait."""
        if self._spool.urgent:
            self._keep(messages)
            self._replay(forced=True)
        else:
            self._send_or_keep(messages)

    def send_durable(self, messages: Sequence[Sealed]) -> None:
        """Behind what is spooled already, so that the order stays."""
        if self.owed or not self._may_try():
            self._keep(messages)
        else:
            self._send_or_keep(messages)

    def send_ordinary(self, messages: Sequence[Sealed]) -> bool:
        """False when they could not be sent and stay with the caller."""
        if self.owed or not self._may_try() or self._append(messages) is None:
            return False
        now = self._clock.monotonic()
        self._doubtful.extend((now, message) for message in messages)
        while self._doubtful and self._doubtful[0][0] < now - _DOUBTFUL_SECONDS:
            self._doubtful.popleft()
        return True

    def replay(self) -> bool:
        """Send the oldest spooled messages; False when that failed or is not due yet."""
        if self._homeless:
            self._keep(())
        return self._clock.monotonic() >= self._retry_at and self._replay(forced=False)

    def settle(self) -> None:
        """Forget what all readers have acknowledged; after a restart of the server, send again what it has lost."""
        if not self._ledger.count or self._clock.monotonic() < self._look_at or not self._may_try():
            return
        self._look_at = self._clock.monotonic() + self._look_wait
        try:
            settled = self._settle()
        except Exception as error:
            self._failed(error)
            return
        self._breaker.success()
        self._counters["settled"] += settled
        self._look_wait = _FIRST_LOOK if settled else min(self._look_wait * 2, _LAST_LOOK)

    def adopt(self) -> None:
        """Take over what dead senders of this source still owe."""
        taken = self._spool.adopt()
        self._ledger.count = self._spool.count_stored()
        if taken:
            self._counters["adopted"] += taken
            log.info("took over %d messages that an earlier sender could not deliver", taken)

    def keep(self, messages: Sequence[Sealed]) -> None:
        """To the spool, to be replayed later, by a successor if need be."""
        self._keep(messages)

    def seconds_to_next_try(self) -> float:
        return max(0.0, self._retry_at - self._clock.monotonic())

    def seconds_to_next_look(self) -> float:
        return max(0.0, self._look_at - self._clock.monotonic())

    def part(self, seconds: float) -> None:
        """Give the readers a moment to acknowledge, as long as they do."""
        pause, until = threading.Event(), self._clock.monotonic() + seconds
        fewest, patience = self._ledger.count, 5
        while self._ledger.count and patience and self._clock.monotonic() < until:
            pause.wait(0.02)
            self._look_at = 0.0
            self.settle()
            patience = 5 if self._ledger.count < fewest else patience - 1
            fewest = self._ledger.count

    def close(self) -> None:
        self._ledger.close()
        self._spool.close()
        self._transport.close()

    def _may_try(self) -> bool:
        return self._clock.monotonic() >= self._retry_at and self._breaker.allow()

    def _send_or_keep(self, messages: Sequence[Sealed]) -> None:
        ids = self._append(messages)
        if ids is None:
            self._keep(messages)
        else:
            self._ledger.note(self._sent(messages, ids))

    def _replay(self, *, forced: bool) -> bool:
        owed = self._spool.head(_REPLAYED_AT_ONCE)
        messages = [item.message for item in owed] or list(self._homeless)
        if not messages or not (forced or self._breaker.allow()):
            return False
        ids = self._append(messages)
        if ids is None:
            return False
        sent = self._sent(messages, ids)
        if not owed:
            self._homeless.clear()
            self._ledger.note(sent)
            return True
        try:
            self._ledger.move(sent, owed)
        except EnvironmentFault as error:
            # They are on the bus and owed still: they will be sent twice, but not at once.
            log.error("the spool cannot be written: %s", error)
            self._retry_at = self._clock.monotonic() + _LAST_WAIT
            return False
        self._counters["replayed"] += len(owed)
        return True

    def _sent(self, messages: Sequence[Sealed], ids: Sequence[str]) -> list[Sent]:
        self._look_at = min(self._look_at, self._clock.monotonic() + _FIRST_LOOK)
        return [Sent(id, self._run, message) for message, id in zip(messages, ids, strict=True)]

    def _settle(self) -> int:
        state = self._transport.settled(STREAMS)
        self._run = state.run
        if state.run != self._verified:
            if not self._verify(state.run):
                return 0
            self._verified = state.run
        return sum(self._ledger.settle(stream, floor) for stream, floor in state.floors.items())

    def _verify(self, run: str) -> bool:
        """Compare the ledger with a server in a new life: what was sent in an earlier one and is missing goes again."""
        if not self._ledger.written(_WRITE_SECONDS):
            return False
        for stream in STREAMS:
            for page in self._ledger.pages(stream):
                gone = self._transport.missing(stream, [entry.id for entry in page])
                lost = [entry for entry in page if entry.id in gone and entry.run != run]
                messages = [entry.message for entry in lost]
                ids = self._append(messages) if lost else ()
                if ids is None:
                    return False
                self._ledger.note(self._sent(messages, ids))
                self._ledger.forget([entry for entry in page if entry.id in gone])
                self._counters["sent_again"] += len(lost)
        return True

    def _append(self, messages: Sequence[Sealed]) -> Sequence[str] | None:
        """The ids on the bus, or None when it is away."""
        try:
            if not self._run:
                self._run = self._transport.settled(()).run
            appended = self._transport.append([(message.stream, message.data) for message in messages])
        except Exception as error:
            self._failed(error)
            return None
        self.depths = appended.depths
        self._breaker.success()
        self._retry_wait = _FIRST_WAIT
        self._counters["published"] += len(messages)
        return appended.ids

    def _failed(self, error: Exception) -> None:
        self._counters["failures"] += 1
        self._breaker.failure()
        self._retry_at = self._clock.monotonic() + self._retry_wait
        self._retry_wait = min(self._retry_wait * 2, _LAST_WAIT)
        self._look_at, self._look_wait, self._run = self._retry_at, _FIRST_LOOK, ""
        if isinstance(error, BusAway):
            log.debug("sending failed: %s", error)
        else:
            log.error("sending met a fault; the messages are kept", exc_info=error)
        if self._doubtful:
            self._counters["sent_again"] += len(self._doubtful)
            self._keep([message for _, message in self._doubtful])
            self._doubtful.clear()

    def _keep(self, messages: Sequence[Sealed]) -> None:
        waiting = [*self._homeless, *messages]
        try:
            self._spool.add(waiting)
        except (EnvironmentFault, sqlite3.Error) as error:
            lost = max(0, len(waiting) - _MOST_HOMELESS)
            self._homeless = deque(waiting[:_MOST_HOMELESS])
            self._counters["dropped.spool_failed"] += lost
            log.error("%d messages can be neither sent nor spooled; %d are lost: %s", len(waiting), lost, error)
            return
        self._homeless.clear()
        self._counters["spooled"] += len(waiting)
