"""A recording of what a demo run sent, as `benchmarks.packets` writes it: one JSON object a line, compressed.

The contracts are tested and measured on one that is checked in.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from esper_ray.contracts import codec, learning
from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.errors import ContractError

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "demo.jsonl.gz"
MEANING = GOLDEN.with_name("demo.meaning.json")
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "SystemStatePacket": lambda data: codec.decode_state([data]),
    "AdaptationCommand": codec.decode_command,
    "FieldReport": codec.decode_report,
    "TelemetryPacket": codec.decode_telemetry,
    "DecisionRecord": learning.decode_decision,
    "GateEvent": codec.decode_gate,
    "EmergencySignal": codec.decode_emergency,
    "PolicyUpdate": learning.decode_policy_update,
    "KernelCatalogUpdate": codec.decode_catalog_update,
}
_DESCRIBED = 3


@dataclass(frozen=True, slots=True)
class Packet:
    """One message of the recording; ``kind`` is the payload's message by name."""

    kind: str
    type: BusMessageType
    priority: MessagePriority
    payload: bytes


@cache
def load(file: Path = GOLDEN) -> tuple[Packet, ...]:
    """The messages in the order in which they came."""
    with gzip.open(file, "rt") as lines:
        return tuple(_packet(json.loads(line)) for line in lines)


def save(packets: Iterable[Packet], file: Path) -> None:
    """The same packets give the same bytes."""
    with file.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        for each in packets:
            row = {
                "kind": each.kind,
                "type": each.type.name,
                "priority": each.priority.name,
                "payload": each.payload.hex(),
            }
            out.write((json.dumps(row) + "\n").encode())


def says(kind: str, payload: bytes) -> Any:
    """What a message says, as plain data: the order of a map's keys on the wire means nothing."""
    return json.loads(json.dumps(_plain(DECODERS[kind](payload))))


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples by their fields' names."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def describe(packets: Iterable[Packet]) -> list[dict[str, Any]]:
    """Of each kind the longest messages that stand alone: their bytes, and what they say."""
    found: dict[str, dict[bytes, Any]] = {}
    for each in sorted(packets, key=lambda packet: -len(packet.payload)):
        said = found.setdefault(each.kind, {})
        if len(said) < _DESCRIBED:
            try:
                said[each.payload] = says(each.kind, each.payload)
            except ContractError:
                # One of several packets of a state says nothing by itself.
                continue
    return [
        {"kind": kind, "payload": payload.hex(), "says": what}
        for kind, said in sorted(found.items())
        for payload, what in said.items()
    ]


def _packet(row: dict[str, str]) -> Packet:
    return Packet(
        row["kind"],
        BusMessageType[row["type"]],
        MessagePriority[row["priority"]],
        bytes.fromhex(row["payload"]),
    )
