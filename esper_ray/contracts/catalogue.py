"""The codec of kernels and blueprints, of checkpoints and of risk."""

from __future__ import annotations

from esper_ray.contracts import leyline_pb2 as pb
from esper_ray.contracts.enums import BlueprintTier, RiskLevel
from esper_ray.contracts.messages import (
    BlueprintDescriptor,
    BlueprintQuery,
    CheckpointMetadata,
    KernelPrefetchError,
    KernelPrefetchReady,
    KernelPrefetchRequest,
    RiskAssessment,
)
from esper_ray.contracts.wire import VERSION, finite, finite_value, parse, to_enum


def encode_prefetch_request(request: KernelPrefetchRequest) -> bytes:
    return pb.KernelPrefetchRequest(
        version=VERSION,
        request_id=request.request_id,
        blueprint=request.blueprint,
        signature=request.signature,
        issued_at_ns=request.issued_at_ns,
    ).SerializeToString()


def decode_prefetch_request(data: bytes) -> KernelPrefetchRequest:
    wire = parse(pb.KernelPrefetchRequest, data)
    return KernelPrefetchRequest(wire.request_id, wire.blueprint, wire.signature, wire.issued_at_ns)


def encode_prefetch_ready(ready: KernelPrefetchReady) -> bytes:
    return pb.KernelPrefetchReady(
        version=VERSION,
        request_id=ready.request_id,
        blueprint=ready.blueprint,
        artifact_digest=ready.artifact_digest,
        checksum=ready.checksum,
        prewarm_p50_ms=finite_value("prewarm_p50_ms", ready.prewarm_p50_ms),
        prewarm_p95_ms=finite_value("prewarm_p95_ms", ready.prewarm_p95_ms),
    ).SerializeToString()


def decode_prefetch_ready(data: bytes) -> KernelPrefetchReady:
    wire = parse(pb.KernelPrefetchReady, data)
    return KernelPrefetchReady(
        request_id=wire.request_id,
        blueprint=wire.blueprint,
        artifact_digest=wire.artifact_digest,
        checksum=wire.checksum,
        prewarm_p50_ms=finite_value("prewarm_p50_ms", wire.prewarm_p50_ms),
        prewarm_p95_ms=finite_value("prewarm_p95_ms", wire.prewarm_p95_ms),
    )


def encode_prefetch_error(error: KernelPrefetchError) -> bytes:
    return pb.KernelPrefetchError(
        version=VERSION, request_id=error.request_id, blueprint=error.blueprint, reason=error.reason
    ).SerializeToString()


def decode_prefetch_error(data: bytes) -> KernelPrefetchError:
    wire = parse(pb.KernelPrefetchError, data)
    return KernelPrefetchError(wire.request_id, wire.blueprint, wire.reason)


def encode_blueprint(blueprint: BlueprintDescriptor) -> bytes:
    return pb.BlueprintDescriptor(
        version=VERSION,
        blueprint=blueprint.blueprint,
        name=blueprint.name,
        tier=int(blueprint.tier),  # type: ignore[arg-type]
        family=blueprint.family,
        stage=blueprint.stage,
        risk=finite_value("risk", blueprint.risk),
        parameter_lower=finite(blueprint.parameter_lower),
        parameter_upper=finite(blueprint.parameter_upper),
        approval_required=blueprint.approval_required,
        quarantined=blueprint.quarantined,
        description=blueprint.description,
    ).SerializeToString()


def decode_blueprint(data: bytes) -> BlueprintDescriptor:
    wire = parse(pb.BlueprintDescriptor, data)
    return BlueprintDescriptor(
        blueprint=wire.blueprint,
        name=wire.name,
        tier=to_enum(BlueprintTier, wire.tier),
        family=wire.family,
        stage=wire.stage,
        risk=finite_value("risk", wire.risk),
        parameter_lower=finite(wire.parameter_lower),
        parameter_upper=finite(wire.parameter_upper),
        approval_required=wire.approval_required,
        quarantined=wire.quarantined,
        description=wire.description,
    )


def encode_query(query: BlueprintQuery) -> bytes:
    return pb.BlueprintQuery(
        version=VERSION,
        task_kind=query.task_kind,
        signature=query.signature,
        tier_ceiling=int(query.tier_ceiling),  # type: ignore[arg-type]
        parameter_budget=query.parameter_budget,
        latency_budget_ms=finite_value("latency_budget_ms", query.latency_budget_ms),
    ).SerializeToString()


def decode_query(data: bytes) -> BlueprintQuery:
    wire = parse(pb.BlueprintQuery, data)
    return BlueprintQuery(
        task_kind=wire.task_kind,
        signature=wire.signature,
        tier_ceiling=to_enum(BlueprintTier, wire.tier_ceiling),
        parameter_budget=wire.parameter_budget,
        latency_budget_ms=finite_value("latency_budget_ms", wire.latency_budget_ms),
    )


def encode_checkpoint(checkpoint: CheckpointMetadata) -> bytes:
    return pb.CheckpointMetadata(
        version=VERSION,
        run=checkpoint.run,
        epoch=checkpoint.epoch,
        global_step=checkpoint.global_step,
        digest=checkpoint.digest,
        created_at_ns=checkpoint.created_at_ns,
        branch=checkpoint.branch,
    ).SerializeToString()


def decode_checkpoint(data: bytes) -> CheckpointMetadata:
    wire = parse(pb.CheckpointMetadata, data)
    return CheckpointMetadata(
        wire.run, wire.epoch, wire.global_step, wire.digest, wire.created_at_ns, branch=wire.branch
    )


def encode_risk(risk: RiskAssessment) -> bytes:
    return pb.RiskAssessment(
        version=VERSION,
        level=int(risk.level),  # type: ignore[arg-type]
        signals=finite(risk.signals),
        reason=risk.reason,
    ).SerializeToString()


def decode_risk(data: bytes) -> RiskAssessment:
    wire = parse(pb.RiskAssessment, data)
    return RiskAssessment(to_enum(RiskLevel, wire.level), finite(wire.signals), wire.reason)
