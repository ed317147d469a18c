"""Between our dataclasses and bytes; with `learning` the only user of the generated code besides `schema`.

Every ``decode_*`` raises a `ContractError` for anything that is not a valid message of version 1: truncated or
oversized bytes, another version, a metric that is not a finite number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from esper_ray.contracts import leyline_pb2 as pb
from esper_ray.contracts.budgets import CONTROL_MESSAGE_BYTES, ENVELOPE_BYTES
from esper_ray.contracts.enums import (
    BlendMode,
    BusMessageType,
    CommandType,
    DeliveryGuarantee,
    EmergencyLevel,
    FieldReportOutcome,
    MessagePriority,
    SeedLifecycleGate,
    SeedLifecycleStage,
    SeedOperation,
    TelemetryLevel,
)
from esper_ray.contracts.messages import (
    AdaptationCommand,
    EmergencyDirective,
    EmergencySignal,
    EventEnvelope,
    FieldReport,
    GateEvent,
    HardwareContext,
    KernelCatalogUpdate,
    MetricPoint,
    PauseDirective,
    RollbackDirective,
    SeedDirective,
    SeedState,
    SystemState,
    TelemetryEvent,
    TelemetryPacket,
)
from esper_ray.contracts.schema import schema_tag
from esper_ray.contracts.wire import VERSION, finite, finite_value, parse, to_enum, within_limit
from esper_ray.errors import ContractError, MessageTooLarge, WrongSchema


def encode_state(state: SystemState) -> list[bytes]:
    """One packet, or several where the seeds do not fit into one (``part`` of ``parts``)."""
    groups: list[list[pb.SeedState]] = [[]]
    room = CONTROL_MESSAGE_BYTES - _state_head(state, 0, 1).ByteSize() - 4
    for seed in map(_seed_to_wire, state.seeds):
        size = seed.ByteSize() + 3
        if size > room:
            groups.append([])
            room = CONTROL_MESSAGE_BYTES - _state_head(state, 1, 1).ByteSize() - 4
        groups[-1].append(seed)
        room -= size
    packets = []
    for part, seeds in enumerate(groups):
        packet = _state_head(state, part, len(groups))
        packet.seeds.extend(seeds)
        packets.append(within_limit(packet))
    return packets


def _state_head(state: SystemState, part: int, parts: int) -> pb.SystemStatePacket:
    packet = pb.SystemStatePacket(
        version=VERSION,
        run=state.run,
        epoch=state.epoch,
        part=part,
        parts=parts,
        branch=state.branch,
        timestamp_ns=state.timestamp_ns,
    )
    if part:
        return packet
    hardware = state.hardware
    packet.global_step = state.global_step
    packet.training_loss = finite_value("training_loss", state.training_loss)
    packet.validation_loss = finite_value("validation_loss", state.validation_loss)
    packet.validation_accuracy = finite_value("validation_accuracy", state.validation_accuracy)
    packet.metrics.update(finite(state.metrics))
    packet.hardware.CopyFrom(
        pb.HardwareContext(
            device_kind=hardware.device_kind,
            device_id=hardware.device_id,
            memory_total_mb=hardware.memory_total_mb,
            memory_free_mb=hardware.memory_free_mb,
            temperature_c=hardware.temperature_c,
            utilization=hardware.utilization,
            compute_capability=hardware.compute_capability,
        )
    )
    return packet


def _seed_to_wire(seed: SeedState) -> pb.SeedState:
    return pb.SeedState(
        seed=seed.seed,
        slot=seed.slot,
        blueprint=seed.blueprint,
        stage=int(seed.stage),  # type: ignore[arg-type]
        alpha=seed.alpha,
        gradient_norm=seed.gradient_norm,
        learning_rate=seed.learning_rate,
        depth=seed.depth,
        age_epochs=seed.age_epochs,
        risk=seed.risk,
        metrics=finite(seed.metrics),
    )


def decode_state(packets: Iterable[bytes]) -> SystemState:
    """The state from all the packets of one boundary, in any order."""
    wires = sorted((parse(pb.SystemStatePacket, data) for data in packets), key=lambda wire: wire.part)
    if not wires or [wire.part for wire in wires] != list(range(wires[0].parts)):
        raise ContractError("A system state arrived incomplete.", why="Some of its packets are missing.")
    head, hardware = wires[0], wires[0].hardware
    return SystemState(
        run=head.run,
        epoch=head.epoch,
        global_step=head.global_step,
        timestamp_ns=head.timestamp_ns,
        training_loss=head.training_loss,
        validation_loss=head.validation_loss,
        validation_accuracy=head.validation_accuracy,
        metrics=finite(head.metrics),
        hardware=HardwareContext(
            device_kind=hardware.device_kind,
            device_id=hardware.device_id,
            memory_total_mb=hardware.memory_total_mb,
            memory_free_mb=hardware.memory_free_mb,
            temperature_c=hardware.temperature_c,
            utilization=hardware.utilization,
            compute_capability=hardware.compute_capability,
        ),
        seeds=tuple(
            SeedState(
                seed=seed.seed,
                slot=seed.slot,
                blueprint=seed.blueprint,
                stage=to_enum(SeedLifecycleStage, seed.stage),
                alpha=seed.alpha,
                gradient_norm=seed.gradient_norm,
                learning_rate=seed.learning_rate,
                depth=seed.depth,
                age_epochs=seed.age_epochs,
                risk=seed.risk,
                metrics=finite(seed.metrics),
            )
            for wire in wires
            for seed in wire.seeds
        ),
        branch=head.branch,
    )


def encode_command(command: AdaptationCommand) -> bytes:
    wire = pb.AdaptationCommand(
        version=VERSION,
        command_id=command.command_id,
        type=int(command.type),  # type: ignore[arg-type]
        run=command.run,
        epoch=command.epoch,
        slot=command.slot,
        seed=command.seed,
        deadline_ms=command.deadline_ms,
        issued_at_ns=command.issued_at_ns,
        issued_by=command.issued_by,
        annotations=dict(command.annotations),
        branch=command.branch,
    )
    directive = command.seed_directive
    if directive is not None:
        wire.seed_directive.CopyFrom(
            pb.SeedDirective(
                operation=int(directive.operation),  # type: ignore[arg-type]
                blueprint=directive.blueprint,
                parameters=finite(directive.parameters),
                blend_mode=int(directive.blend_mode),  # type: ignore[arg-type]
                blend_schedule=directive.blend_schedule,
            )
        )
    elif command.rollback is not None:
        wire.rollback.CopyFrom(pb.RollbackDirective(epoch=command.rollback.epoch))
    elif command.pause is not None:
        wire.pause.CopyFrom(pb.PauseDirective(paused=command.pause.paused))
    elif command.emergency is not None:
        given = command.emergency
        wire.emergency.CopyFrom(
            pb.EmergencyDirective(level=int(given.level), reason=given.reason)  # type: ignore[arg-type]
        )
    return within_limit(wire)


def decode_command(data: bytes) -> AdaptationCommand:
    wire = parse(pb.AdaptationCommand, data)
    directive = None
    if wire.HasField("seed_directive"):
        given = wire.seed_directive
        directive = SeedDirective(
            operation=to_enum(SeedOperation, given.operation),
            blueprint=given.blueprint,
            parameters=finite(given.parameters),
            blend_mode=to_enum(BlendMode, given.blend_mode),
            blend_schedule=given.blend_schedule,
        )
    return AdaptationCommand(
        command_id=wire.command_id,
        type=to_enum(CommandType, wire.type),
        run=wire.run,
        epoch=wire.epoch,
        issued_at_ns=wire.issued_at_ns,
        issued_by=wire.issued_by,
        slot=wire.slot,
        seed=wire.seed,
        deadline_ms=wire.deadline_ms,
        seed_directive=directive,
        annotations=dict(wire.annotations),
        branch=wire.branch,
        rollback=RollbackDirective(wire.rollback.epoch) if wire.HasField("rollback") else None,
        pause=PauseDirective(wire.pause.paused) if wire.HasField("pause") else None,
        emergency=EmergencyDirective(to_enum(EmergencyLevel, wire.emergency.level), wire.emergency.reason)
        if wire.HasField("emergency")
        else None,
    )


def encode_report(report: FieldReport) -> bytes:
    return within_limit(
        pb.FieldReport(
            version=VERSION,
            report_id=report.report_id,
            command_id=report.command_id,
            run=report.run,
            seed=report.seed,
            slot=report.slot,
            blueprint=report.blueprint,
            outcome=int(report.outcome),  # type: ignore[arg-type]
            metrics=finite(report.metrics),
            window_epochs=report.window_epochs,
            issued_at_ns=report.issued_at_ns,
            policy_version=report.policy_version,
            mitigations=list(report.mitigations),
            notes=report.notes,
        )
    )


def decode_report(data: bytes) -> FieldReport:
    wire = parse(pb.FieldReport, data)
    return FieldReport(
        report_id=wire.report_id,
        command_id=wire.command_id,
        run=wire.run,
        seed=wire.seed,
        slot=wire.slot,
        blueprint=wire.blueprint,
        outcome=to_enum(FieldReportOutcome, wire.outcome),
        metrics=finite(wire.metrics),
        window_epochs=wire.window_epochs,
        issued_at_ns=wire.issued_at_ns,
        policy_version=wire.policy_version,
        mitigations=tuple(wire.mitigations),
        notes=wire.notes,
    )


def encode_telemetry(packet: TelemetryPacket) -> bytes:
    return within_limit(
        pb.TelemetryPacket(
            version=VERSION,
            packet_id=packet.packet_id,
            timestamp_ns=packet.timestamp_ns,
            source=packet.source,
            level=int(packet.level),  # type: ignore[arg-type]
            metrics=[
                pb.MetricPoint(key=point.key, value=finite_value(point.key, point.value), labels=dict(point.labels))
                for point in packet.metrics
            ],
            events=[
                pb.TelemetryEvent(
                    kind=event.kind,
                    level=int(event.level),  # type: ignore[arg-type]
                    message=event.message,
                    attributes=dict(event.attributes),
                )
                for event in packet.events
            ],
            run=packet.run,
            epoch=packet.epoch,
        )
    )


def decode_telemetry(data: bytes) -> TelemetryPacket:
    wire = parse(pb.TelemetryPacket, data)
    return TelemetryPacket(
        packet_id=wire.packet_id,
        timestamp_ns=wire.timestamp_ns,
        source=wire.source,
        level=to_enum(TelemetryLevel, wire.level),
        metrics=tuple(
            MetricPoint(point.key, finite_value(point.key, point.value), dict(point.labels)) for point in wire.metrics
        ),
        events=tuple(
            TelemetryEvent(event.kind, to_enum(TelemetryLevel, event.level), event.message, dict(event.attributes))
            for event in wire.events
        ),
        run=wire.run,
        epoch=wire.epoch,
    )


def encode_emergency(signal: EmergencySignal) -> bytes:
    return pb.EmergencySignal(
        version=VERSION,
        level=int(signal.level),  # type: ignore[arg-type]
        reason=signal.reason,
        origin=signal.origin,
        triggered_at_ns=signal.triggered_at_ns,
        monotonic_ms=signal.monotonic_ms,
        run=signal.run,
    ).SerializeToString()


def decode_emergency(data: bytes) -> EmergencySignal:
    wire = parse(pb.EmergencySignal, data)
    return EmergencySignal(
        level=to_enum(EmergencyLevel, wire.level),
        reason=wire.reason,
        origin=wire.origin,
        triggered_at_ns=wire.triggered_at_ns,
        monotonic_ms=wire.monotonic_ms,
        run=wire.run,
    )


def encode_gate(event: GateEvent) -> bytes:
    return pb.GateEvent(
        version=VERSION,
        run=event.run,
        seed=event.seed,
        slot=event.slot,
        epoch=event.epoch,
        gate=int(event.gate),  # type: ignore[arg-type]
        passed=event.passed,
        from_stage=int(event.from_stage),  # type: ignore[arg-type]
        to_stage=int(event.to_stage),  # type: ignore[arg-type]
        evidence=finite(event.evidence),
        reason=event.reason,
    ).SerializeToString()


def decode_gate(data: bytes) -> GateEvent:
    wire = parse(pb.GateEvent, data)
    return GateEvent(
        run=wire.run,
        seed=wire.seed,
        slot=wire.slot,
        epoch=wire.epoch,
        gate=to_enum(SeedLifecycleGate, wire.gate),
        passed=wire.passed,
        from_stage=to_enum(SeedLifecycleStage, wire.from_stage),
        to_stage=to_enum(SeedLifecycleStage, wire.to_stage),
        evidence=finite(wire.evidence),
        reason=wire.reason,
    )


def encode_catalog_update(update: KernelCatalogUpdate) -> bytes:
    return pb.KernelCatalogUpdate(
        version=VERSION,
        blueprint=update.blueprint,
        signature=update.signature,
        artifact_digest=update.artifact_digest,
        compile_ms=update.compile_ms,
    ).SerializeToString()


def decode_catalog_update(data: bytes) -> KernelCatalogUpdate:
    wire = parse(pb.KernelCatalogUpdate, data)
    return KernelCatalogUpdate(wire.blueprint, wire.signature, wire.artifact_digest, wire.compile_ms)


def encode_envelope(envelope: EventEnvelope) -> bytes:
    """Canonical bytes (deterministic), which are also what gets signed, with an empty signature."""
    return _canonical(_wire_envelope(envelope))


def seal_envelope(envelope: EventEnvelope, sign: Callable[[bytes], bytes]) -> bytes:
    """Canonical bytes with the signature that ``sign`` gives for those without it."""
    wire = _wire_envelope(envelope)
    wire.ClearField("signature")
    wire.signature = sign(_canonical(wire))
    return _canonical(wire)


def _canonical(wire: pb.EventEnvelope) -> bytes:
    data = wire.SerializeToString(deterministic=True)
    if len(data) > ENVELOPE_BYTES:
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


def open_envelope(data: bytes) -> tuple[EventEnvelope, bytes]:
    """The envelope, and the bytes that its signature is over."""
    if len(data) > ENVELOPE_BYTES:
        raise MessageTooLarge(f"An envelope of {len(data)} bytes was refused.")
    wire = parse(pb.EventEnvelope, data)
    if wire.schema != schema_tag():
        raise WrongSchema(
            "An envelope of another schema was refused.",
            why="Its sender runs another version of esper_ray.",
            remedy="Run the same version everywhere.",
        )
    envelope = EventEnvelope(
        event_id=wire.event_id,
        type=to_enum(BusMessageType, wire.type),
        source=wire.source,
        created_at_ns=wire.created_at_ns,
        payload=wire.payload,
        payload_type=wire.payload_type,
        priority=to_enum(MessagePriority, wire.priority),
        deadline_ns=wire.deadline_ns,
        ttl_ms=wire.ttl_ms,
        routing_keys=tuple(wire.routing_keys),
        correlation_id=wire.correlation_id,
        delivery=to_enum(DeliveryGuarantee, wire.delivery),
        attempts=wire.attempts,
        key_id=wire.key_id,
        nonce=wire.nonce,
        signature=wire.signature,
    )
    wire.ClearField("signature")
    return envelope, wire.SerializeToString(deterministic=True)
