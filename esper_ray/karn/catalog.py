"""Karn's catalogue: the table of blueprints behind their tiers. No torch here: Karn's process stays light.

SAFE ones are free; EXPERIMENTAL ones, and blocks of the user's own, are given out where they or their tier are
approved; HIGH_RISK ones never, outside of a drill's `sandbox`. Lookups, queries and the building of modules all go
through `refusal`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypedDict, Unpack

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import blueprint_number
from esper_ray.contracts.ports import Candidate, SlotInfo, SlotKind, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn import sandbox
from esper_ray.karn.recipe import Blueprint, Bound, tier_of
from esper_ray.karn.table import BLUEPRINTS, SAFE_POOL

__all__ = [
    "BLUEPRINTS",
    "CATALOG",
    "SAFE_POOL",
    "Blueprint",
    "Bound",
    "Catalog",
    "Offer",
    "QueryAnswer",
    "Wanted",
    "candidates",
    "tier_of",
]

Offer = Literal["standard", "wide"]
TASK_KINDS: Mapping[str, SlotKind] = {
    "resnet-lite": "conv",
    "transformer-lite": "sequence",
    "mlp-lite": "vector",
}
_REMEMBERED = 4096


class Wanted(TypedDict, total=False):
    """What a query asks for besides the slot.

    Attributes:
        tier_ceiling: the highest tier that is approved as a whole; SAFE where nothing is said.
        approved: numbers above it that are approved one by one.
        parameter_budget: the most parameters that one may have.
        family: only those of this family.
        latency_budget_ms: the most that a step over a batch of 64 may take, as `Blueprint.latency_ms` estimates it.
        offer: "standard", the default, keeps to the ones that are offered by default, so that a decision stays within
            its time; "wide" takes in all that fit.
    """

    tier_ceiling: BlueprintTier
    approved: Collection[str]
    parameter_budget: int | None
    family: str | None
    latency_budget_ms: float | None
    offer: Offer


@dataclass(frozen=True, slots=True)
class QueryAnswer:
    """The blueprints that fit, cheapest first, and for each other one the reason why it was left out.

    ``note`` says it where the answer is not the ordinary one.
    """

    candidates: tuple[Blueprint, ...]
    left_out: Mapping[str, str]
    note: str = ""


def refusal(blueprint: Blueprint, ceiling: BlueprintTier, approved: Collection[str]) -> str:
    """Why this blueprint may not be given out; empty where it may."""
    if sandbox.is_open():
        return ""
    if blueprint.tier is BlueprintTier.HIGH_RISK:
        return "HIGH_RISK is quarantined"
    if blueprint.tier > ceiling and blueprint.id not in approved:
        return f"{blueprint.tier.name} is not approved"
    return ""


class Catalog:
    """The blueprints by number, behind their tiers."""

    def __init__(self, blueprints: Iterable[Blueprint] = BLUEPRINTS) -> None:
        self._blueprints = {blueprint.id: blueprint for blueprint in sorted(blueprints, key=lambda b: b.id)}
        self._sized = lru_cache(_REMEMBERED)(self._size_up)
        self._answered = lru_cache(_REMEMBERED)(self._answer)

    def __iter__(self) -> Iterator[Blueprint]:
        return iter(self._blueprints.values())

    def add(self, blueprint: Blueprint) -> None:
        """Take in a blueprint, or a new version of one of the user's own."""
        self._blueprints[blueprint.id] = blueprint
        self._sized.cache_clear()
        self._answered.cache_clear()

    def discard(self, identifier: str) -> None:
        """Take a blueprint out again."""
        self._blueprints.pop(identifier, None)
        self._sized.cache_clear()
        self._answered.cache_clear()

    def get(
        self,
        identifier: str,
        *,
        tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
        approved: Collection[str] = frozenset(),
    ) -> Blueprint:
        """The blueprint of that number.

        Args:
            tier_ceiling: the highest tier that is approved as a whole.
            approved: numbers that are approved one by one.

        Raises:
            BlueprintError: there is none, it is not approved, or it is quarantined.
        """
        blueprint = self._blueprints.get(identifier)
        if blueprint is None:
            raise BlueprintError(
                f"There is no blueprint {identifier!r}.", remedy=f"Choose one of: {', '.join(self._blueprints)}."
            )
        if refusal(blueprint, tier_ceiling, approved):
            quarantined = blueprint.tier is BlueprintTier.HIGH_RISK
            raise BlueprintError(
                f"{identifier} ({blueprint.name}) is {blueprint.tier.name} and "
                + ("quarantined." if quarantined else "not approved here."),
                why="It exists for drills only." if quarantined else f"Approved are all up to {tier_ceiling.name}.",
                remedy="Choose another blueprint." if quarantined else f"Add {identifier} to seeds.approved.",
            )
        return blueprint

    def query(self, signature: SlotSignature, **wanted: Unpack[Wanted]) -> QueryAnswer:
        """Which blueprints, with their default parameters, may grow in that slot; cheapest in parameters first."""
        asked = {**wanted, "approved": frozenset(wanted.get("approved", ()))}
        return self._answered(signature, sandbox.is_open(), **asked)

    def of_task(
        self,
        task: str,
        *,
        tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
        approved: Collection[str] = frozenset(),
    ) -> QueryAnswer:
        """Which blueprints fit the kind of slots that a task has, whatever their size, in the order of their numbers.

        A user's own task may have slots of any kind.
        """
        kind = TASK_KINDS.get(task)
        found, left_out = [], {}
        for blueprint in self:
            reason = refusal(blueprint, tier_ceiling, approved)
            if not reason and kind is not None and kind not in blueprint.kinds:
                reason = f"made for {' and '.join(blueprint.kinds)} slots, and those of {task} are {kind}"
            if reason:
                left_out[blueprint.id] = reason
            else:
                found.append(blueprint)
        return QueryAnswer(tuple(found), left_out)

    def safe_pool(self, signature: SlotSignature, why: str) -> QueryAnswer:
        """BP001-BP010 where they fit, without looking at anything else."""
        pool = list(self)[:SAFE_POOL]
        fitting = tuple(blueprint for blueprint in pool if not blueprint.misfit(signature))
        return QueryAnswer(fitting, {each.id: why for each in self if each not in fitting}, f"the safe pool: {why}")

    def _size_up(self, signature: SlotSignature) -> tuple[tuple[Blueprint, str, int], ...]:
        """All blueprints, why each does not fit, and its parameters where it does; cheapest first."""
        rows = []
        for blueprint in self:
            reason = blueprint.misfit(signature)
            rows.append((blueprint, reason, 0 if reason else blueprint.parameters(signature)))
        return tuple(sorted(rows, key=lambda row: (row[2], row[0].id)))

    def _answer(
        self,
        signature: SlotSignature,
        in_drill: bool,  # noqa: ARG002  part of what the answer is remembered by
        *,
        approved: frozenset[str],
        tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
        parameter_budget: int | None = None,
        family: str | None = None,
        latency_budget_ms: float | None = None,
        offer: Offer = "standard",
    ) -> QueryAnswer:
        candidates: list[Blueprint] = []
        left_out: dict[str, str] = {}
        for blueprint, misfit, size in self._sized(signature):
            reason = refusal(blueprint, tier_ceiling, approved) or misfit
            if reason:
                left_out[blueprint.id] = reason
            elif family is not None and blueprint.family != family:
                left_out[blueprint.id] = f"of the family {blueprint.family}, not {family}"
            elif parameter_budget is not None and size > parameter_budget:
                left_out[blueprint.id] = f"{size} parameters are more than the budget of {parameter_budget}"
            elif latency_budget_ms is not None and (slow := blueprint.latency_ms(signature)) > latency_budget_ms:
                left_out[blueprint.id] = f"about {slow:.1f} ms a step are more than {latency_budget_ms:g}"
            elif offer == "standard" and signature.kind == "conv" and not blueprint.offered:
                left_out[blueprint.id] = "not offered by default; seeds.offer=wide does"
            else:
                candidates.append(blueprint)
        return QueryAnswer(tuple(candidates), left_out)


def candidates(slot: SlotInfo, blueprints: Iterable[Blueprint]) -> list[Candidate]:
    """The blueprints as a decider sees them: what each would be and cost in that slot."""
    return [
        Candidate(
            slot=slot.index,
            blueprint=blueprint_number(blueprint.id),
            family=blueprint.family,
            parameters=blueprint.parameters(slot.signature),
            flops=blueprint.flops(slot.signature),
        )
        for blueprint in blueprints
    ]


CATALOG = Catalog()
