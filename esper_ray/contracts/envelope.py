"""The codec of the envelope around every message: its canonical bytes are what a signature is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from esper_ray.contracts import leyline_pb2 as pb
from esper_ray.contracts.budgets import ENVELOPE_BYTES
from esper_ray.contracts.enums import BusMessageType, DeliveryGuarantee, MessagePriority
from esper_ray.contracts.messages import EventEnvelope
from esper_ray.contracts.refusals import refused
from esper_ray.contracts.schema import readable_tags, schema_tag
from esper_ray.contracts.wire import VERSION, parse, to_enum
from esper_ray.errors import MessageTooLarge, WrongSchema

# What a message of each type carries. A state comes with the statistics of its layers, which are raw floats.
PAYLOADS: Mapping[BusMessageType, tuple[str, ...]] = {
    BusMessageType.SYSTEM_STATE: ("SystemStatePacket", "GraphStatistics"),
    BusMessageType.ADAPTATION_COMMAND: ("AdaptationCommand",),
    BusMessageType.FIELD_REPORT: ("FieldReport",),
    BusMessageType.TELEMETRY: ("TelemetryPacket",),
    BusMessageType.POLICY_UPDATE: ("PolicyUpdate",),
    BusMessageType.KERNEL_PREFETCH_REQUEST: ("KernelPrefetchRequest",),
    BusMessageType.KERNEL_PREFETCH_READY: ("KernelPrefetchReady",),
    BusMessageType.KERNEL_PREFETCH_ERROR: ("KernelPrefetchError",),
    BusMessageType.KERNEL_CATALOG_UPDATE: ("KernelCatalogUpdate",),
    BusMessageType.EMERGENCY_SIGNAL: ("EmergencySignal",),
    BusMessageType.ALERT: ("TelemetryPacket",),
    BusMessageType.DECISION_RECORD: ("DecisionRecord",),
}


# The tag of field 17 and the length of an HMAC-SHA-256; the tag of field 18 and its eight bytes.
_SIGNATURE_HEAD = b"\x8a\x01\x20"
_SIGNATURE_BYTES = len(_SIGNATURE_HEAD) + 32
_SCHEMA_BYTES = 2 + 8


def encode_envelope(envelope: EventEnvelope) -> bytes:
    """Canonical bytes (deterministic), which are also what gets signed, with an empty signature."""
    return _canonical(_wire_envelope(envelope))


def seal(
    sign: Callable[[bytes], bytes],
    *,
    event_id: bytes,
    type: BusMessageType,
    source: str,
    created_at_ns: int,
    payload: bytes,
    payload_type: str,
    priority: MessagePriority,
    ttl_ms: int,
    key_id: str,
    nonce: bytes,
) -> bytes:
    """Canonical bytes with the signature that ``sign`` gives for those without it; from the parts, for speed."""
    wire = pb.EventEnvelope()
    wire.CopyFrom(_usual(type, source, payload_type, priority, ttl_ms, key_id, schema_tag()))
    wire.event_id, wire.created_at_ns, wire.payload, wire.nonce = event_id, created_at_ns, payload, nonce
    # The signature's place is before the schema, the last field: put in there, the bytes need not be made again.
    unsigned = _canonical(wire, signature_bytes=_SIGNATURE_BYTES)
    place = len(unsigned) - _SCHEMA_BYTES
    return b"".join((unsigned[:place], _SIGNATURE_HEAD, sign(unsigned), unsigned[place:]))


@lru_cache(maxsize=64)
def _usual(
    type: BusMessageType,
    source: str,
    payload_type: str,
    priority: MessagePriority,
    ttl_ms: int,
    key_id: str,
    schema: int,
) -> pb.EventEnvelope:
    """What the envelopes of one sender and kind have in common: a copy is made in half the time of the whole."""
    return pb.EventEnvelope(
        version=VERSION,
        type=type,  # type: ignore[arg-type]
        source=source,
        payload_type=payload_type,
        priority=priority,  # type: ignore[arg-type]
        ttl_ms=ttl_ms,
        delivery=DeliveryGuarantee.AT_LEAST_ONCE,  # type: ignore[arg-type]
        key_id=key_id,
        schema=schema,
    )


def _canonical(wire: pb.EventEnvelope, *, signature_bytes: int = 0) -> bytes:
    data = wire.SerializeToString(deterministic=True)
    if len(data) + signature_bytes > ENVELOPE_BYTES:
        raise MessageTooLarge(
            f"An envelope of {len(data)} bytes was refused.",
            why=f"The bus carries at most {ENVELOPE_BYTES} bytes.",
            remedy="Send large data by digest through Urza.",
        )
    return data


def _wire_envelope(envelope: EventEnvelope) -> pb.EventEnvelope:
    return pb.EventEnvelope(
        version=VERSION,
        event_id=envelope.event_id,
        type=int(envelope.type),  # type: ignore[arg-type]
        source=envelope.source,
        created_at_ns=envelope.created_at_ns,
        deadline_ns=envelope.deadline_ns,
        ttl_ms=envelope.ttl_ms,
        payload=envelope.payload,
        payload_type=envelope.payload_type,
        priority=int(envelope.priority),  # type: ignore[arg-type]
        routing_keys=list(envelope.routing_keys),
        correlation_id=envelope.correlation_id,
        delivery=int(envelope.delivery),  # type: ignore[arg-type]
        attempts=envelope.attempts,
        key_id=envelope.key_id,
        nonce=envelope.nonce,
        signature=envelope.signature,
        schema=schema_tag(),
    )


def decode_envelope(data: bytes) -> EventEnvelope:
    return open_envelope(data)[0]


def open_envelope(data: bytes, *, same_schema: bool = False) -> tuple[EventEnvelope, bytes]:
    """The envelope, and the bytes that its signature is over.

    Args:
        same_schema: refuse what was sealed under an earlier schema, even where ours only added to it.

    Raises:
        ContractError: with its ``reason``: malformed, too_large, wrong_version, wrong_schema.
    """
    if len(data) > ENVELOPE_BYTES:
        raise refused(MessageTooLarge(f"An envelope of {len(data)} bytes was refused."))
    wire = parse(pb.EventEnvelope, data)
    if wire.schema != schema_tag() and (same_schema or wire.schema not in readable_tags()):
        raise refused(
            WrongSchema(
                "An envelope of another schema was refused.",
                why="Its sender runs another version of esper_ray.",
                remedy="Run the same version everywhere.",
            )
        )
    # By place, which takes a fifth less time: in the order of the dataclass.
    envelope = EventEnvelope(
        wire.event_id,
        to_enum(BusMessageType, wire.type),
        wire.source,
        wire.created_at_ns,
        wire.payload,
        wire.payload_type,
        to_enum(MessagePriority, wire.priority),
        wire.deadline_ns,
        wire.ttl_ms,
        tuple(wire.routing_keys),
        wire.correlation_id,
        to_enum(DeliveryGuarantee, wire.delivery),
        wire.attempts,
        wire.key_id,
        wire.nonce,
        wire.signature,
    )
    wire.ClearField("signature")
    return envelope, wire.SerializeToString(deterministic=True)
