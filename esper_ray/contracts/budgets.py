"""The numbers that must hold: one table, from which checks, metrics, documents and benchmarks are derived."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on the path of a decision or a message, in milliseconds unless the name says otherwise."""

    key: str
    limit: float
    meaning: str


BOUNDARY_MS = Budget("boundary", 18.0, "the whole end-of-epoch hook: state out, decision in, command applied")
ASSEMBLY_MS = Budget("assembly", 3.5, "state packet and features assembled and signed")
DECIDE_MS = Budget("decide", 12.0, "Tamiyo's answer, the hop included")
APPLY_MS = Budget("apply", 1.5, "command verified and applied to the lifecycle")
GUARD_MS = Budget("guard", 1.0, "the decision written down before it takes effect")
GRAFT_MS = Budget("graft", 0.5, "a ready kernel swapped into a slot")

BOUNDARY_PARTS = (ASSEMBLY_MS, DECIDE_MS, APPLY_MS, GUARD_MS)

ROLLBACK_PARTS = (
    Budget("prepare", 150.0, "the state to go back to found and checked"),
    Budget("commit", 250.0, "Tamiyo, the seeds, the model, the optimizer and the rest put back"),
    Budget("confirm", 100.0, "what is there now compared with what was saved, and tried"),
)
ROLLBACK_FAST_MS = Budget("rollback", 500.0, "a rollback from memory")
ROLLBACK_FULL_MS = Budget("full_rollback", 12_000.0, "a rollback from disk")

HIT_RATE = 0.95  # of the kernels that are asked for, once the forge has made them
CONTROL_MESSAGE_BYTES = 280
ENVELOPE_BYTES = 256 * 1024
MAX_COMMANDS_PER_BOUNDARY = 4
COMMAND_FRESH_SECONDS = 60.0
NONCE_MEMORY_SECONDS = 300.0
HOST_PARAMETER_LIMIT = 10_000_000
