"""Leyline's promises: what goes in comes out, limits hold, and no bytes whatever break a decoder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.contracts import codec, enums, leyline_pb2
from esper_ray.contracts import messages as m
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.errors import ContractError, MessageTooLarge, WrongSchema, WrongVersion
from tests.unit.contract_samples import CODECS, COMMAND, ENVELOPE, TELEMETRY, state

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


@pytest.mark.parametrize("name", CODECS)
def test_a_message_comes_out_as_it_went_in(name: str) -> None:
    for message in CODECS[name].samples:
        assert CODECS[name].decode(CODECS[name].encode(message)) == message


@pytest.mark.parametrize("name", CODECS)
def test_no_field_of_a_message_is_forgotten_by_its_codec(name: str) -> None:
    """The samples set every field, so every field of the schema must be on the wire; a oneof shows one at a time."""
    seen = set[str]()
    for message in CODECS[name].samples:
        wire = getattr(leyline_pb2, CODECS[name].wire).FromString(CODECS[name].encode(message))
        seen |= {field.name for field, _ in wire.ListFields()}

    left_out = {"part"} if name == "state" else set[str]()
    assert seen | left_out == {field.name for field in getattr(leyline_pb2, CODECS[name].wire).DESCRIPTOR.fields}


def test_every_top_level_message_of_the_schema_has_its_codec() -> None:
    file = leyline_pb2.DESCRIPTOR
    top = {name for name, each in file.message_types_by_name.items() if "version" in each.fields_by_name}

    assert {each.wire for each in CODECS.values()} == top


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
        codec.encode_telemetry(TELEMETRY._replace(metrics=(m.MetricPoint("tl", value),)))


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
        codec.encode_envelope(ENVELOPE._replace(payload=bytes(300 * 1024)))


@pytest.mark.parametrize("name", ENUMS)
def test_our_enums_have_the_values_of_the_schema(name: str) -> None:
    schema = leyline_pb2.DESCRIPTOR.enum_types_by_name[name]
    ours = getattr(enums, name)

    assert sorted(value.number for value in schema.values) == sorted(int(value) for value in ours)
    for value in schema.values:
        assert value.name.endswith(ours(value.number).name)


def test_every_enum_of_the_schema_is_one_of_ours() -> None:
    assert set(leyline_pb2.DESCRIPTOR.enum_types_by_name) == set(ENUMS)
