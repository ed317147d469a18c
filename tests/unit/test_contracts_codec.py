"""Leyline's promises: what goes in comes out, limits hold, and no bytes whatever break a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.contracts import codec, enums, leyline_pb2
from esper_ray.contracts import messages as m
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.enums import SeedLifecycleStage
from esper_ray.errors import ContractError, MessageTooLarge, WrongSchema, WrongVersion

NOW = 1_790_000_000_000_000_000


def state(seeds: int = 0) -> m.SystemState:
    return m.SystemState(
        run="glyphs-3fa9c2",
        epoch=12,
        global_step=1500,
        timestamp_ns=NOW,
        training_loss=0.75,
        validation_loss=1.25,
        validation_accuracy=0.5,
        metrics={"pc": 26333.0, "lr": 0.0078125},
        hardware=m.HardwareContext("cuda", 1, 80.0, 40.0, 55.0, 0.5, "9.0"),
        seeds=tuple(
            m.SeedState(number, number % 7, 9, SeedLifecycleStage.BLENDING, 0.5, 0.25, 0.125, 2, 3, 0.5, {"ga": 0.5})
            for number in range(1, seeds + 1)
        ),
        branch=1,
    )


COMMAND = m.AdaptationCommand(
    command_id=2**63 + 1,
    type=enums.CommandType.SEED,
    run="glyphs-3fa9c2",
    epoch=12,
    issued_at_ns=NOW,
    issued_by="heuristic",
    slot=2,
    seed=5,
    deadline_ms=18.0,
    seed_directive=m.SeedDirective(enums.SeedOperation.GERMINATE, 9, {"groups": 4.0}, enums.BlendMode.CONVEX, "cosine"),
    annotations={"why": "loss falls 1%/epoch"},
    branch=1,
)
REPORT = m.FieldReport(
    1, 2, "run", 3, 4, 9, enums.FieldReportOutcome.SUCCESS, {"gain": 0.5}, 3, NOW, "h1", ("soften",), "n"
)
TELEMETRY = m.TelemetryPacket(
    7,
    NOW,
    "tolaria",
    enums.TelemetryLevel.WARNING,
    (m.MetricPoint("tl", 0.5, {"gate": "G1"}),),
    (m.TelemetryEvent("gate", enums.TelemetryLevel.INFO, "passed", {"seed": "1"}),),
    "run",
    3,
)
EMERGENCY = m.EmergencySignal(enums.EmergencyLevel.HALT, "loss is not finite", "tolaria", NOW, 12.5, "run")
GATE = m.GateEvent(
    "run",
    1,
    0,
    4,
    enums.SeedLifecycleGate.G1_GRADIENT_HEALTH,
    False,
    SeedLifecycleStage.TRAINING,
    SeedLifecycleStage.BLENDING,
    {"gradient_min": 0.5},
    "gradient is zero",
)
UPDATE = m.KernelCatalogUpdate(9, "conv-32x12x12-float32-cpu", "ab" * 32, 12.5)
ENVELOPE = m.EventEnvelope(
    event_id=b"12345678",
    type=enums.BusMessageType.TELEMETRY,
    source="tolaria",
    created_at_ns=NOW,
    payload=b"payload",
    payload_type="TelemetryPacket",
    priority=enums.MessagePriority.HIGH,
    deadline_ns=NOW + 1,
    ttl_ms=500,
    routing_keys=("a", "b"),
    correlation_id=b"c",
    delivery=enums.DeliveryGuarantee.AT_MOST_ONCE,
    attempts=2,
    key_id="k1",
    nonce=b"n" * 12,
    signature=b"s" * 32,
)

MESSAGES: dict[str, tuple[Any, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "command": (COMMAND, codec.encode_command, codec.decode_command),
    "report": (REPORT, codec.encode_report, codec.decode_report),
    "telemetry": (TELEMETRY, codec.encode_telemetry, codec.decode_telemetry),
    "emergency": (EMERGENCY, codec.encode_emergency, codec.decode_emergency),
    "gate": (GATE, codec.encode_gate, codec.decode_gate),
    "catalog update": (UPDATE, codec.encode_catalog_update, codec.decode_catalog_update),
    "envelope": (ENVELOPE, codec.encode_envelope, codec.decode_envelope),
}
DECODERS = [decode for _, _, decode in MESSAGES.values()] + [lambda data: codec.decode_state([data])]
ENUMS = [
    "SeedLifecycleStage",
    "SeedLifecycleGate",
    "HealthStatus",
    "CircuitBreakerState",
    "CommandType",
    "SeedOperation",
    "BlendMode",
    "MessagePriority",
    "DeliveryGuarantee",
    "TelemetryLevel",
    "EmergencyLevel",
    "RiskLevel",
    "FieldReportOutcome",
    "BlueprintTier",
    "BusMessageType",
]


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_comes_out_as_it_went_in(name: str) -> None:
    message, encode, decode = MESSAGES[name]

    assert decode(encode(message)) == message


def test_a_state_comes_out_as_it_went_in_whatever_the_order_of_its_packets() -> None:
    packets = codec.encode_state(state(seeds=20))

    assert codec.decode_state(reversed(packets)) == state(seeds=20)


@given(seeds=st.integers(0, 120))
@settings(max_examples=25, deadline=None)
def test_no_packet_of_a_state_exceeds_the_limit_however_many_seeds_there_are(seeds: int) -> None:
    packets = codec.encode_state(state(seeds))

    assert max(map(len, packets)) <= CONTROL_MESSAGE_BYTES
    assert len(codec.decode_state(packets).seeds) == seeds


def test_an_incomplete_state_is_refused() -> None:
    packets = codec.encode_state(state(seeds=20))

    with pytest.raises(ContractError, match="incomplete"):
        codec.decode_state(packets[1:])
    with pytest.raises(ContractError, match="incomplete"):
        codec.decode_state([])


def test_a_message_over_the_limit_is_refused_with_the_sizes_of_its_fields() -> None:
    with pytest.raises(MessageTooLarge, match=r"annotations.*[0-9]+"):
        codec.encode_command(replace(COMMAND, annotations={"why": "x" * 300}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_finite_number_is_refused_at_the_sender(value: float) -> None:
    with pytest.raises(ContractError, match="finite"):
        codec.encode_state(replace(state(), metrics={"lr": value}))
    with pytest.raises(ContractError, match="finite"):
        codec.encode_telemetry(replace(TELEMETRY, metrics=(m.MetricPoint("tl", value),)))


def test_a_metric_that_is_no_finite_number_is_refused_at_the_receiver() -> None:
    wire = leyline_pb2.GateEvent(version=1, evidence={"gain": math.nan})

    with pytest.raises(ContractError, match="finite"):
        codec.decode_gate(wire.SerializeToString())


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_refused(version: int) -> None:
    wire = leyline_pb2.FieldReport(version=version, run="run")

    with pytest.raises(WrongVersion) as refused:
        codec.decode_report(wire.SerializeToString())
    assert refused.value.reason == "wrong_version"


def test_an_unknown_enum_value_is_refused() -> None:
    wire = leyline_pb2.EmergencySignal(version=1)
    wire.level = 77  # type: ignore[assignment]

    with pytest.raises(ContractError, match="77"):
        codec.decode_emergency(wire.SerializeToString())


def test_an_envelope_of_another_schema_is_refused() -> None:
    wire = leyline_pb2.EventEnvelope.FromString(codec.encode_envelope(ENVELOPE))
    wire.schema ^= 1

    with pytest.raises(WrongSchema) as refused:
        codec.decode_envelope(wire.SerializeToString())
    assert refused.value.reason == "wrong_schema"


def test_an_envelope_over_the_cap_is_refused() -> None:
    with pytest.raises(MessageTooLarge):
        codec.encode_envelope(replace(ENVELOPE, payload=bytes(300 * 1024)))


def answers(decode: Callable[[bytes], Any], data: bytes) -> bool:
    """Decoded, or refused with a reason; anything else is raised."""
    try:
        decode(data)
    except ContractError as refusal:
        return bool(refusal.reason)
    return True


@given(data=st.binary(max_size=600), decoder=st.sampled_from(range(len(DECODERS))))
@settings(max_examples=400, deadline=None)
def test_random_bytes_never_crash_a_decoder(data: bytes, decoder: int) -> None:
    assert answers(DECODERS[decoder], data)


@given(data=st.data(), name=st.sampled_from(sorted(MESSAGES)))
@settings(max_examples=300, deadline=None)
def test_damaged_messages_are_refused_or_still_valid_but_never_crash(data: st.DataObject, name: str) -> None:
    message, encode, decode = MESSAGES[name]
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))

    for version in (bytes(damaged), bytes(damaged[:cut])):
        assert answers(decode, version)


@pytest.mark.parametrize("name", ENUMS)
def test_our_enums_have_the_values_of_the_schema(name: str) -> None:
    schema = leyline_pb2.DESCRIPTOR.enum_types_by_name[name]
    ours = getattr(enums, name)

    assert sorted(value.number for value in schema.values) == sorted(int(value) for value in ours)
    for value in schema.values:
        assert value.name.endswith(ours(value.number).name)


def test_every_enum_of_the_schema_is_one_of_ours() -> None:
    assert set(leyline_pb2.DESCRIPTOR.enum_types_by_name) == set(ENUMS)
