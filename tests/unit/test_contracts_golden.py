"""What a demo run really sent keeps its meaning and its size: see `benchmarks.packets` for how it was recorded."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest

from benchmarks.contracts import CODINGS, units
from benchmarks.recording import MEANING, describe, load, says
from esper_ray.contracts import codec
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.metrics import BY_KEY, REPORT_METRICS, SEED_METRICS, STATE_METRICS
from esper_ray.contracts.telemetry import EVENT_KINDS

LIMITED = ("SystemStatePacket", "AdaptationCommand", "FieldReport", "TelemetryPacket")
PACKETS: dict[str, list[bytes]] = defaultdict(list)
for packet in load():
    PACKETS[packet.kind].append(packet.payload)


def keys(table) -> set[str]:
    return {each.key for each in table}


def test_the_recording_has_every_kind_that_a_run_sends() -> None:
    assert {*LIMITED, "DecisionRecord", "GateEvent", "EmergencySignal"} <= set(PACKETS)
    assert len(PACKETS["SystemStatePacket"]) >= 14, "one boundary after the other, to the run's end"


@pytest.mark.parametrize("kind", sorted(PACKETS))
def test_each_recorded_message_comes_out_again_as_it_went_in(kind: str) -> None:
    encode, decode = CODINGS[kind].encode, CODINGS[kind].decode
    for unit in units(kind, PACKETS[kind]):
        message = decode(unit)
        assert decode(encode(message)) == message


def test_recorded_messages_still_say_what_they_said() -> None:
    """A field that changes its place in a codec would pass every test that codes both ways."""
    told = json.loads(MEANING.read_text())

    assert len({row["kind"] for row in told}) >= len(LIMITED)
    for row in told:
        assert says(row["kind"], bytes.fromhex(row["payload"])) == row["says"]
    assert [row["payload"] for row in describe(load())] == [row["payload"] for row in told]


@pytest.mark.parametrize("kind", LIMITED)
def test_a_whole_demo_run_stays_below_the_size_limit(kind: str) -> None:
    sizes = [len(data) for data in PACKETS[kind]]

    assert np.percentile(sizes, 99) < CONTROL_MESSAGE_BYTES
    assert max(sizes) <= CONTROL_MESSAGE_BYTES


def test_every_key_and_kind_that_a_run_sends_is_in_the_tables() -> None:
    for data in PACKETS["TelemetryPacket"]:
        packet = codec.decode_telemetry(data)
        assert {point.key for point in packet.metrics} <= set(BY_KEY)
        assert {event.kind for event in packet.events} <= set(EVENT_KINDS)
    for data in PACKETS["FieldReport"]:
        assert set(codec.decode_report(data).metrics) <= keys(REPORT_METRICS)
    for unit in units("SystemStatePacket", PACKETS["SystemStatePacket"]):
        state = codec.decode_state(unit)
        assert set(state.metrics) <= keys(STATE_METRICS)
        assert all(set(seed.metrics) <= keys(SEED_METRICS) for seed in state.seeds)
