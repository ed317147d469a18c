"""What a blueprint is: its bounds, where it fits, what it costs, and the tier that its number puts it in. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import blueprint_number
from esper_ray.contracts.ports import KernelSpec, SlotKind, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn import shapes
from esper_ray.karn.costs import REFERENCE, Cost, CostFunction, Machine

LAST_SAFE, LAST_EXPERIMENTAL, LAST_OF_OURS, LAST_NUMBER = 35, 42, 50, 63
ALL_KINDS: tuple[SlotKind, ...] = ("conv", "sequence", "vector")


@dataclass(frozen=True, slots=True)
class Bound:
    """What a parameter may be. Sizes are rounded by the block to what fits its slot (see `karn.shapes`)."""

    minimum: float
    maximum: float
    default: float
    meaning: str


def tier_of(identifier: str) -> BlueprintTier:
    """The tier that a number belongs to; BP051 to BP063 are blocks of the user's own."""
    number = blueprint_number(identifier)
    if number <= LAST_SAFE:
        return BlueprintTier.SAFE
    if LAST_EXPERIMENTAL < number <= LAST_OF_OURS:
        return BlueprintTier.HIGH_RISK
    return BlueprintTier.EXPERIMENTAL


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A recipe for a block: what it is, where it fits, what it costs.

    Attributes:
        smallest_side: least height and width of a conv slot's map for which the block makes sense.
        positions: least and greatest number of positions (H*W or T) of a slot that has any; 0 is no bound.
        operations: kernels that one forward pass starts with default parameters, views not counted; for `latency_ms`.
        offered: whether deciders are offered it by default; the others are offered with ``seeds.offer=wide``.
        source: the paper that the computation comes from.
    """

    id: str
    name: str
    family: str
    kinds: tuple[SlotKind, ...]
    cost: CostFunction
    description: str
    source: str
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    smallest_side: int = 1
    positions: tuple[int, int] = (1, 0)
    operations: int = 0
    offered: bool = True

    @property
    def tier(self) -> BlueprintTier:
        return tier_of(self.id)

    def resolve(self, parameters: Mapping[str, float] | None = None) -> dict[str, float]:
        """All parameters, defaults filled in.

        Raises:
            BlueprintError: a parameter is unknown or out of its bounds.
        """
        values = {name: bound.default for name, bound in self.bounds.items()}
        for name, value in (parameters or {}).items():
            bound = self.bounds.get(name)
            if bound is None:
                raise BlueprintError(
                    f"{self.id} ({self.name}) has no parameter {name}.",
                    remedy=f"It has: {', '.join(self.bounds) or 'none'}.",
                )
            if not (math.isfinite(value) and bound.minimum <= value <= bound.maximum):
                raise BlueprintError(
                    f"{self.id} ({self.name}) cannot have {name}={value:g}.",
                    remedy=f"Choose a value from {bound.minimum:g} to {bound.maximum:g}.",
                )
            values[name] = float(value)
        return values

    def spec(self, signature: SlotSignature, parameters: Mapping[str, float] | None = None) -> KernelSpec:
        """The kernel's name in its canonical form: parameters that have their default are left out.

        Raises:
            BlueprintError: the block does not fit, or a parameter is unknown or out of its bounds.
        """
        self.check_fit(signature)
        values = self.resolve(parameters)
        return KernelSpec(
            self.id, signature, {name: value for name, value in values.items() if value != self.bounds[name].default}
        )

    def misfit(self, signature: SlotSignature) -> str:
        """Why the block does not fit the slot; empty where it does."""
        if signature.kind not in self.kinds:
            return f"made for {' and '.join(self.kinds)} slots, not for {signature.kind}"
        if signature.kind == "conv" and min(signature.shape[1:]) < self.smallest_side:
            return f"needs a map of at least {self.smallest_side}x{self.smallest_side}"
        least, most = self.positions
        positions = shapes.positions(signature)
        if signature.kind != "vector" and positions < least:
            return f"needs at least {least} positions"
        if most and positions > most:
            return f"made for at most {most} positions, and these are {positions}"
        return ""

    def check_fit(self, signature: SlotSignature) -> None:
        """Raises:
        BlueprintError: the block does not fit the slot.
        """
        reason = self.misfit(signature)
        if reason:
            raise BlueprintError(f"{self.id} ({self.name}) does not fit {signature}.", why=f"It is {reason}.")

    def costs(self, signature: SlotSignature, parameters: Mapping[str, float] | None = None) -> Cost:
        """Parameters and forward FLOPs per sample in that slot."""
        return self.cost(signature, self.resolve(parameters))

    def parameters(self, signature: SlotSignature, parameters: Mapping[str, float] | None = None) -> int:
        """Number of trainable parameters in that slot."""
        return self.costs(signature, parameters).parameters

    def flops(self, signature: SlotSignature, parameters: Mapping[str, float] | None = None) -> int:
        """FLOPs of one sample's forward pass (a multiply-add is 2; only convolutions and matrix products)."""
        return self.costs(signature, parameters).flops

    def latency_ms(
        self,
        signature: SlotSignature,
        parameters: Mapping[str, float] | None = None,
        *,
        batch: int = 64,
        machine: Machine = REFERENCE,
    ) -> float:
        """An estimate of one forward and backward pass over a batch; what the forge measured is in each artifact."""
        elements = shapes.positions(signature) * shapes.channels(signature)
        return machine.step_ms(self.flops(signature, parameters), self.operations, elements, batch)
