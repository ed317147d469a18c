"""Telemetry leaves a room in packets that fit the wire, and says what it had to leave out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.contracts import codec
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.enums import BusMessageType, MessagePriority, TelemetryLevel
from esper_ray.contracts.messages import MetricPoint, TelemetryEvent
from esper_ray.contracts.telemetry import (
    _event_size,
    _head_size,
    _point_size,
    event,
    publish_telemetry,
    split_telemetry,
)

texts = st.text(max_size=400)
events = st.builds(
    TelemetryEvent,
    st.sampled_from(["gate", "decision"]),
    st.sampled_from(list(TelemetryLevel)),
    texts,
    st.dictionaries(st.text(min_size=1, max_size=20), texts, max_size=30),
)


@given(st.lists(events, max_size=4), st.integers(0, 60), st.integers(0, 100_000))
def test_every_packet_fits_and_nothing_but_long_texts_is_lost(
    items: list[TelemetryEvent], count: int, epoch: int
) -> None:
    points = [MetricPoint("gp", float(n), {"gate": "G1_GRADIENT_HEALTH"}) for n in range(count)]
    packets = split_telemetry("tolaria", "glyphs-3fa9c2", epoch, points, items)
    wire = [codec.encode_telemetry(packet) for packet in packets]
    assert all(len(data) <= CONTROL_MESSAGE_BYTES for data in wire)
    back = [codec.decode_telemetry(data) for data in wire]
    sent = [point for packet in back for point in packet.metrics if point.key == "gp"]
    assert [point.value for point in sent] == [point.value for point in points]
    kinds = [(item.kind, item.level) for packet in back for item in packet.events]
    assert kinds == [(item.kind, item.level) for item in items]


@given(events)
def test_the_estimate_is_never_too_small_and_hardly_too_large(item: TelemetryEvent) -> None:
    (packet,) = split_telemetry("s", "r", 300, [MetricPoint("tl", 1.0)])
    empty = codec.encode_telemetry(packet)
    assert len(empty) == _head_size(packet) + _point_size(packet.metrics[0])
    packets = split_telemetry("s", "r", 300, (), [item])
    with_event = next(packet for packet in packets if packet.events)
    points = sum(_point_size(point) for point in with_event.metrics)
    size = _head_size(with_event) + points + _event_size(with_event.events[0])
    left_out_when_empty = 8
    assert size - left_out_when_empty <= len(codec.encode_telemetry(with_event)) <= size


def test_a_long_rationale_is_cut_with_a_mark_and_counted() -> None:
    items = [event("decision", {"epoch": 3, "why": "plateau " * 100, "missed": False})]
    packets = split_telemetry("tamiyo", "glyphs-1", 3, (), items)
    (sent,) = [item for packet in packets for item in packet.events]
    assert sent.attributes["why"].startswith("plateau plateau")
    assert sent.attributes["why"].endswith("…")
    assert sent.attributes["missed"] == "false"
    assert [(point.key, point.value) for packet in packets for point in packet.metrics] == [("tt", 1.0)]


def test_a_loss_that_is_not_finite_is_counted_instead_of_stopping_the_sender() -> None:
    (packet,) = split_telemetry("tolaria", "r", 1, [MetricPoint("tl", float("nan")), MetricPoint("vl", 2.0)])
    assert {point.key: point.value for point in packet.metrics} == {"vl": 2.0, "tn": 1.0}


def test_an_unregistered_metric_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="zz"):
        split_telemetry("tolaria", "r", 1, [MetricPoint("zz", 1.0)])


def test_an_error_travels_with_high_priority() -> None:
    sent: list[tuple[BusMessageType, MessagePriority]] = []

    class Recorder:
        def publish(
            self,
            type: BusMessageType,
            payload: bytes,
            *,
            priority: MessagePriority = MessagePriority.NORMAL,
            event_id: bytes | None = None,
        ) -> None:
            assert payload
            assert event_id is None
            sent.append((type, priority))

    count = publish_telemetry(
        Recorder(), "kasmina", "r", 1, (), [event("isolation.violation", {"seed": 1}, level=TelemetryLevel.ERROR)]
    )
    assert count == 1
    assert sent == [(BusMessageType.TELEMETRY, MessagePriority.HIGH)]
    publish_telemetry(Recorder(), "kasmina", "r", 1)
    assert len(sent) == 1
