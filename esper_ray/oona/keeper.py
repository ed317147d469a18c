"""Looks after the streams: trims what is settled, measures what is owed, tells senders and Nissa."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from esper_ray.config import BusConfig
from esper_ray.contracts.messages import MetricPoint
from esper_ray.oona.streams import STREAMS
from esper_ray.oona.transport import DeadLetter, StreamState, Transport

_ANNOUNCED_SECONDS = 15

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BusReport:
    """The state of all streams after one round of the keeper."""

    streams: dict[str, StreamState]
    trimmed: int
    dropped: dict[str, int]

    def points(self) -> list[MetricPoint]:
        """The gauges."""
        found = []
        for name, state in self.streams.items():
            found.append(MetricPoint("od", float(state.depth), {"stream": name}))
            found.append(MetricPoint("oq", float(state.dead), {"stream": name}))
        waits: dict[str, float] = {}
        for state in self.streams.values():
            for group, owed in state.groups.items():
                waits[group] = max(waits.get(group, 0.0), owed.oldest_seconds)
        return found + [MetricPoint("ol", float(round(waited)), {"group": group}) for group, waited in waits.items()]

    def dropped_points(self) -> list[MetricPoint]:
        """The counter of dead letters that had to go in this round."""
        return [MetricPoint("oz", float(count), {"stream": name}) for name, count in self.dropped.items() if count]


class Keeper:
    """One per bus; its rounds may be repeated or missed without harm."""

    def __init__(self, transport: Transport, settings: BusConfig) -> None:
        self._transport, self._settings = transport, settings

    def round(self) -> BusReport:
        """Trim, measure, announce.

        Raises:
            BusAway: the bus cannot be reached.
        """
        trimmed = sum(self._transport.trim(stream, keep=self._settings.max_depth) for stream in STREAMS)
        dropped = {stream: self._drop_oldest(stream) for stream in STREAMS}
        streams = {stream: self._transport.state(stream) for stream in STREAMS}
        depths = {stream: state.depth for stream, state in streams.items()}
        self._transport.announce(depths, seconds=_ANNOUNCED_SECONDS)
        return BusReport(streams, trimmed, dropped)

    def _drop_oldest(self, stream: str) -> int:
        dropped = self._transport.trim_dead(stream, keep=self._settings.dead_letters)
        if dropped:
            log.error("%d dead letters of %s are lost: more than bus.dead_letters were kept", dropped, stream)
        return dropped

    def dead_letters(self, stream: str, *, count: int = 100) -> list[DeadLetter]:
        """The oldest dead letters of a stream."""
        return self._transport.dead_letters(stream, count=count)
