"""The life of a seed as one table: what may follow a stage, by which gate, on whose order, and how long it lasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation as Operation
from esper_ray.errors import LifecycleError


@dataclass(frozen=True, slots=True)
class Rule:
    """One stage.

    Attributes:
        ways: which stage may follow, and the gate that must pass on entry; None where no evidence is asked for.
        orders: which operation asks for which of these. STABILIZE asks for none: it holds the seed where it is.
        follows: the stage that a seed enters by itself as soon as the gate passes; None where an order is needed.
        least: shortest stay in epochs, or the field of `SeedConfig` that has it.
        bounded: there is a longest stay; a seed that is not on by then is culled.
    """

    ways: Mapping[Stage, Gate | None] = field(default_factory=dict)
    orders: Mapping[Operation, Stage] = field(default_factory=dict)
    follows: Stage | None = None
    least: int | str = 0
    bounded: bool = False


_CULL = {Operation.CULL: Stage.CULLED}

LIFE: Mapping[Stage, Rule] = {
    Stage.UNKNOWN: Rule(),
    Stage.DORMANT: Rule(
        {Stage.GERMINATED: Gate.G0_SANITY, Stage.TERMINATED: None},
        {Operation.GERMINATE: Stage.GERMINATED, Operation.CANCEL: Stage.TERMINATED},
    ),
    # The kernel that arrives moves it on.
    Stage.GERMINATED: Rule(
        {Stage.TRAINING: Gate.G0_SANITY, Stage.CULLED: None},
        {**_CULL, Operation.CANCEL: Stage.CULLED},
        bounded=True,
    ),
    Stage.TRAINING: Rule(
        {Stage.BLENDING: Gate.G1_GRADIENT_HEALTH, Stage.CULLED: None},
        {**_CULL, Operation.START_GRAFTING: Stage.BLENDING},
        follows=Stage.BLENDING,
        least="training_epochs",
        bounded=True,
    ),
    Stage.BLENDING: Rule(
        {Stage.SHADOWING: Gate.G2_STABILITY, Stage.CULLED: None},
        _CULL,
        follows=Stage.SHADOWING,
        least="blending_epochs",
        bounded=True,
    ),
    Stage.SHADOWING: Rule(
        {Stage.PROBATIONARY: Gate.G3_INTERFACE, Stage.CULLED: None},
        {**_CULL, Operation.EVALUATE: Stage.PROBATIONARY},
        follows=Stage.PROBATIONARY,
        least="shadowing_epochs",
        bounded=True,
    ),
    Stage.PROBATIONARY: Rule(
        {Stage.FOSSILIZED: Gate.G4_SYSTEM_IMPACT, Stage.CULLED: None},
        {**_CULL, Operation.FOSSILIZE: Stage.FOSSILIZED},
        least="probation_epochs",
        bounded=True,
    ),
    # Its block stays in the model; only its record is closed.
    Stage.FOSSILIZED: Rule({Stage.TERMINATED: None}, {Operation.CANCEL: Stage.TERMINATED}),
    Stage.CULLED: Rule({Stage.EMBARGOED: None}, follows=Stage.EMBARGOED),
    # Doubled with each earlier cull in that slot.
    Stage.EMBARGOED: Rule({Stage.RESETTING: None}, follows=Stage.RESETTING, least="embargo_epochs"),
    Stage.RESETTING: Rule({Stage.DORMANT: Gate.G5_RESET}, follows=Stage.DORMANT),
    Stage.TERMINATED: Rule(),
}

TRANSITIONS: Mapping[Stage, Mapping[Stage, Gate | None]] = {stage: rule.ways for stage, rule in LIFE.items()}

# A branch exists and may move the output in these; the host path is still trained apart from it.
LIVE = frozenset({Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY})
# A seed is under way in these; its slot is taken.
GROWING = frozenset({Stage.GERMINATED, Stage.TRAINING}) | LIVE
# A branch is grafted and not yet a part of the host: STABILIZE holds it there.
HOLDABLE = GROWING - {Stage.GERMINATED}
# The block is a part of the host for good.
SETTLED = frozenset({Stage.FOSSILIZED, Stage.TERMINATED})


def gate_of(stage: Stage, to: Stage) -> Gate | None:
    """The gate between two stages.

    Raises:
        LifecycleError: the table has no such transition.
    """
    allowed = LIFE[stage].ways
    if to not in allowed:
        names = ", ".join(each.name for each in allowed) or "nothing"
        raise LifecycleError(
            f"A seed cannot go from {stage.name} to {to.name}.", why=f"After {stage.name} may come: {names}."
        )
    return allowed[to]


def least_stay(stage: Stage, config: SeedConfig) -> int:
    """Epochs that a seed spends in ``stage`` before it may go on; a cull never waits."""
    least = LIFE[stage].least
    return int(getattr(config, least)) if isinstance(least, str) else least


def longest_stay(stage: Stage, config: SeedConfig) -> int | None:
    """Epochs after which a seed is culled from ``stage``; None where it may stay for ever."""
    if not LIFE[stage].bounded:
        return None
    return config.longest_stay.get(stage.name.lower(), config.max_stage_epochs)  # type: ignore[call-overload,no-any-return]
