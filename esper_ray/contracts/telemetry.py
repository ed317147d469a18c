"""How telemetry leaves a room: points and events, split into packets that keep the size limit of the wire.

The kinds of events that Nissa understands, and the attributes each has (all of them text):

| kind | attributes |
|---|---|
| ``run.started`` | task, dataset, arm, epochs, parameters, mode |
| ``run.finished`` | test_accuracy, status |
| ``seed.stage`` | seed, slot, blueprint, from, to, reason |
| ``gate`` | seed, gate, passed, from, to, reason, then the figures of the evidence |
| ``decision`` | epoch, slot, operation, blueprint, why, controller, missed |
| ``graft`` | seed, slot, step, ms |
| ``refusal`` | slot, seed, operation, reason |
| ``isolation.violation`` | seed, slot, step, diagnosis; where the pass was compared, cosine, difference and ratio |
| ``rollback`` | branch, from_epoch, from_step, to, how, origin, reason, prepare, commit, confirm, told |
| ``checkpoint.lost`` | branch, step, reason |
| ``artifact.withdrawn`` | kernel, kind, reason |
| ``rate.outside`` | seed, step, found, expected, times |
| ``backend`` | name, value |
| ``risk`` | level, before, signal, score, why |
| ``policy.refused`` | policy, reason |
| ``policy.validated`` | policy, verdict, difference, low, high |
| ``school`` | run, algo, env, steps, of, state |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from esper_ray.contracts import codec
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.enums import BusMessageType, MessagePriority, TelemetryLevel
from esper_ray.contracts.messages import MetricPoint, TelemetryEvent, TelemetryPacket
from esper_ray.contracts.metrics import BY_KEY
from esper_ray.contracts.ports import Publisher
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.reliability.ids import new_event_id

EVENT_KINDS = (
    "run.started",
    "run.finished",
    "seed.stage",
    "gate",
    "decision",
    "graft",
    "refusal",
    "isolation.violation",
    "rate.outside",
    "rollback",
    "checkpoint.lost",
    "artifact.withdrawn",
    "backend",
    "risk",
    "policy.refused",
    "policy.validated",
    "school",
)
TRUNCATED = "tt"
NOT_FINITE = "tn"
_SHORTEST = 12


def event(
    kind: str,
    attributes: Mapping[str, object],
    *,
    message: str = "",
    level: TelemetryLevel = TelemetryLevel.INFO,
) -> TelemetryEvent:
    """An event whose attributes are turned into text: floats with 5 digits, booleans as true and false."""
    return TelemetryEvent(kind, level, message, {key: _text(value) for key, value in attributes.items()})


def split_telemetry(
    source: str,
    run: str,
    epoch: int,
    points: Iterable[MetricPoint] = (),
    events: Iterable[TelemetryEvent] = (),
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> list[TelemetryPacket]:
    """As few packets as greedy filling gives, each within the limit, in the order given.

    An event that is too long for a packet of its own loses the tail of its longest texts, then its last attributes;
    a point that is no finite number is left out. Both are counted in the packets themselves.
    """
    head = TelemetryPacket(0, clock.now_ns(), source, run=run, epoch=epoch)
    room = CONTROL_MESSAGE_BYTES - _head_size(head)
    kept, not_finite = _finite(points)
    fitted = [fit_event(item, room) for item in events]
    for key, count in ((NOT_FINITE, not_finite), (TRUNCATED, sum(cut for _, cut in fitted))):
        if count:
            kept.append(MetricPoint(key, float(count)))
    packets = _Packets(head, room)
    for point in kept:
        packets.add(_point_size(point), point=point)
    for item, _ in fitted:
        packets.add(_event_size(item), event=item)
    return packets.finish()


def publish_telemetry(
    publisher: Publisher,
    source: str,
    run: str,
    epoch: int,
    points: Iterable[MetricPoint] = (),
    events: Iterable[TelemetryEvent] = (),
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> int:
    """Send points and events as telemetry and return the number of packets; never waits for the bus."""
    packets = split_telemetry(source, run, epoch, points, events, clock=clock)
    for packet in packets:
        urgent = packet.level >= TelemetryLevel.ERROR
        publisher.publish(
            BusMessageType.TELEMETRY,
            codec.encode_telemetry(packet),
            priority=MessagePriority.HIGH if urgent else MessagePriority.NORMAL,
        )
    return len(packets)


def fit_event(item: TelemetryEvent, room: int) -> tuple[TelemetryEvent, int]:
    """``item`` shortened to at most ``room`` bytes on the wire, and how many of its texts were cut or left out."""
    cut: set[str] = set()
    message, attributes = item.message, dict(item.attributes)
    while (over := _event_size(replace(item, message=message, attributes=attributes)) - room) > 0:
        texts = {"": message, **attributes}
        longest = max(texts, key=lambda key: len(texts[key].encode()))
        size = len(texts[longest].encode())
        if size > _SHORTEST:
            shorter = _shorten(texts[longest], max(_SHORTEST, size - over))
            if longest:
                attributes[longest] = shorter
            else:
                message = shorter
        elif attributes:
            longest = next(reversed(attributes))
            del attributes[longest]
        else:
            raise AssertionError(f"The head of a telemetry packet leaves {room} bytes, too few for any event.")
        cut.add(longest)
    return replace(item, message=message, attributes=attributes), len(cut)


class _Packets:
    """Fills one packet after the other."""

    def __init__(self, head: TelemetryPacket, room: int) -> None:
        self._head, self._room, self._left = head, room, room
        self._points: list[MetricPoint] = []
        self._events: list[TelemetryEvent] = []
        self._done: list[TelemetryPacket] = []

    def add(self, size: int, *, point: MetricPoint | None = None, event: TelemetryEvent | None = None) -> None:
        if size > self._left:
            self._close()
        self._left -= size
        if point is not None:
            self._points.append(point)
        if event is not None:
            self._events.append(event)

    def finish(self) -> list[TelemetryPacket]:
        self._close()
        return self._done

    def _close(self) -> None:
        if self._points or self._events:
            self._done.append(
                self._head._replace(
                    packet_id=int.from_bytes(new_event_id(), "big"),
                    level=max((item.level for item in self._events), default=TelemetryLevel.INFO),
                    metrics=tuple(self._points),
                    events=tuple(self._events),
                )
            )
        self._points, self._events, self._left = [], [], self._room


def _finite(points: Iterable[MetricPoint]) -> tuple[list[MetricPoint], int]:
    given = list(points)
    unknown = [point.key for point in given if point.key not in BY_KEY]
    assert not unknown, f"{unknown} are not in the table of metrics"
    kept = [point for point in given if math.isfinite(point.value)]
    return kept, len(given) - len(kept)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _shorten(text: str, size: int) -> str:
    tail = "…"
    return text.encode()[: size - len(tail.encode())].decode(errors="ignore") + tail


# Sizes on the wire, by protobuf's own rules, so that nothing has to be encoded to know whether it fits.


def _head_size(head: TelemetryPacket) -> int:
    version, numbers, level = 2, 2 * 9, 2
    return version + numbers + level + _field(head.source) + _field(head.run) + 1 + _varint(head.epoch)


def _point_size(point: MetricPoint) -> int:
    return _nested(_field(point.key) + 5 + _map_size(point.labels))


def _event_size(item: TelemetryEvent) -> int:
    return _nested(_field(item.kind) + 2 + _field(item.message) + _map_size(item.attributes))


def _map_size(pairs: Mapping[str, str]) -> int:
    return sum(_nested(_field(key) + _field(value)) for key, value in pairs.items())


def _field(text: str) -> int:
    return _nested(len(text.encode()))


def _nested(size: int) -> int:
    return 1 + _varint(size) + size


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


__all__: Sequence[str] = ("EVENT_KINDS", "event", "fit_event", "publish_telemetry", "split_telemetry")
