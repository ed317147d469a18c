"""Which stream a message travels on: one table, read by senders, readers and the keeper."""

from __future__ import annotations

from dataclasses import dataclass

from esper_ray.contracts.enums import BusMessageType, MessagePriority

NORMAL = "oona.normal"
EMERGENCY = "oona.emergency"
TELEMETRY = "oona.telemetry"
POLICY = "oona.policy"
KERNELS = "oona.kernels"

# Readers take them in this order, so an emergency overtakes whatever waits.
STREAMS = (EMERGENCY, NORMAL, POLICY, KERNELS, TELEMETRY)
_HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Kind:
    """How one type of message is treated.

    What is ``durable`` reaches its readers, however late. What is not is worth nothing after ``ttl_ms``: a reader that
    finds it later counts it and leaves it.
    """

    stream: str
    payload_type: str
    durable: bool
    ttl_ms: int = 0


KINDS: dict[BusMessageType, Kind] = {
    BusMessageType.SYSTEM_STATE: Kind(NORMAL, "SystemStatePacket", durable=False, ttl_ms=_HOUR_MS),
    BusMessageType.ADAPTATION_COMMAND: Kind(NORMAL, "AdaptationCommand", durable=True),
    BusMessageType.FIELD_REPORT: Kind(NORMAL, "FieldReport", durable=True),
    BusMessageType.TELEMETRY: Kind(TELEMETRY, "TelemetryPacket", durable=False, ttl_ms=24 * _HOUR_MS),
    BusMessageType.POLICY_UPDATE: Kind(POLICY, "PolicyUpdate", durable=True),
    BusMessageType.KERNEL_PREFETCH_REQUEST: Kind(KERNELS, "KernelPrefetchRequest", durable=True),
    BusMessageType.KERNEL_PREFETCH_READY: Kind(KERNELS, "KernelPrefetchReady", durable=True),
    BusMessageType.KERNEL_PREFETCH_ERROR: Kind(KERNELS, "KernelPrefetchError", durable=True),
    BusMessageType.KERNEL_CATALOG_UPDATE: Kind(KERNELS, "KernelCatalogUpdate", durable=True),
    BusMessageType.EMERGENCY_SIGNAL: Kind(EMERGENCY, "EmergencySignal", durable=True),
    BusMessageType.ALERT: Kind(NORMAL, "TelemetryPacket", durable=True),
    BusMessageType.DECISION_RECORD: Kind(NORMAL, "DecisionRecord", durable=True),
}


def route(type: BusMessageType, priority: MessagePriority) -> str:
    """The stream of a message: that of its type, or the emergency stream for all that is critical."""
    return EMERGENCY if priority is MessagePriority.CRITICAL else KINDS[type].stream


def is_durable(type: BusMessageType, priority: MessagePriority) -> bool:
    """Whether a message must outlive a bus that is away."""
    return priority is MessagePriority.CRITICAL or KINDS[type].durable


def ttl_ms(type: BusMessageType, priority: MessagePriority) -> int:
    """After how long a message is worth nothing any more; 0 for never."""
    return 0 if is_durable(type, priority) else KINDS[type].ttl_ms


def dead_letters_of(stream: str) -> str:
    """Where a stream's undeliverable messages end."""
    return f"{stream}.dead"


def in_reading_order(streams: tuple[str, ...]) -> tuple[str, ...]:
    """The given streams, emergencies first."""
    return tuple(sorted(streams, key=STREAMS.index))
