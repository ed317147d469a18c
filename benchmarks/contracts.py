"""What the messages weigh and cost, on those that a demo run really sent (see `benchmarks.packets`).

    python -m benchmarks.contracts --json F
    python -m benchmarks.contracts --recording F.jsonl.gz      # on another recording

For each kind of message: bytes; microseconds of serialising the generated message (`_serialise`), of parsing it
(`_parse`), of both (`_roundtrip`); from our dataclass to bytes (`_encode`), back (`_decode`), and the whole way
(`_codec`), which is what a room pays; live Python blocks of one parsed generated message (upb keeps its fields in an
arena of its own, which Python's tools do not see). A state of several packets is coded as a whole, counted per packet.
Each time is that on the wall; `_processor_` is the thread's own, its clock's half microsecond included: what to look at
on a machine that does other work too. The envelope: wrapping and signing around each recorded payload (`envelope`), and
opening with everything that is checked (`open`). Beside it all a loop of plain Python (`machine_loop`).
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Bar, percentile
from benchmarks.recording import GOLDEN, Packet, load
from esper_ray.contracts import codec, learning, leyline_pb2
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES
from esper_ray.contracts.envelope import PAYLOADS
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.signing import Signer, Verifier

Unit = bytes | tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Coding:
    """How a kind of message is coded; a unit is one message, or the packets of one state."""

    short: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


CODINGS = {
    "SystemStatePacket": Coding("state", codec.encode_state, codec.decode_state),
    "AdaptationCommand": Coding("command", codec.encode_command, codec.decode_command),
    "FieldReport": Coding("report", codec.encode_report, codec.decode_report),
    "TelemetryPacket": Coding("telemetry", codec.encode_telemetry, codec.decode_telemetry),
    "DecisionRecord": Coding("decision", learning.encode_decision, learning.decode_decision),
    "GateEvent": Coding("gate", codec.encode_gate, codec.decode_gate),
    "EmergencySignal": Coding("emergency", codec.encode_emergency, codec.decode_emergency),
    "PolicyUpdate": Coding("policy", learning.encode_policy_update, learning.decode_policy_update),
    "KernelCatalogUpdate": Coding("catalog", codec.encode_catalog_update, codec.decode_catalog_update),
}
LIMITED = ("state", "command", "report", "telemetry")
BARS = (
    *(Bar(f"{kind}_bytes_p99", CONTROL_MESSAGE_BYTES) for kind in LIMITED),
    *(Bar(f"{kind}_roundtrip_p99_us", 20.0) for kind in LIMITED),
    *(Bar(f"{kind}_allocations", 4.0) for kind in LIMITED),
    Bar("command_serialise_p99_us", 10.0),
    Bar("state_codec_p99_us", 80.0),
    Bar("command_encode_p99_us", 40.0),
    Bar("envelope_p99_us", 20.0),
)
_KEPT = 2000


def units(kind: str, payloads: Sequence[bytes]) -> list[Unit]:
    """What is coded together. A boundary that was done again counts once."""
    if kind != "SystemStatePacket":
        return list(payloads)
    found: dict[tuple[str, int, int], dict[int, bytes]] = defaultdict(dict)
    for data in payloads:
        wire = leyline_pb2.SystemStatePacket.FromString(data)
        found[wire.run, wire.branch, wire.epoch][wire.part] = data
    return [tuple(parts[part] for part in sorted(parts)) for parts in found.values()]


def timed(what: str, count: int, calls: Sequence[tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Microseconds of ``count`` calls or more, taken in turn; each is divided by its number of packets.

    Beside the time on the wall the thread's own on the processor, which does not count when others had it.
    """
    wall, own = [], []
    clock, processor = time.perf_counter_ns, time.thread_time_ns
    for _ in range(-(-count // len(calls))):
        for call, packets in calls:
            begun, start = processor(), clock()
            call()
            end = clock()
            wall.append((end - start) / 1e3 / packets)
            own.append((processor() - begun) / 1e3 / packets)
    return {
        f"{what}_p50_us": percentile(wall, 50),
        f"{what}_p99_us": percentile(wall, 99),
        f"{what}_processor_p99_us": percentile(own, 99),
    }


def allocations(kind: type[Any], payloads: Sequence[bytes]) -> float:
    """Live Python blocks of one parsed message, on the mean over all of them."""
    kept: list[Any] = [None] * _KEPT
    for place in range(_KEPT):
        kept[place] = kind.FromString(payloads[place % len(payloads)])
    kept = [None] * _KEPT
    gc.collect()
    before = sys.getallocatedblocks()
    for place in range(_KEPT):
        kept[place] = kind.FromString(payloads[place % len(payloads)])
    return (sys.getallocatedblocks() - before) / _KEPT


def of_kind(kind: str, payloads: Sequence[bytes], count: int) -> dict[str, float]:
    wire, coding = getattr(leyline_pb2, kind), CODINGS[kind]
    parsed = [wire.FromString(data) for data in payloads]
    coded = [(unit, coding.decode(unit), len(unit) if isinstance(unit, tuple) else 1) for unit in units(kind, payloads)]
    sizes = [len(data) for data in payloads]
    figures = {
        "messages": float(len(payloads)),
        "bytes_p50": percentile(sizes, 50),
        "bytes_p99": percentile(sizes, 99),
        "bytes_max": float(max(sizes)),
    }
    encode, decode = coding.encode, coding.decode
    for what, calls in (
        ("serialise", [(message.SerializeToString, 1) for message in parsed]),
        ("parse", [(lambda data=data: wire.FromString(data), 1) for data in payloads]),
        (
            "roundtrip",
            [(lambda message=message: wire.FromString(message.SerializeToString()), 1) for message in parsed],
        ),
        ("encode", [(lambda message=message: encode(message), packets) for _, message, packets in coded]),
        ("decode", [(lambda unit=unit: decode(unit), packets) for unit, _, packets in coded]),
        ("codec", [(lambda message=message: decode(encode(message)), packets) for _, message, packets in coded]),
    ):
        figures |= timed(what, count, calls)
    figures["allocations"] = allocations(wire, payloads)
    return {f"{coding.short}_{key}": value for key, value in figures.items()}


def of_envelopes(packets: Sequence[Packet], count: int) -> dict[str, float]:
    keys = KeyRing((("k1", os.urandom(32)),))
    signer, verifier = Signer(keys, "tolaria"), Verifier(keys)
    packets = [each for each in packets if each.kind in PAYLOADS.get(each.type, ())]
    sealed = [signer.seal(each.payload, each.type, payload_type=each.kind) for each in packets]
    figures = {"envelope_bytes_over_payload": percentile(
        [len(data) - len(each.payload) for data, each in zip(sealed, packets, strict=True)], 99
    )}  # fmt: skip
    for what, calls in (
        ("envelope", [(lambda e=e: signer.seal(e.payload, e.type, payload_type=e.kind), 1) for e in packets]),
        ("open", [(lambda data=data: verifier.open(data), 1) for data in sealed]),
    ):
        figures |= timed(what, count, calls)
    return figures


def loop() -> None:
    """Nothing of ours, for about as long as an envelope takes: what its p99 is above its p50 is the machine's."""
    total = 0
    for number in range(300):
        total += number


def measure(recording: Path, count: int) -> dict[str, Any]:
    packets = load(recording)
    by_kind: dict[str, list[bytes]] = defaultdict(list)
    for each in packets:
        by_kind[each.kind].append(each.payload)
    figures: dict[str, Any] = timed("machine_loop", count, [(loop, 1)])
    for kind in CODINGS:
        if by_kind[kind]:
            figures |= of_kind(kind, by_kind[kind], count)
    return figures | of_envelopes(packets, count)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--recording", type=Path, default=GOLDEN, metavar="FILE", help="what benchmarks.packets wrote")
    given = parser.parse_args()
    count = 2000 if given.quick else 20_000
    common.run("contracts", BARS, lambda: measure(given.recording, count), given.json)


if __name__ == "__main__":
    main()
