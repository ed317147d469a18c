from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SeedLifecycleStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_STAGE_UNKNOWN: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_DORMANT: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_GERMINATED: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_TRAINING: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_BLENDING: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_SHADOWING: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_PROBATIONARY: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_FOSSILIZED: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_CULLED: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_EMBARGOED: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_RESETTING: _ClassVar[SeedLifecycleStage]
    SEED_STAGE_TERMINATED: _ClassVar[SeedLifecycleStage]

class SeedLifecycleGate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GATE_UNKNOWN: _ClassVar[SeedLifecycleGate]
    GATE_G0_SANITY: _ClassVar[SeedLifecycleGate]
    GATE_G1_GRADIENT_HEALTH: _ClassVar[SeedLifecycleGate]
    GATE_G2_STABILITY: _ClassVar[SeedLifecycleGate]
    GATE_G3_INTERFACE: _ClassVar[SeedLifecycleGate]
    GATE_G4_SYSTEM_IMPACT: _ClassVar[SeedLifecycleGate]
    GATE_G5_RESET: _ClassVar[SeedLifecycleGate]

class HealthStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEALTH_UNKNOWN: _ClassVar[HealthStatus]
    HEALTH_HEALTHY: _ClassVar[HealthStatus]
    HEALTH_DEGRADED: _ClassVar[HealthStatus]
    HEALTH_UNHEALTHY: _ClassVar[HealthStatus]
    HEALTH_CRITICAL: _ClassVar[HealthStatus]

class CircuitBreakerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BREAKER_UNKNOWN: _ClassVar[CircuitBreakerState]
    BREAKER_CLOSED: _ClassVar[CircuitBreakerState]
    BREAKER_OPEN: _ClassVar[CircuitBreakerState]
    BREAKER_HALF_OPEN: _ClassVar[CircuitBreakerState]

class CommandType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMAND_UNKNOWN: _ClassVar[CommandType]
    COMMAND_SEED: _ClassVar[CommandType]
    COMMAND_ROLLBACK: _ClassVar[CommandType]
    COMMAND_OPTIMIZER: _ClassVar[CommandType]
    COMMAND_CIRCUIT_BREAKER: _ClassVar[CommandType]
    COMMAND_PAUSE: _ClassVar[CommandType]
    COMMAND_EMERGENCY: _ClassVar[CommandType]
    COMMAND_STRUCTURAL_PRUNING: _ClassVar[CommandType]
    COMMAND_NO_OP: _ClassVar[CommandType]

class SeedOperation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_OP_UNKNOWN: _ClassVar[SeedOperation]
    SEED_OP_GERMINATE: _ClassVar[SeedOperation]
    SEED_OP_START_TRAINING: _ClassVar[SeedOperation]
    SEED_OP_START_GRAFTING: _ClassVar[SeedOperation]
    SEED_OP_STABILIZE: _ClassVar[SeedOperation]
    SEED_OP_EVALUATE: _ClassVar[SeedOperation]
    SEED_OP_FINE_TUNE: _ClassVar[SeedOperation]
    SEED_OP_FOSSILIZE: _ClassVar[SeedOperation]
    SEED_OP_CULL: _ClassVar[SeedOperation]
    SEED_OP_CANCEL: _ClassVar[SeedOperation]

class BlendMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLEND_UNKNOWN: _ClassVar[BlendMode]
    BLEND_RESIDUAL: _ClassVar[BlendMode]
    BLEND_CONVEX: _ClassVar[BlendMode]
    BLEND_CHANNEL: _ClassVar[BlendMode]
    BLEND_CONFIDENCE: _ClassVar[BlendMode]

class MessagePriority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[MessagePriority]
    PRIORITY_LOW: _ClassVar[MessagePriority]
    PRIORITY_NORMAL: _ClassVar[MessagePriority]
    PRIORITY_HIGH: _ClassVar[MessagePriority]
    PRIORITY_CRITICAL: _ClassVar[MessagePriority]

class DeliveryGuarantee(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DELIVERY_UNKNOWN: _ClassVar[DeliveryGuarantee]
    DELIVERY_AT_LEAST_ONCE: _ClassVar[DeliveryGuarantee]
    DELIVERY_AT_MOST_ONCE: _ClassVar[DeliveryGuarantee]
    DELIVERY_EXACTLY_ONCE: _ClassVar[DeliveryGuarantee]

class TelemetryLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEVEL_UNSPECIFIED: _ClassVar[TelemetryLevel]
    LEVEL_INFO: _ClassVar[TelemetryLevel]
    LEVEL_WARNING: _ClassVar[TelemetryLevel]
    LEVEL_ERROR: _ClassVar[TelemetryLevel]
    LEVEL_CRITICAL: _ClassVar[TelemetryLevel]

class EmergencyLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMERGENCY_UNSPECIFIED: _ClassVar[EmergencyLevel]
    EMERGENCY_NOTICE: _ClassVar[EmergencyLevel]
    EMERGENCY_ELEVATED: _ClassVar[EmergencyLevel]
    EMERGENCY_CONSERVATIVE: _ClassVar[EmergencyLevel]
    EMERGENCY_HALT: _ClassVar[EmergencyLevel]

class RiskLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RISK_UNKNOWN: _ClassVar[RiskLevel]
    RISK_GREEN: _ClassVar[RiskLevel]
    RISK_YELLOW: _ClassVar[RiskLevel]
    RISK_ORANGE: _ClassVar[RiskLevel]
    RISK_RED: _ClassVar[RiskLevel]
    RISK_CRITICAL: _ClassVar[RiskLevel]

class FieldReportOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[FieldReportOutcome]
    OUTCOME_SUCCESS: _ClassVar[FieldReportOutcome]
    OUTCOME_NEUTRAL: _ClassVar[FieldReportOutcome]
    OUTCOME_REGRESSION: _ClassVar[FieldReportOutcome]
    OUTCOME_ABORTED: _ClassVar[FieldReportOutcome]

class BlueprintTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[BlueprintTier]
    TIER_SAFE: _ClassVar[BlueprintTier]
    TIER_EXPERIMENTAL: _ClassVar[BlueprintTier]
    TIER_HIGH_RISK: _ClassVar[BlueprintTier]

class BusMessageType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUS_UNSPECIFIED: _ClassVar[BusMessageType]
    BUS_SYSTEM_STATE: _ClassVar[BusMessageType]
    BUS_ADAPTATION_COMMAND: _ClassVar[BusMessageType]
    BUS_FIELD_REPORT: _ClassVar[BusMessageType]
    BUS_TELEMETRY: _ClassVar[BusMessageType]
    BUS_POLICY_UPDATE: _ClassVar[BusMessageType]
    BUS_KERNEL_PREFETCH_REQUEST: _ClassVar[BusMessageType]
    BUS_KERNEL_PREFETCH_READY: _ClassVar[BusMessageType]
    BUS_KERNEL_PREFETCH_ERROR: _ClassVar[BusMessageType]
    BUS_KERNEL_CATALOG_UPDATE: _ClassVar[BusMessageType]
    BUS_EMERGENCY_SIGNAL: _ClassVar[BusMessageType]
    BUS_ALERT: _ClassVar[BusMessageType]
    BUS_DECISION_RECORD: _ClassVar[BusMessageType]
SEED_STAGE_UNKNOWN: SeedLifecycleStage
SEED_STAGE_DORMANT: SeedLifecycleStage
SEED_STAGE_GERMINATED: SeedLifecycleStage
SEED_STAGE_TRAINING: SeedLifecycleStage
SEED_STAGE_BLENDING: SeedLifecycleStage
SEED_STAGE_SHADOWING: SeedLifecycleStage
SEED_STAGE_PROBATIONARY: SeedLifecycleStage
SEED_STAGE_FOSSILIZED: SeedLifecycleStage
SEED_STAGE_CULLED: SeedLifecycleStage
SEED_STAGE_EMBARGOED: SeedLifecycleStage
SEED_STAGE_RESETTING: SeedLifecycleStage
SEED_STAGE_TERMINATED: SeedLifecycleStage
GATE_UNKNOWN: SeedLifecycleGate
GATE_G0_SANITY: SeedLifecycleGate
GATE_G1_GRADIENT_HEALTH: SeedLifecycleGate
GATE_G2_STABILITY: SeedLifecycleGate
GATE_G3_INTERFACE: SeedLifecycleGate
GATE_G4_SYSTEM_IMPACT: SeedLifecycleGate
GATE_G5_RESET: SeedLifecycleGate
HEALTH_UNKNOWN: HealthStatus
HEALTH_HEALTHY: HealthStatus
HEALTH_DEGRADED: HealthStatus
HEALTH_UNHEALTHY: HealthStatus
HEALTH_CRITICAL: HealthStatus
BREAKER_UNKNOWN: CircuitBreakerState
BREAKER_CLOSED: CircuitBreakerState
BREAKER_OPEN: CircuitBreakerState
BREAKER_HALF_OPEN: CircuitBreakerState
COMMAND_UNKNOWN: CommandType
COMMAND_SEED: CommandType
COMMAND_ROLLBACK: CommandType
COMMAND_OPTIMIZER: CommandType
COMMAND_CIRCUIT_BREAKER: CommandType
COMMAND_PAUSE: CommandType
COMMAND_EMERGENCY: CommandType
COMMAND_STRUCTURAL_PRUNING: CommandType
COMMAND_NO_OP: CommandType
SEED_OP_UNKNOWN: SeedOperation
SEED_OP_GERMINATE: SeedOperation
SEED_OP_START_TRAINING: SeedOperation
SEED_OP_START_GRAFTING: SeedOperation
SEED_OP_STABILIZE: SeedOperation
SEED_OP_EVALUATE: SeedOperation
SEED_OP_FINE_TUNE: SeedOperation
SEED_OP_FOSSILIZE: SeedOperation
SEED_OP_CULL: SeedOperation
SEED_OP_CANCEL: SeedOperation
BLEND_UNKNOWN: BlendMode
BLEND_RESIDUAL: BlendMode
BLEND_CONVEX: BlendMode
BLEND_CHANNEL: BlendMode
BLEND_CONFIDENCE: BlendMode
PRIORITY_UNSPECIFIED: MessagePriority
PRIORITY_LOW: MessagePriority
PRIORITY_NORMAL: MessagePriority
PRIORITY_HIGH: MessagePriority
PRIORITY_CRITICAL: MessagePriority
DELIVERY_UNKNOWN: DeliveryGuarantee
DELIVERY_AT_LEAST_ONCE: DeliveryGuarantee
DELIVERY_AT_MOST_ONCE: DeliveryGuarantee
DELIVERY_EXACTLY_ONCE: DeliveryGuarantee
LEVEL_UNSPECIFIED: TelemetryLevel
LEVEL_INFO: TelemetryLevel
LEVEL_WARNING: TelemetryLevel
LEVEL_ERROR: TelemetryLevel
LEVEL_CRITICAL: TelemetryLevel
EMERGENCY_UNSPECIFIED: EmergencyLevel
EMERGENCY_NOTICE: EmergencyLevel
EMERGENCY_ELEVATED: EmergencyLevel
EMERGENCY_CONSERVATIVE: EmergencyLevel
EMERGENCY_HALT: EmergencyLevel
RISK_UNKNOWN: RiskLevel
RISK_GREEN: RiskLevel
RISK_YELLOW: RiskLevel
RISK_ORANGE: RiskLevel
RISK_RED: RiskLevel
RISK_CRITICAL: RiskLevel
OUTCOME_UNSPECIFIED: FieldReportOutcome
OUTCOME_SUCCESS: FieldReportOutcome
OUTCOME_NEUTRAL: FieldReportOutcome
OUTCOME_REGRESSION: FieldReportOutcome
OUTCOME_ABORTED: FieldReportOutcome
TIER_UNSPECIFIED: BlueprintTier
TIER_SAFE: BlueprintTier
TIER_EXPERIMENTAL: BlueprintTier
TIER_HIGH_RISK: BlueprintTier
BUS_UNSPECIFIED: BusMessageType
BUS_SYSTEM_STATE: BusMessageType
BUS_ADAPTATION_COMMAND: BusMessageType
BUS_FIELD_REPORT: BusMessageType
BUS_TELEMETRY: BusMessageType
BUS_POLICY_UPDATE: BusMessageType
BUS_KERNEL_PREFETCH_REQUEST: BusMessageType
BUS_KERNEL_PREFETCH_READY: BusMessageType
BUS_KERNEL_PREFETCH_ERROR: BusMessageType
BUS_KERNEL_CATALOG_UPDATE: BusMessageType
BUS_EMERGENCY_SIGNAL: BusMessageType
BUS_ALERT: BusMessageType
BUS_DECISION_RECORD: BusMessageType

class HardwareContext(_message.Message):
    __slots__ = ("device_kind", "device_id", "memory_total_mb", "memory_free_mb", "temperature_c", "utilization", "compute_capability")
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_MB_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_MB_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    device_kind: str
    device_id: int
    memory_total_mb: float
    memory_free_mb: float
    temperature_c: float
    utilization: float
    compute_capability: str
    def __init__(self, device_kind: _Optional[str] = ..., device_id: _Optional[int] = ..., memory_total_mb: _Optional[float] = ..., memory_free_mb: _Optional[float] = ..., temperature_c: _Optional[float] = ..., utilization: _Optional[float] = ..., compute_capability: _Optional[str] = ...) -> None: ...

class SeedState(_message.Message):
    __slots__ = ("seed", "slot", "blueprint", "stage", "alpha", "gradient_norm", "learning_rate", "depth", "age_epochs", "risk", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SEED_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    AGE_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    seed: int
    slot: int
    blueprint: int
    stage: SeedLifecycleStage
    alpha: float
    gradient_norm: float
    learning_rate: float
    depth: int
    age_epochs: int
    risk: float
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, seed: _Optional[int] = ..., slot: _Optional[int] = ..., blueprint: _Optional[int] = ..., stage: _Optional[_Union[SeedLifecycleStage, str]] = ..., alpha: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., depth: _Optional[int] = ..., age_epochs: _Optional[int] = ..., risk: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SystemStatePacket(_message.Message):
    __slots__ = ("version", "run", "epoch", "global_step", "timestamp_ns", "training_loss", "validation_loss", "validation_accuracy", "metrics", "hardware", "seeds", "part", "parts", "branch")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_NS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_LOSS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    epoch: int
    global_step: int
    timestamp_ns: int
    training_loss: float
    validation_loss: float
    validation_accuracy: float
    metrics: _containers.ScalarMap[str, float]
    hardware: HardwareContext
    seeds: _containers.RepeatedCompositeFieldContainer[SeedState]
    part: int
    parts: int
    branch: int
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., epoch: _Optional[int] = ..., global_step: _Optional[int] = ..., timestamp_ns: _Optional[int] = ..., training_loss: _Optional[float] = ..., validation_loss: _Optional[float] = ..., validation_accuracy: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., hardware: _Optional[_Union[HardwareContext, _Mapping]] = ..., seeds: _Optional[_Iterable[_Union[SeedState, _Mapping]]] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., branch: _Optional[int] = ...) -> None: ...

class SeedDirective(_message.Message):
    __slots__ = ("operation", "blueprint", "parameters", "blend_mode", "blend_schedule")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BLEND_MODE_FIELD_NUMBER: _ClassVar[int]
    BLEND_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    operation: SeedOperation
    blueprint: int
    parameters: _containers.ScalarMap[str, float]
    blend_mode: BlendMode
    blend_schedule: str
    def __init__(self, operation: _Optional[_Union[SeedOperation, str]] = ..., blueprint: _Optional[int] = ..., parameters: _Optional[_Mapping[str, float]] = ..., blend_mode: _Optional[_Union[BlendMode, str]] = ..., blend_schedule: _Optional[str] = ...) -> None: ...

class OptimizerAdjustment(_message.Message):
    __slots__ = ("policy", "learning_rate_factor")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    policy: str
    learning_rate_factor: float
    def __init__(self, policy: _Optional[str] = ..., learning_rate_factor: _Optional[float] = ...) -> None: ...

class BreakerDirective(_message.Message):
    __slots__ = ("breaker", "state")
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    breaker: str
    state: CircuitBreakerState
    def __init__(self, breaker: _Optional[str] = ..., state: _Optional[_Union[CircuitBreakerState, str]] = ...) -> None: ...

class RollbackDirective(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class PauseDirective(_message.Message):
    __slots__ = ("paused",)
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    paused: bool
    def __init__(self, paused: _Optional[bool] = ...) -> None: ...

class EmergencyDirective(_message.Message):
    __slots__ = ("level", "reason")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    level: EmergencyLevel
    reason: str
    def __init__(self, level: _Optional[_Union[EmergencyLevel, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class AdaptationCommand(_message.Message):
    __slots__ = ("version", "command_id", "type", "run", "epoch", "slot", "seed", "deadline_ms", "issued_at_ns", "issued_by", "seed_directive", "optimizer", "breaker", "rollback", "pause", "emergency", "annotations", "branch")
    class AnnotationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_BY_FIELD_NUMBER: _ClassVar[int]
    SEED_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    EMERGENCY_FIELD_NUMBER: _ClassVar[int]
    ANNOTATIONS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    version: int
    command_id: int
    type: CommandType
    run: str
    epoch: int
    slot: int
    seed: int
    deadline_ms: float
    issued_at_ns: int
    issued_by: str
    seed_directive: SeedDirective
    optimizer: OptimizerAdjustment
    breaker: BreakerDirective
    rollback: RollbackDirective
    pause: PauseDirective
    emergency: EmergencyDirective
    annotations: _containers.ScalarMap[str, str]
    branch: int
    def __init__(self, version: _Optional[int] = ..., command_id: _Optional[int] = ..., type: _Optional[_Union[CommandType, str]] = ..., run: _Optional[str] = ..., epoch: _Optional[int] = ..., slot: _Optional[int] = ..., seed: _Optional[int] = ..., deadline_ms: _Optional[float] = ..., issued_at_ns: _Optional[int] = ..., issued_by: _Optional[str] = ..., seed_directive: _Optional[_Union[SeedDirective, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerAdjustment, _Mapping]] = ..., breaker: _Optional[_Union[BreakerDirective, _Mapping]] = ..., rollback: _Optional[_Union[RollbackDirective, _Mapping]] = ..., pause: _Optional[_Union[PauseDirective, _Mapping]] = ..., emergency: _Optional[_Union[EmergencyDirective, _Mapping]] = ..., annotations: _Optional[_Mapping[str, str]] = ..., branch: _Optional[int] = ...) -> None: ...

class FieldReport(_message.Message):
    __slots__ = ("version", "report_id", "command_id", "run", "seed", "blueprint", "outcome", "metrics", "window_epochs", "issued_at_ns", "policy_version", "mitigations", "notes", "slot")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPORT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    MITIGATIONS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    version: int
    report_id: int
    command_id: int
    run: str
    seed: int
    blueprint: int
    outcome: FieldReportOutcome
    metrics: _containers.ScalarMap[str, float]
    window_epochs: int
    issued_at_ns: int
    policy_version: str
    mitigations: _containers.RepeatedScalarFieldContainer[str]
    notes: str
    slot: int
    def __init__(self, version: _Optional[int] = ..., report_id: _Optional[int] = ..., command_id: _Optional[int] = ..., run: _Optional[str] = ..., seed: _Optional[int] = ..., blueprint: _Optional[int] = ..., outcome: _Optional[_Union[FieldReportOutcome, str]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., window_epochs: _Optional[int] = ..., issued_at_ns: _Optional[int] = ..., policy_version: _Optional[str] = ..., mitigations: _Optional[_Iterable[str]] = ..., notes: _Optional[str] = ..., slot: _Optional[int] = ...) -> None: ...

class HeadDecision(_message.Message):
    __slots__ = ("head", "choice", "log_probability", "mask")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    head: str
    choice: int
    log_probability: float
    mask: bytes
    def __init__(self, head: _Optional[str] = ..., choice: _Optional[int] = ..., log_probability: _Optional[float] = ..., mask: _Optional[bytes] = ...) -> None: ...

class DecisionRecord(_message.Message):
    __slots__ = ("version", "command_id", "policy_version", "heads", "value", "observation_digest", "run", "epoch", "exploration", "place", "branch", "terminal")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPLORATION_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    version: int
    command_id: int
    policy_version: str
    heads: _containers.RepeatedCompositeFieldContainer[HeadDecision]
    value: float
    observation_digest: str
    run: str
    epoch: int
    exploration: float
    place: int
    branch: int
    terminal: bool
    def __init__(self, version: _Optional[int] = ..., command_id: _Optional[int] = ..., policy_version: _Optional[str] = ..., heads: _Optional[_Iterable[_Union[HeadDecision, _Mapping]]] = ..., value: _Optional[float] = ..., observation_digest: _Optional[str] = ..., run: _Optional[str] = ..., epoch: _Optional[int] = ..., exploration: _Optional[float] = ..., place: _Optional[int] = ..., branch: _Optional[int] = ..., terminal: _Optional[bool] = ...) -> None: ...

class PolicyUpdate(_message.Message):
    __slots__ = ("version", "policy_id", "parent_policy_id", "artifact_digest", "validation", "issued_at_ns")
    class ValidationEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    version: int
    policy_id: str
    parent_policy_id: str
    artifact_digest: str
    validation: _containers.ScalarMap[str, float]
    issued_at_ns: int
    def __init__(self, version: _Optional[int] = ..., policy_id: _Optional[str] = ..., parent_policy_id: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., validation: _Optional[_Mapping[str, float]] = ..., issued_at_ns: _Optional[int] = ...) -> None: ...

class KernelPrefetchRequest(_message.Message):
    __slots__ = ("version", "request_id", "blueprint", "signature", "issued_at_ns")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: int
    blueprint: int
    signature: str
    issued_at_ns: int
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[int] = ..., blueprint: _Optional[int] = ..., signature: _Optional[str] = ..., issued_at_ns: _Optional[int] = ...) -> None: ...

class KernelPrefetchReady(_message.Message):
    __slots__ = ("version", "request_id", "blueprint", "artifact_digest", "prewarm_p50_ms", "prewarm_p95_ms", "checksum")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREWARM_P50_MS_FIELD_NUMBER: _ClassVar[int]
    PREWARM_P95_MS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: int
    blueprint: int
    artifact_digest: str
    prewarm_p50_ms: float
    prewarm_p95_ms: float
    checksum: int
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[int] = ..., blueprint: _Optional[int] = ..., artifact_digest: _Optional[str] = ..., prewarm_p50_ms: _Optional[float] = ..., prewarm_p95_ms: _Optional[float] = ..., checksum: _Optional[int] = ...) -> None: ...

class KernelPrefetchError(_message.Message):
    __slots__ = ("version", "request_id", "blueprint", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: int
    blueprint: int
    reason: str
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[int] = ..., blueprint: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class KernelCatalogUpdate(_message.Message):
    __slots__ = ("version", "blueprint", "signature", "artifact_digest", "compile_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMPILE_MS_FIELD_NUMBER: _ClassVar[int]
    version: int
    blueprint: int
    signature: str
    artifact_digest: str
    compile_ms: float
    def __init__(self, version: _Optional[int] = ..., blueprint: _Optional[int] = ..., signature: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., compile_ms: _Optional[float] = ...) -> None: ...

class BlueprintDescriptor(_message.Message):
    __slots__ = ("version", "blueprint", "name", "tier", "family", "stage", "risk", "parameter_lower", "parameter_upper", "approval_required", "quarantined", "description")
    class ParameterLowerEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ParameterUpperEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_LOWER_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_UPPER_FIELD_NUMBER: _ClassVar[int]
    APPROVAL_REQUIRED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    version: int
    blueprint: int
    name: str
    tier: BlueprintTier
    family: str
    stage: str
    risk: float
    parameter_lower: _containers.ScalarMap[str, float]
    parameter_upper: _containers.ScalarMap[str, float]
    approval_required: bool
    quarantined: bool
    description: str
    def __init__(self, version: _Optional[int] = ..., blueprint: _Optional[int] = ..., name: _Optional[str] = ..., tier: _Optional[_Union[BlueprintTier, str]] = ..., family: _Optional[str] = ..., stage: _Optional[str] = ..., risk: _Optional[float] = ..., parameter_lower: _Optional[_Mapping[str, float]] = ..., parameter_upper: _Optional[_Mapping[str, float]] = ..., approval_required: _Optional[bool] = ..., quarantined: _Optional[bool] = ..., description: _Optional[str] = ...) -> None: ...

class BlueprintQuery(_message.Message):
    __slots__ = ("version", "task_kind", "signature", "tier_ceiling", "parameter_budget", "latency_budget_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASK_KIND_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    TIER_CEILING_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    version: int
    task_kind: str
    signature: str
    tier_ceiling: BlueprintTier
    parameter_budget: int
    latency_budget_ms: float
    def __init__(self, version: _Optional[int] = ..., task_kind: _Optional[str] = ..., signature: _Optional[str] = ..., tier_ceiling: _Optional[_Union[BlueprintTier, str]] = ..., parameter_budget: _Optional[int] = ..., latency_budget_ms: _Optional[float] = ...) -> None: ...

class MetricPoint(_message.Message):
    __slots__ = ("key", "value", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: float
    labels: _containers.ScalarMap[str, str]
    def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TelemetryEvent(_message.Message):
    __slots__ = ("kind", "level", "message", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    level: TelemetryLevel
    message: str
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., level: _Optional[_Union[TelemetryLevel, str]] = ..., message: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TraceSpan(_message.Message):
    __slots__ = ("trace_id", "span_id", "parent_id", "name", "start_ns", "duration_ns")
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    trace_id: int
    span_id: int
    parent_id: int
    name: str
    start_ns: int
    duration_ns: int
    def __init__(self, trace_id: _Optional[int] = ..., span_id: _Optional[int] = ..., parent_id: _Optional[int] = ..., name: _Optional[str] = ..., start_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class SystemHealth(_message.Message):
    __slots__ = ("status", "summary")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    status: HealthStatus
    summary: str
    def __init__(self, status: _Optional[_Union[HealthStatus, str]] = ..., summary: _Optional[str] = ...) -> None: ...

class TelemetryPacket(_message.Message):
    __slots__ = ("version", "packet_id", "timestamp_ns", "source", "level", "metrics", "events", "spans", "health", "run", "epoch")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PACKET_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_NS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    version: int
    packet_id: int
    timestamp_ns: int
    source: str
    level: TelemetryLevel
    metrics: _containers.RepeatedCompositeFieldContainer[MetricPoint]
    events: _containers.RepeatedCompositeFieldContainer[TelemetryEvent]
    spans: _containers.RepeatedCompositeFieldContainer[TraceSpan]
    health: SystemHealth
    run: str
    epoch: int
    def __init__(self, version: _Optional[int] = ..., packet_id: _Optional[int] = ..., timestamp_ns: _Optional[int] = ..., source: _Optional[str] = ..., level: _Optional[_Union[TelemetryLevel, str]] = ..., metrics: _Optional[_Iterable[_Union[MetricPoint, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[TelemetryEvent, _Mapping]]] = ..., spans: _Optional[_Iterable[_Union[TraceSpan, _Mapping]]] = ..., health: _Optional[_Union[SystemHealth, _Mapping]] = ..., run: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class EmergencySignal(_message.Message):
    __slots__ = ("version", "level", "reason", "origin", "triggered_at_ns", "monotonic_ms", "run")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_MS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    version: int
    level: EmergencyLevel
    reason: str
    origin: str
    triggered_at_ns: int
    monotonic_ms: float
    run: str
    def __init__(self, version: _Optional[int] = ..., level: _Optional[_Union[EmergencyLevel, str]] = ..., reason: _Optional[str] = ..., origin: _Optional[str] = ..., triggered_at_ns: _Optional[int] = ..., monotonic_ms: _Optional[float] = ..., run: _Optional[str] = ...) -> None: ...

class CheckpointMetadata(_message.Message):
    __slots__ = ("version", "run", "epoch", "global_step", "digest", "created_at_ns", "branch")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    epoch: int
    global_step: int
    digest: str
    created_at_ns: int
    branch: int
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., epoch: _Optional[int] = ..., global_step: _Optional[int] = ..., digest: _Optional[str] = ..., created_at_ns: _Optional[int] = ..., branch: _Optional[int] = ...) -> None: ...

class GateEvent(_message.Message):
    __slots__ = ("version", "run", "seed", "slot", "epoch", "gate", "passed", "from_stage", "to_stage", "evidence", "reason")
    class EvidenceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    seed: int
    slot: int
    epoch: int
    gate: SeedLifecycleGate
    passed: bool
    from_stage: SeedLifecycleStage
    to_stage: SeedLifecycleStage
    evidence: _containers.ScalarMap[str, float]
    reason: str
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., seed: _Optional[int] = ..., slot: _Optional[int] = ..., epoch: _Optional[int] = ..., gate: _Optional[_Union[SeedLifecycleGate, str]] = ..., passed: _Optional[bool] = ..., from_stage: _Optional[_Union[SeedLifecycleStage, str]] = ..., to_stage: _Optional[_Union[SeedLifecycleStage, str]] = ..., evidence: _Optional[_Mapping[str, float]] = ..., reason: _Optional[str] = ...) -> None: ...

class RiskAssessment(_message.Message):
    __slots__ = ("version", "level", "signals", "reason")
    class SignalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    level: RiskLevel
    signals: _containers.ScalarMap[str, float]
    reason: str
    def __init__(self, version: _Optional[int] = ..., level: _Optional[_Union[RiskLevel, str]] = ..., signals: _Optional[_Mapping[str, float]] = ..., reason: _Optional[str] = ...) -> None: ...

class EventEnvelope(_message.Message):
    __slots__ = ("version", "event_id", "type", "source", "created_at_ns", "deadline_ns", "ttl_ms", "payload", "payload_type", "priority", "routing_keys", "correlation_id", "delivery", "attempts", "key_id", "nonce", "signature", "schema")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_NS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_TYPE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ROUTING_KEYS_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    version: int
    event_id: bytes
    type: BusMessageType
    source: str
    created_at_ns: int
    deadline_ns: int
    ttl_ms: int
    payload: bytes
    payload_type: str
    priority: MessagePriority
    routing_keys: _containers.RepeatedScalarFieldContainer[str]
    correlation_id: bytes
    delivery: DeliveryGuarantee
    attempts: int
    key_id: str
    nonce: bytes
    signature: bytes
    schema: int
    def __init__(self, version: _Optional[int] = ..., event_id: _Optional[bytes] = ..., type: _Optional[_Union[BusMessageType, str]] = ..., source: _Optional[str] = ..., created_at_ns: _Optional[int] = ..., deadline_ns: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., payload: _Optional[bytes] = ..., payload_type: _Optional[str] = ..., priority: _Optional[_Union[MessagePriority, str]] = ..., routing_keys: _Optional[_Iterable[str]] = ..., correlation_id: _Optional[bytes] = ..., delivery: _Optional[_Union[DeliveryGuarantee, str]] = ..., attempts: _Optional[int] = ..., key_id: _Optional[str] = ..., nonce: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., schema: _Optional[int] = ...) -> None: ...
