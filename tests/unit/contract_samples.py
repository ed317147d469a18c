"""One of each message, with every field set, and the codec of each: what the tests of the contracts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esper_ray.contracts import catalogue, codec, enums, learning
from esper_ray.contracts import messages as m
from esper_ray.contracts.enums import SeedLifecycleStage

NOW = 1_790_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class Codec:
    """``wire`` names the generated message; ``samples`` are ours."""

    wire: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    samples: tuple[Any, ...]


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


def _command(kind: enums.CommandType, **directive: Any) -> m.AdaptationCommand:
    return m.AdaptationCommand(3, kind, "run", 4, NOW, "operator", **directive)


COMMANDS = (
    COMMAND,
    _command(enums.CommandType.NO_OP),
    _command(enums.CommandType.ROLLBACK, rollback=m.RollbackDirective(7)),
    _command(enums.CommandType.PAUSE, pause=m.PauseDirective(True)),
    _command(enums.CommandType.EMERGENCY, emergency=m.EmergencyDirective(enums.EmergencyLevel.HALT, "smoke")),
    _command(enums.CommandType.OPTIMIZER, optimizer=m.OptimizerAdjustment("cosine", 0.5)),
    _command(enums.CommandType.CIRCUIT_BREAKER, breaker=m.BreakerDirective("kernels", enums.CircuitBreakerState.OPEN)),
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
    (m.TraceSpan(1, 2, 3, "boundary", NOW, 18_000_000),),
    m.SystemHealth(enums.HealthStatus.DEGRADED, "slow disk"),
)
EMERGENCY = m.EmergencySignal(enums.EmergencyLevel.HALT, "loss is not finite", "tolaria", NOW, 12.5, "run")
GATE = m.GateEvent(
    "run",
    1,
    2,
    4,
    enums.SeedLifecycleGate.G1_GRADIENT_HEALTH,
    True,
    SeedLifecycleStage.TRAINING,
    SeedLifecycleStage.BLENDING,
    {"gradient_min": 0.5},
    "gradient is small",
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
# Masks come back as long as whole bytes make them.
RECORD = m.DecisionRecord(
    command_id=7,
    policy_version="policy-0011",
    run="glyphs-1",
    epoch=3,
    observation_digest="ab" * 32,
    heads=(m.HeadDecision("operation", 1, -0.5, (True, True, *(False,) * 6)),),
    value=0.25,
    exploration=0.125,
    place=1,
    branch=2,
    terminal=True,
)
POLICY = m.PolicyUpdate("policy-0011", "policy-0000", "cd" * 32, 5, {"g": 0.5})
READY = m.KernelPrefetchReady(4, 9, "ab" * 32, 2**32 - 1, 1.5, 2.5)
BLUEPRINT = m.BlueprintDescriptor(
    blueprint=36,
    name="mixture",
    tier=enums.BlueprintTier.EXPERIMENTAL,
    family="mixtures",
    stage="offered",
    risk=0.25,
    parameter_lower={"experts": 2.0},
    parameter_upper={"experts": 8.0},
    approval_required=True,
    quarantined=True,
    description="several small blocks and a gate",
)

CODECS: dict[str, Codec] = {
    "state": Codec(
        "SystemStatePacket",
        lambda message: codec.encode_state(message)[0],
        lambda data: codec.decode_state([data]),
        (state(0), state(1)),
    ),
    "command": Codec("AdaptationCommand", codec.encode_command, codec.decode_command, COMMANDS),
    "report": Codec("FieldReport", codec.encode_report, codec.decode_report, (REPORT,)),
    "telemetry": Codec("TelemetryPacket", codec.encode_telemetry, codec.decode_telemetry, (TELEMETRY,)),
    "emergency": Codec("EmergencySignal", codec.encode_emergency, codec.decode_emergency, (EMERGENCY,)),
    "gate": Codec("GateEvent", codec.encode_gate, codec.decode_gate, (GATE,)),
    "catalog update": Codec("KernelCatalogUpdate", codec.encode_catalog_update, codec.decode_catalog_update, (UPDATE,)),
    "envelope": Codec("EventEnvelope", codec.encode_envelope, codec.decode_envelope, (ENVELOPE,)),
    "decision": Codec("DecisionRecord", learning.encode_decision, learning.decode_decision, (RECORD,)),
    "policy": Codec("PolicyUpdate", learning.encode_policy_update, learning.decode_policy_update, (POLICY,)),
    "prefetch request": Codec(
        "KernelPrefetchRequest",
        catalogue.encode_prefetch_request,
        catalogue.decode_prefetch_request,
        (m.KernelPrefetchRequest(4, 9, "conv-32x12x12-float32-cpu", NOW),),
    ),
    "prefetch ready": Codec(
        "KernelPrefetchReady", catalogue.encode_prefetch_ready, catalogue.decode_prefetch_ready, (READY,)
    ),
    "prefetch error": Codec(
        "KernelPrefetchError",
        catalogue.encode_prefetch_error,
        catalogue.decode_prefetch_error,
        (m.KernelPrefetchError(4, 9, "no such blueprint"),),
    ),
    "blueprint": Codec("BlueprintDescriptor", catalogue.encode_blueprint, catalogue.decode_blueprint, (BLUEPRINT,)),
    "query": Codec(
        "BlueprintQuery",
        catalogue.encode_query,
        catalogue.decode_query,
        (m.BlueprintQuery("conv", "conv-32x12x12-float32-cpu", enums.BlueprintTier.SAFE, 1000, 0.5),),
    ),
    "checkpoint": Codec(
        "CheckpointMetadata",
        catalogue.encode_checkpoint,
        catalogue.decode_checkpoint,
        (m.CheckpointMetadata("run", 3, 120, "ab" * 32, NOW, 2),),
    ),
    "risk": Codec(
        "RiskAssessment",
        catalogue.encode_risk,
        catalogue.decode_risk,
        (m.RiskAssessment(enums.RiskLevel.ORANGE, {"gradient": 0.75}, "gradient above 0.5"),),
    ),
}
