"""How one sender's thread gets sealed messages out: over the bus, or into the spool and out again in order."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from esper_ray.errors import EnvironmentFault
from esper_ray.oona.spool import Sealed, Spool
from esper_ray.oona.transport import BusAway, Transport
from esper_ray.reliability.breaker import Breaker
from esper_ray.reliability.clock import Clock

log = logging.getLogger(__name__)

_FIRST_WAIT, _LAST_WAIT = 0.05, 1.0
# Redis may lose the last second (appendfsync everysec); what is younger is sent again after an interruption.
_DOUBTFUL_SECONDS = 2.0


class Outbox:
    """Used by the sender's one thread. ``depths`` is what the keeper last announced."""

    def __init__(
        self, transport: Transport, spool: Spool, breaker: Breaker, *, clock: Clock, counters: Counter[str]
    ) -> None:
        self._transport, self._spool, self._breaker = transport, spool, breaker
        self._clock, self._counters = clock, counters
        self._doubtful: deque[tuple[float, Sealed]] = deque()
        self._retry_at, self._retry_wait = 0.0, _FIRST_WAIT
        self.depths: Mapping[str, int] = {}

    @property
    def owed(self) -> int:
        """How many messages wait in the spool."""
        return self._spool.count

    def send_urgent(self, messages: Sequence[Sealed]) -> None:
        """At once, whatever the breaker says: an emergency is worth a try."""
        if not self._append(messages):
            self._keep(messages)

    def send_durable(self, messages: Sequence[Sealed]) -> None:
        """Behind what is spooled already, so that the order stays."""
        if self._spool.count or not self._may_try() or not self._append(messages):
            self._keep(messages)

    def send_ordinary(self, messages: Sequence[Sealed]) -> bool:
        """False when they could not be sent and stay with the caller."""
        return not self._spool.count and self._may_try() and self._append(messages)

    def replay(self, batch: int) -> bool:
        """Send the oldest spooled messages; False when that failed or is not due yet."""
        if not self._may_try():
            return False
        owed = self._spool.head(batch)
        if not self._append([item.message for item in owed]):
            return False
        self._spool.remove(owed)
        self._counters["replayed"] += len(owed)
        return True

    def adopt(self) -> None:
        """Take over what dead senders of this source still owe."""
        taken = self._spool.adopt()
        if taken:
            self._counters["adopted"] += taken
            log.info("took over %d messages that an earlier sender could not deliver", taken)

    def keep(self, messages: Sequence[Sealed]) -> None:
        """To the spool, to be replayed later, by a successor if need be."""
        self._keep(messages)

    def seconds_to_next_try(self) -> float:
        return max(0.0, self._retry_at - self._clock.monotonic())

    def close(self) -> None:
        self._spool.close()
        self._transport.close()

    def _may_try(self) -> bool:
        return self._clock.monotonic() >= self._retry_at and self._breaker.allow()

    def _append(self, messages: Sequence[Sealed]) -> bool:
        try:
            self.depths = self._transport.append([(message.stream, message.data) for message in messages])
        except BusAway as error:
            self._failed(error)
            return False
        self._breaker.success()
        self._retry_wait = _FIRST_WAIT
        self._counters["published"] += len(messages)
        now = self._clock.monotonic()
        self._doubtful.extend((now, message) for message in messages)
        while self._doubtful and self._doubtful[0][0] < now - _DOUBTFUL_SECONDS:
            self._doubtful.popleft()
        return True

    def _failed(self, error: BusAway) -> None:
        self._counters["failures"] += 1
        self._breaker.failure()
        self._retry_at = self._clock.monotonic() + self._retry_wait
        self._retry_wait = min(self._retry_wait * 2, _LAST_WAIT)
        log.debug("sending failed: %s", error)
        if self._doubtful:
            self._counters["sent_again"] += len(self._doubtful)
            self._keep([message for _, message in self._doubtful])
            self._doubtful.clear()

    def _keep(self, messages: Sequence[Sealed]) -> None:
        try:
            self._spool.add(messages)
        except (EnvironmentFault, sqlite3.Error) as error:
            self._counters["dropped.spool_failed"] += len(messages)
            log.error("%d messages are lost, they could be neither sent nor spooled: %s", len(messages), error)
        else:
            self._counters["spooled"] += len(messages)
