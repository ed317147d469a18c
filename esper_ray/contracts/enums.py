"""Leyline's enums as Python enums; the values are the schema's, and a test holds the two together."""

from __future__ import annotations

from enum import IntEnum


class SeedLifecycleStage(IntEnum):
    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    SHADOWING = 5
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10
    TERMINATED = 11


class SeedLifecycleGate(IntEnum):
    UNKNOWN = 0
    G0_SANITY = 1
    G1_GRADIENT_HEALTH = 2
    G2_STABILITY = 3
    G3_INTERFACE = 4
    G4_SYSTEM_IMPACT = 5
    G5_RESET = 6


class HealthStatus(IntEnum):
    UNKNOWN = 0
    HEALTHY = 1
    DEGRADED = 2
    UNHEALTHY = 3
    CRITICAL = 4


class CircuitBreakerState(IntEnum):
    UNKNOWN = 0
    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class CommandType(IntEnum):
    UNKNOWN = 0
    SEED = 1
    ROLLBACK = 2
    OPTIMIZER = 3
    CIRCUIT_BREAKER = 4
    PAUSE = 5
    EMERGENCY = 6
    STRUCTURAL_PRUNING = 7
    NO_OP = 8


class SeedOperation(IntEnum):
    UNKNOWN = 0
    GERMINATE = 1
    START_TRAINING = 2
    START_GRAFTING = 3
    STABILIZE = 4
    EVALUATE = 5
    FINE_TUNE = 6
    FOSSILIZE = 7
    CULL = 8
    CANCEL = 9


class BlendMode(IntEnum):
    UNKNOWN = 0
    RESIDUAL = 1
    CONVEX = 2
    CHANNEL = 3
    CONFIDENCE = 4


class MessagePriority(IntEnum):
    UNSPECIFIED = 0
    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


class DeliveryGuarantee(IntEnum):
    UNKNOWN = 0
    AT_LEAST_ONCE = 1
    AT_MOST_ONCE = 2
    EXACTLY_ONCE = 3


class TelemetryLevel(IntEnum):
    UNSPECIFIED = 0
    INFO = 1
    WARNING = 2
    ERROR = 3
    CRITICAL = 4


class EmergencyLevel(IntEnum):
    UNSPECIFIED = 0
    NOTICE = 1
    ELEVATED = 2
    CONSERVATIVE = 3
    HALT = 4


class RiskLevel(IntEnum):
    UNKNOWN = 0
    GREEN = 1
    YELLOW = 2
    ORANGE = 3
    RED = 4
    CRITICAL = 5


class FieldReportOutcome(IntEnum):
    UNSPECIFIED = 0
    SUCCESS = 1
    NEUTRAL = 2
    REGRESSION = 3
    ABORTED = 4


class BlueprintTier(IntEnum):
    UNSPECIFIED = 0
    SAFE = 1
    EXPERIMENTAL = 2
    HIGH_RISK = 3


class BusMessageType(IntEnum):
    UNSPECIFIED = 0
    SYSTEM_STATE = 1
    ADAPTATION_COMMAND = 2
    FIELD_REPORT = 3
    TELEMETRY = 4
    POLICY_UPDATE = 5
    KERNEL_PREFETCH_REQUEST = 6
    KERNEL_PREFETCH_READY = 7
    KERNEL_PREFETCH_ERROR = 8
    KERNEL_CATALOG_UPDATE = 9
    EMERGENCY_SIGNAL = 10
    ALERT = 11
    DECISION_RECORD = 12
