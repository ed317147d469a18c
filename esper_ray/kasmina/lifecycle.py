"""The life of a seed as one table: which stage may follow which, and the gate on the way."""

from __future__ import annotations

from collections.abc import Mapping

from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import LifecycleError

# stage -> {next stage: gate that must pass on entry, None where no evidence is asked for}
TRANSITIONS: Mapping[Stage, Mapping[Stage, Gate | None]] = {
    Stage.UNKNOWN: {},
    Stage.DORMANT: {Stage.GERMINATED: Gate.G0_SANITY, Stage.TERMINATED: None},
    Stage.GERMINATED: {Stage.TRAINING: Gate.G0_SANITY, Stage.CULLED: None},
    Stage.TRAINING: {Stage.BLENDING: Gate.G1_GRADIENT_HEALTH, Stage.CULLED: None},
    Stage.BLENDING: {Stage.SHADOWING: Gate.G2_STABILITY, Stage.CULLED: None},
    Stage.SHADOWING: {Stage.PROBATIONARY: Gate.G3_INTERFACE, Stage.CULLED: None},
    Stage.PROBATIONARY: {Stage.FOSSILIZED: Gate.G4_SYSTEM_IMPACT, Stage.CULLED: None},
    Stage.FOSSILIZED: {Stage.TERMINATED: None},
    Stage.CULLED: {Stage.EMBARGOED: None},
    Stage.EMBARGOED: {Stage.RESETTING: None},
    Stage.RESETTING: {Stage.DORMANT: Gate.G5_RESET},
    Stage.TERMINATED: {},
}

# A branch exists and may move the output in these; the host path is still trained apart from it.
LIVE = frozenset({Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY})
# A seed is under way in these; its slot is taken.
GROWING = frozenset({Stage.GERMINATED, Stage.TRAINING}) | LIVE


def gate_of(stage: Stage, to: Stage) -> Gate | None:
    """The gate between two stages.

    Raises:
        LifecycleError: the table has no such transition.
    """
    allowed = TRANSITIONS[stage]
    if to not in allowed:
        names = ", ".join(each.name for each in allowed) or "nothing"
        raise LifecycleError(
            f"A seed cannot go from {stage.name} to {to.name}.", why=f"After {stage.name} may come: {names}."
        )
    return allowed[to]
