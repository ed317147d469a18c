"""One message as Nissa keeps it: what it said, when, and the text by which it is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

from esper_ray.contracts import catalogue, codec, learning
from esper_ray.contracts.enums import BusMessageType, TelemetryLevel
from esper_ray.contracts.messages import (
    AdaptationCommand,
    EmergencySignal,
    EventEnvelope,
    FieldReport,
    KernelCatalogUpdate,
    KernelPrefetchError,
    PolicyUpdate,
    TelemetryPacket,
    blueprint_name,
)

Message = (
    TelemetryPacket
    | EmergencySignal
    | FieldReport
    | AdaptationCommand
    | KernelCatalogUpdate
    | KernelPrefetchError
    | PolicyUpdate
)


@dataclass(frozen=True, slots=True)
class Record:
    """What the event store holds; ``payload`` is the message itself, so that everything can be derived anew."""

    event_id: bytes
    at_ns: int
    type: BusMessageType
    source: str
    run: str
    epoch: int
    level: TelemetryLevel
    kinds: tuple[str, ...]
    text: str
    payload: bytes


_DECODERS: dict[BusMessageType, Callable[[bytes], Message]] = {
    BusMessageType.TELEMETRY: codec.decode_telemetry,
    BusMessageType.ALERT: codec.decode_telemetry,
    BusMessageType.EMERGENCY_SIGNAL: codec.decode_emergency,
    BusMessageType.FIELD_REPORT: codec.decode_report,
    BusMessageType.ADAPTATION_COMMAND: codec.decode_command,
    BusMessageType.KERNEL_CATALOG_UPDATE: codec.decode_catalog_update,
    BusMessageType.KERNEL_PREFETCH_ERROR: catalogue.decode_prefetch_error,
    BusMessageType.POLICY_UPDATE: learning.decode_policy_update,
}


def decode(type: BusMessageType, payload: bytes) -> Message | None:
    """The message inside, or None for a type that Nissa has no use for.

    Raises:
        ContractError: the payload is no valid message of its type.
    """
    decoder = _DECODERS.get(type)
    return None if decoder is None else decoder(payload)


def to_record(envelope: EventEnvelope, message: Message) -> Record:
    """How a message is kept."""
    what = _describe(message)
    return Record(
        event_id=envelope.event_id,
        at_ns=what.at_ns or envelope.created_at_ns,
        type=envelope.type,
        source=envelope.source,
        run=what.run,
        epoch=what.epoch,
        level=what.level,
        kinds=what.kinds,
        text=what.text,
        payload=envelope.payload,
    )


@dataclass(frozen=True, slots=True)
class _Description:
    at_ns: int
    run: str
    epoch: int
    level: TelemetryLevel
    kinds: tuple[str, ...]
    text: str


@singledispatch
def _describe(message: object) -> _Description:
    raise AssertionError(f"{type(message).__name__} has no description")


@_describe.register
def _(message: TelemetryPacket) -> _Description:
    words = []
    for event in message.events:
        words += [event.kind, event.message, *(f"{key}={value}" for key, value in event.attributes.items())]
    kinds = tuple(dict.fromkeys(event.kind for event in message.events)) or ("metrics",)
    level = max(message.level, TelemetryLevel.INFO)
    return _Description(message.timestamp_ns, message.run, message.epoch, level, kinds, " ".join(filter(None, words)))


@_describe.register
def _(message: EmergencySignal) -> _Description:
    text = f"emergency {message.level.name} {message.origin}: {message.reason}"
    return _Description(message.triggered_at_ns, message.run, 0, TelemetryLevel.CRITICAL, ("emergency",), text)


@_describe.register
def _(message: FieldReport) -> _Description:
    text = (
        f"report {message.outcome.name} seed={message.seed} slot={message.slot} "
        f"{blueprint_name(message.blueprint)} {message.notes}"
    )
    return _Description(message.issued_at_ns, message.run, 0, TelemetryLevel.INFO, ("report",), text.strip())


@_describe.register
def _(message: AdaptationCommand) -> _Description:
    directive = message.seed_directive
    what = directive.operation.name if directive else message.type.name
    notes = " ".join(f"{key}={value}" for key, value in message.annotations.items())
    text = f"command {what} slot={message.slot} seed={message.seed} by {message.issued_by} {notes}"
    return _Description(
        message.issued_at_ns, message.run, message.epoch, TelemetryLevel.INFO, ("command",), text.strip()
    )


@_describe.register
def _(message: KernelCatalogUpdate) -> _Description:
    text = f"kernel {blueprint_name(message.blueprint)} for {message.signature} in {message.compile_ms:.0f} ms"
    return _Description(0, "", 0, TelemetryLevel.INFO, ("kernel",), text)


@_describe.register
def _(message: KernelPrefetchError) -> _Description:
    text = f"kernel {blueprint_name(message.blueprint)} was given up for {message.reason}"
    return _Description(0, "", 0, TelemetryLevel.WARNING, ("kernel",), text)


@_describe.register
def _(message: PolicyUpdate) -> _Description:
    text = f"policy {message.policy_id} decides from now on, after {message.parent_policy_id or 'none'}"
    return _Description(message.issued_at_ns, "", 0, TelemetryLevel.INFO, ("policy",), text)
