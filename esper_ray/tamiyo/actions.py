"""The learned policy's actions as one table, and the masks that leave only legal ones.

A boundary is decided in micro-steps: each picks an operation, the slot it concerns, and for a germination the
blueprint and the blend schedule. NO_OP ends the boundary, and so does the fourth command. A head that does not apply
has choice 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper_ray.contracts.budgets import MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.enums import RiskLevel, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.tamiyo.view import Proposal, RunView

OPERATIONS: tuple[SeedOperation, ...] = (
    SeedOperation.UNKNOWN,  # no change
    SeedOperation.GERMINATE,
    SeedOperation.CULL,
    SeedOperation.FOSSILIZE,
)
NO_OP, GERMINATE, CULL, FOSSILIZE = range(4)
SCHEDULES = ("linear", "cosine", "sigmoid")
HEADS = ("operation", "slot", "blueprint", "schedule")

_CULLABLE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY})

Mask = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Choice:
    """One micro-step as the heads chose it: indices into `OPERATIONS`, slots, `blueprints_of` and `SCHEDULES`."""

    operation: int = NO_OP
    slot: int = 0
    blueprint: int = 0
    schedule: int = 0

    @property
    def indices(self) -> tuple[int, int, int, int]:
        return self.operation, self.slot, self.blueprint, self.schedule


@dataclass(frozen=True, slots=True)
class Masks:
    """What is legal now.

    Attributes:
        operation: [4].
        slot: [4, slots], given the operation.
        blueprint: [slots, blueprints], given the slot of a germination.
    """

    operation: Mask
    slot: Mask
    blueprint: Mask

    def allows(self, choice: Choice) -> bool:
        """Whether each head that applies picked something legal, and the others 0."""
        operation, slot, blueprint, schedule = choice.indices
        sizes = (*self.slot.shape, self.blueprint.shape[1], len(SCHEDULES))
        if not all(0 <= each < size for each, size in zip(choice.indices, sizes, strict=True)):
            return False
        if operation == NO_OP:
            return choice == Choice()
        if not self.operation[operation] or not self.slot[operation, slot]:
            return False
        if operation == GERMINATE:
            return bool(self.blueprint[slot, blueprint])
        return blueprint == schedule == 0


def blueprints_of(view: RunView) -> tuple[int, ...]:
    """The numbers of the blueprints that the run may use, ascending: what the blueprint head points at."""
    found: tuple[int, ...] | None = view.memo.get("blueprints")
    if found is None:
        found = tuple(sorted({candidate.blueprint for candidate in view.offers()}))
        view.memo["blueprints"] = found
    return found


def masks(view: RunView, pending: Sequence[Proposal], *, slots: int, blueprints: int) -> Masks:
    """What may be chosen after ``pending`` of this boundary, padded to ``slots`` and ``blueprints``.

    A germination is legal in a dormant slot for a blueprint that keeps the model within its limits of parameters and of
    computation, but not while the run is conservative after damage; a seed under way may be culled, one that was long
    enough on probation fossilised. Nothing may happen to one slot twice at one boundary. How much the run's risk leaves
    of that is in `risk`.
    """
    taken = {proposal.slot for proposal in pending}
    legal_slot = np.zeros((len(OPERATIONS), slots), np.int8)
    legal_blueprint = np.zeros((slots, blueprints), np.int8)
    if len(pending) < MAX_COMMANDS_PER_BOUNDARY and view.risk.level < RiskLevel.RED:
        fits, grows = fitting(view, pending, slots, blueprints), _may_grow(view, pending)
        for slot in view.dormant_slots():
            if slot.index not in taken and grows:
                legal_blueprint[slot.index] = fits[slot.index]
        legal_slot[GERMINATE] = legal_blueprint.any(axis=1)
        for seed in view.seeds():
            if seed.slot not in taken and seed.seed:
                legal_slot[CULL, seed.slot] = seed.stage in _CULLABLE
                legal_slot[FOSSILIZE, seed.slot] = seed.stage is Stage.PROBATIONARY and view.watched(seed)
    legal_operation: Mask = np.asarray(legal_slot.any(axis=1), np.int8)
    legal_operation[NO_OP] = 1
    return Masks(legal_operation, legal_slot, legal_blueprint)


def _may_grow(view: RunView, pending: Sequence[Proposal]) -> bool:
    """Whether the run's state leaves room for one germination more at this boundary."""
    if view.conservative or view.risk.level >= RiskLevel.ORANGE:
        return False
    return view.risk.level < RiskLevel.YELLOW or not _germinations(pending)


def _germinations(pending: Sequence[Proposal]) -> list[Proposal]:
    return [each for each in pending if each.operation is SeedOperation.GERMINATE]


def room(view: RunView, pending: Sequence[Proposal]) -> int:
    """Parameters that may still be added, those asked for at this boundary counted."""
    known: dict[tuple[int, int], int] | None = view.memo.get("parameters")
    if known is None:
        known = view.memo["parameters"] = {(each.slot, each.blueprint): each.parameters for each in view.offers()}
    asked = sum(known.get((each.slot, each.blueprint), 0) for each in _germinations(pending))
    return view.opening.max_parameters - view.parameters() - asked


def fitting(view: RunView, pending: Sequence[Proposal], slots: int, blueprints: int) -> npt.NDArray[np.bool_]:
    """Which blueprints keep the model within the user's limits, after ``pending``: [slots, blueprints]."""
    parameters, flops = costs(view, slots, blueprints)
    found: npt.NDArray[np.bool_] = parameters <= room(view, pending)
    work = view.work_left()
    if not math.isfinite(work):
        return found
    place = {number: index for index, number in enumerate(blueprints_of(view))}
    asked = sum(float(flops[each.slot, place[each.blueprint]]) for each in _germinations(pending))
    limited: npt.NDArray[np.bool_] = found & (flops <= work - asked)
    return limited


def costs(view: RunView, slots: int, blueprints: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Parameters and forward FLOPs of each blueprint in each slot, infinite where Karn does not offer it.

    Both are [slots, blueprints].
    """
    key = ("costs", slots, blueprints)
    if key not in view.memo:
        place = {number: index for index, number in enumerate(blueprints_of(view))}
        parameters, flops = np.full((slots, blueprints), np.inf), np.full((slots, blueprints), np.inf)
        for each in view.offers():
            parameters[each.slot, place[each.blueprint]] = each.parameters
            flops[each.slot, place[each.blueprint]] = each.flops
        view.memo[key] = parameters, flops
    found: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] = view.memo[key]
    return found


def to_proposal(choice: Choice, view: RunView, why: str) -> Proposal | None:
    """What a choice asks for; None for NO_OP."""
    if choice.operation == NO_OP:
        return None
    operation = OPERATIONS[choice.operation]
    if choice.operation == GERMINATE:
        number = blueprints_of(view)[choice.blueprint]
        return Proposal(operation, choice.slot, why, blueprint=number, schedule=SCHEDULES[choice.schedule])
    seed = next(each for each in view.seeds() if each.slot == choice.slot)
    return Proposal(operation, choice.slot, why, seed.seed, seed.blueprint)


def to_choice(proposal: Proposal | None, view: RunView) -> Choice:
    """The choice that asks for ``proposal``; a ramp left to the configuration counts as the first schedule."""
    if proposal is None:
        return Choice()
    operation = OPERATIONS.index(proposal.operation)
    if operation != GERMINATE:
        return Choice(operation, proposal.slot)
    schedule = SCHEDULES.index(proposal.schedule) if proposal.schedule else 0
    return Choice(operation, proposal.slot, blueprints_of(view).index(proposal.blueprint), schedule)
