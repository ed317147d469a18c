"""Leyline's messages as frozen dataclasses: what the rooms hand one another.

Times ending in ``_ns`` are wall-clock nanoseconds since the epoch. Blueprints, slots and seeds are small integers
on the wire: blueprint 9 is ``BP009``, a slot is its index in the host, a seed its number within the run, from 1.

What a message holds several of is a named tuple: it is made in a seventh of the time that a frozen dataclass takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from esper_ray.contracts.enums import (
    BlendMode,
    BlueprintTier,
    BusMessageType,
    CircuitBreakerState,
    CommandType,
    DeliveryGuarantee,
    EmergencyLevel,
    FieldReportOutcome,
    HealthStatus,
    MessagePriority,
    RiskLevel,
    SeedLifecycleGate,
    SeedLifecycleStage,
    SeedOperation,
    TelemetryLevel,
)

Metrics = Mapping[str, float]
Text = Mapping[str, str]
_NO_METRICS: Metrics = {}
_NO_LABELS: Text = {}


def blueprint_name(number: int) -> str:
    """``9 -> "BP009"``."""
    return f"BP{number:03d}"


def blueprint_number(name: str) -> int:
    """``"BP009" -> 9``."""
    return int(name.removeprefix("BP"))


class HardwareContext(NamedTuple):
    device_kind: str = "cpu"
    device_id: int = 0
    memory_total_mb: float = 0.0
    memory_free_mb: float = 0.0
    temperature_c: float = 0.0
    utilization: float = 0.0
    compute_capability: str = ""


class SeedState(NamedTuple):
    """One seed at a boundary; ``metrics`` uses the short keys of `contracts.metrics`."""

    seed: int
    slot: int
    blueprint: int
    stage: SeedLifecycleStage
    alpha: float = 0.0
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    depth: int = 0
    age_epochs: int = 0
    risk: float = 0.0
    metrics: Metrics = _NO_METRICS


@dataclass(frozen=True, slots=True)
class SystemState:
    """What Tamiyo sees of a run at one boundary; on the wire one or more ``SystemStatePacket``."""

    run: str
    epoch: int
    global_step: int
    timestamp_ns: int
    training_loss: float
    validation_loss: float
    validation_accuracy: float
    metrics: Metrics = field(default_factory=dict)
    hardware: HardwareContext = field(default_factory=HardwareContext)
    seeds: tuple[SeedState, ...] = ()
    branch: int = 0


@dataclass(frozen=True, slots=True)
class SeedDirective:
    """What to do with a slot's seed; an UNKNOWN mode and an empty schedule leave the ramp to the configuration."""

    operation: SeedOperation
    blueprint: int = 0
    parameters: Metrics = field(default_factory=dict)
    blend_mode: BlendMode = BlendMode.UNKNOWN
    blend_schedule: str = ""


@dataclass(frozen=True, slots=True)
class OptimizerAdjustment:
    """Another policy for the learning rate, by its name, and a factor on the present rate."""

    policy: str
    learning_rate_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class BreakerDirective:
    breaker: str
    state: CircuitBreakerState


@dataclass(frozen=True, slots=True)
class RollbackDirective:
    """Back to the end of ``epoch``.

    With the annotation ``to: last`` the epoch is not meant: the run goes back to the newest state it has. With
    ``how: full`` the state is read from disk.
    """

    epoch: int


@dataclass(frozen=True, slots=True)
class PauseDirective:
    paused: bool


@dataclass(frozen=True, slots=True)
class EmergencyDirective:
    level: EmergencyLevel
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AdaptationCommand:
    """One operation, with the directive of its type.

    ``annotations`` carries the rationale: which signal, which threshold.
    """

    command_id: int
    type: CommandType
    run: str
    epoch: int
    issued_at_ns: int
    issued_by: str
    slot: int = 0
    seed: int = 0
    deadline_ms: float = 0.0
    seed_directive: SeedDirective | None = None
    annotations: Text = field(default_factory=dict)
    branch: int = 0
    rollback: RollbackDirective | None = None
    pause: PauseDirective | None = None
    emergency: EmergencyDirective | None = None
    optimizer: OptimizerAdjustment | None = None
    breaker: BreakerDirective | None = None


@dataclass(frozen=True, slots=True)
class FieldReport:
    """What one decision led to, measured over its observation window."""

    report_id: int
    command_id: int
    run: str
    seed: int
    slot: int
    blueprint: int
    outcome: FieldReportOutcome
    metrics: Metrics
    window_epochs: int
    issued_at_ns: int
    policy_version: str
    mitigations: tuple[str, ...] = ()
    notes: str = ""


class HeadDecision(NamedTuple):
    """What one action head chose: its index, the log-probability it had, and which indices were legal."""

    head: str
    choice: int
    log_probability: float
    mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One micro-step of a decision, as Simic needs it to learn from it.

    Attributes:
        policy_version: who decided: a policy's id, or the name of a controller.
        heads: those that applied; empty in a terminal record.
        value: the policy's estimate of the return from here, 0 where who decided has none.
        observation_digest: names the stored observation.
        exploration: probability of a random action; 0 means that only imitation can learn from it.
        place: which micro-step of its boundary, from 0.
        terminal: the run has ended; the observation is that of its last state.
    """

    command_id: int
    policy_version: str
    run: str
    epoch: int
    observation_digest: str
    heads: tuple[HeadDecision, ...] = ()
    value: float = 0.0
    exploration: float = 0.0
    place: int = 0
    branch: int = 0
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """Which policy decides from now on; an empty ``artifact_digest`` hands the decisions back to the heuristic."""

    policy_id: str
    parent_policy_id: str
    artifact_digest: str
    issued_at_ns: int
    validation: Metrics = field(default_factory=dict)


class MetricPoint(NamedTuple):
    key: str
    value: float
    labels: Text = _NO_LABELS


@dataclass(frozen=True, slots=True)
class TelemetryEvent:
    kind: str
    level: TelemetryLevel
    message: str
    attributes: Text = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """How long something took; ``parent_id`` is 0 for the outermost span of a trace."""

    trace_id: int
    span_id: int
    parent_id: int
    name: str
    start_ns: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class SystemHealth:
    status: HealthStatus
    summary: str = ""


class TelemetryPacket(NamedTuple):
    packet_id: int
    timestamp_ns: int
    source: str
    level: TelemetryLevel = TelemetryLevel.INFO
    metrics: tuple[MetricPoint, ...] = ()
    events: tuple[TelemetryEvent, ...] = ()
    run: str = ""
    epoch: int = 0
    spans: tuple[TraceSpan, ...] = ()
    health: SystemHealth | None = None


@dataclass(frozen=True, slots=True)
class EmergencySignal:
    level: EmergencyLevel
    reason: str
    origin: str
    triggered_at_ns: int
    monotonic_ms: float = 0.0
    run: str = ""


@dataclass(frozen=True, slots=True)
class GateEvent:
    """One gate's verdict with the figures it rested on."""

    run: str
    seed: int
    slot: int
    epoch: int
    gate: SeedLifecycleGate
    passed: bool
    from_stage: SeedLifecycleStage
    to_stage: SeedLifecycleStage
    evidence: Metrics
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """A checkpoint of a run; ``digest`` is the SHA-256 of its manifest."""

    run: str
    epoch: int
    global_step: int
    digest: str
    created_at_ns: int
    branch: int = 0


@dataclass(frozen=True, slots=True)
class RiskAssessment:
    """``signals`` are between 0 and 1, by name."""

    level: RiskLevel
    signals: Metrics
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KernelPrefetchRequest:
    """Have this blueprint's kernel ready for slots of that signature."""

    request_id: int
    blueprint: int
    signature: str
    issued_at_ns: int


@dataclass(frozen=True, slots=True)
class KernelPrefetchReady:
    """The kernel is there: SHA-256 and CRC-32 of the artifact, and how long a first pass takes."""

    request_id: int
    blueprint: int
    artifact_digest: str
    checksum: int
    prewarm_p50_ms: float
    prewarm_p95_ms: float


@dataclass(frozen=True, slots=True)
class KernelPrefetchError:
    request_id: int
    blueprint: int
    reason: str


@dataclass(frozen=True, slots=True)
class BlueprintDescriptor:
    """A blueprint as the catalogue has it; bounds are by the parameters' own names."""

    blueprint: int
    name: str
    tier: BlueprintTier
    family: str
    stage: str = ""
    risk: float = 0.0
    parameter_lower: Metrics = field(default_factory=dict)
    parameter_upper: Metrics = field(default_factory=dict)
    approval_required: bool = False
    quarantined: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True)
class BlueprintQuery:
    """What fits a slot; a budget of 0 is none."""

    task_kind: str
    signature: str
    tier_ceiling: BlueprintTier
    parameter_budget: int = 0
    latency_budget_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class KernelCatalogUpdate:
    blueprint: int
    signature: str
    artifact_digest: str
    compile_ms: float


class EventEnvelope(NamedTuple):
    """What wraps every message on the bus and every direct command."""

    event_id: bytes
    type: BusMessageType
    source: str
    created_at_ns: int
    payload: bytes
    payload_type: str
    priority: MessagePriority = MessagePriority.NORMAL
    deadline_ns: int = 0
    ttl_ms: int = 0
    routing_keys: tuple[str, ...] = ()
    correlation_id: bytes = b""
    delivery: DeliveryGuarantee = DeliveryGuarantee.AT_LEAST_ONCE
    attempts: int = 0
    key_id: str = ""
    nonce: bytes = b""
    signature: bytes = b""
