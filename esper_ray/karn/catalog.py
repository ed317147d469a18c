"""Karn's catalogue: every blueprint is one row of one table. No torch here: Tamiyo's and Karn's processes stay light.

The numbers are laid out so that the catalogue can fill up without renumbering:

- BP001-BP010 the safe pool, one cheap and well-known block of each kind of computation;
- BP011-BP020 convolutions; BP021-BP026 attention over channels and space; BP027-BP035 attention over positions,
  mixtures, dynamic and recurrent blocks;
- BP036-BP042 experimental, BP043-BP050 quarantined: the tier follows from the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import blueprint_number
from esper_ray.contracts.ports import Candidate, KernelSpec, SlotInfo, SlotKind, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn import costs
from esper_ray.karn.costs import Cost, CostFunction

SAFE_POOL = 10
_ALL: tuple[SlotKind, ...] = ("conv", "sequence", "vector")
_CONV: tuple[SlotKind, ...] = ("conv",)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a parameter may be. Sizes are rounded by the block to what fits its slot (see `karn.shapes`)."""

    minimum: float
    maximum: float
    default: float
    meaning: str


def tier_of(identifier: str) -> BlueprintTier:
    """The tier that a number belongs to."""
    number = blueprint_number(identifier)
    if number <= 35:
        return BlueprintTier.SAFE
    return BlueprintTier.EXPERIMENTAL if number <= 42 else BlueprintTier.HIGH_RISK


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A recipe for a block: what it is, where it fits, what it costs.

    Attributes:
        smallest_side: least height and width of a conv slot's map for which the block makes sense.
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


@dataclass(frozen=True, slots=True)
class QueryAnswer:
    """The blueprints that fit, cheapest first, and for each other one the reason why it was left out."""

    candidates: tuple[Blueprint, ...]
    left_out: Mapping[str, str]


def _gain(default: float = 0.5) -> dict[str, Bound]:
    return {"scale": Bound(0.05, 1.0, default, "initial gain per channel of the branch's output")}


def _expansion(default: float) -> dict[str, Bound]:
    return {"expansion": Bound(0.25, 4.0, default, "inner width as a multiple of the channels"), **_gain()}


def _kernel(default: float, smallest: float = 3) -> Bound:
    return Bound(smallest, 7, default, "side of the (odd) convolution kernel")


BLUEPRINTS: tuple[Blueprint, ...] = (
    Blueprint(
        "BP001", "identity", "scaling", _ALL, costs.identity,
        "A branch that adds nothing: the placebo of every comparison.", "He et al. 2016, arXiv:1603.05027",
    ),
    Blueprint(
        "BP002", "channel-affine", "scaling", _ALL, costs.affine,
        "A gain and a shift per channel.", "LayerScale: Touvron et al. 2021, arXiv:2103.17239", _gain(),
    ),
    Blueprint(
        "BP003", "normalised-activation", "normalisation", _ALL, costs.normalised_activation,
        "Group normalisation and a ReLU: competition within a sample, without mixing channels by weights.",
        "Wu & He 2018, arXiv:1803.08494", _gain(0.75),
    ),
    Blueprint(
        "BP004", "pointwise-mlp", "pointwise", _ALL, costs.pointwise_mlp,
        "Two pointwise maps with a GELU between them: mixes channels at each position.",
        "Network in Network: Lin et al. 2013, arXiv:1312.4400; MLP-Mixer, arXiv:2105.01601", _expansion(1.0),
    ),
    Blueprint(
        "BP005", "low-rank-adapter", "low-rank", _ALL, costs.low_rank,
        "A linear pointwise map of low rank.", "LoRA: Hu et al. 2021, arXiv:2106.09685; adapters, arXiv:1803.10082",
        {"rank": Bound(1, 64, 4, "rank of the map, at most the channels"), **_gain()},
    ),
    Blueprint(
        "BP006", "depthwise-mlp", "depthwise", _CONV, costs.depthwise_mlp,
        "A depthwise convolution, then a pointwise MLP: a ConvNeXt block.", "Liu et al. 2022, arXiv:2201.03545",
        {"kernel": _kernel(5), **_expansion(2.0)},
    ),
    Blueprint(
        "BP007", "squeeze-excitation", "channel attention", _CONV, costs.squeeze_excitation,
        "Channels turned up or down by what the whole map holds.", "Hu et al. 2018, arXiv:1709.01507",
        {"ratio": Bound(0.0625, 1.0, 0.25, "inner width as a share of the channels"), **_gain(0.75)},
    ),
    Blueprint(
        "BP008", "bottleneck", "residual", _CONV, costs.bottleneck,
        "Narrow, convolve, widen: a pre-activation bottleneck.", "He et al. 2016, arXiv:1603.05027",
        {"ratio": Bound(0.125, 1.0, 0.5, "inner width as a share of the channels"), **_gain()},
    ),
    Blueprint(
        "BP009", "residual-basic", "residual", _CONV, costs.basic,
        "Two 3x3 convolutions, each after normalisation and ReLU: a pre-activation residual block.",
        "He et al. 2016, arXiv:1603.05027",
        {"width": Bound(0.25, 2.0, 1.0, "inner width as a multiple of the channels"), **_gain()},
    ),
    Blueprint(
        "BP010", "gated-mlp", "gated feed-forward", _ALL, costs.gated_mlp,
        "A pointwise map whose values are gated by another one (SwiGLU).", "Shazeer 2020, arXiv:2002.05202",
        _expansion(1.0),
    ),
    Blueprint(
        "BP011", "grouped-shuffle", "grouped convolution", _CONV, costs.grouped,
        "Two grouped 3x3 convolutions with the channels shuffled between them.",
        "ShuffleNet: Zhang et al. 2018, arXiv:1707.01083; ResNeXt, arXiv:1611.05431",
        {"groups": Bound(2, 32, 4, "groups of each convolution"), **_gain()},
    ),
    Blueprint(
        "BP012", "dilated", "dilated convolution", _CONV, costs.dilated,
        "A 3x3 convolution over every second position, then a pointwise map: a wide view for few weights.",
        "Yu & Koltun 2016, arXiv:1511.07122", _gain(), 3,
    ),
    Blueprint(
        "BP013", "single-convolution", "convolution", _CONV, costs.single,
        "One convolution after normalisation and ReLU.", "He et al. 2016, arXiv:1603.05027",
        {"kernel": _kernel(3), **_gain()},
    ),
    Blueprint(
        "BP014", "inverted-bottleneck", "depthwise", _CONV, costs.inverted,
        "Widen, convolve depthwise, narrow: a mobile inverted bottleneck.", "Sandler et al. 2018, arXiv:1801.04381",
        _expansion(2.0),
    ),
    Blueprint(
        "BP015", "factorised", "convolution", _CONV, costs.factorised,
        "A horizontal and a vertical convolution in a row.", "Szegedy et al. 2016, arXiv:1512.00567",
        {"kernel": _kernel(3), **_gain()},
    ),
    Blueprint(
        "BP021", "spatial-gate", "spatial attention", _CONV, costs.spatial_gate,
        "Positions turned up or down by a convolution over the map's mean and maximum of channels.",
        "CBAM: Woo et al. 2018, arXiv:1807.06521", {"kernel": _kernel(5), **_gain(0.75)}, 2,
    ),
)  # fmt: skip


class Catalog:
    """The blueprints by number, behind their tiers."""

    def __init__(self, blueprints: Iterable[Blueprint] = BLUEPRINTS) -> None:
        self._blueprints = {blueprint.id: blueprint for blueprint in sorted(blueprints, key=lambda b: b.id)}

    def __iter__(self) -> Iterator[Blueprint]:
        return iter(self._blueprints.values())

    def get(self, identifier: str, *, tier_ceiling: BlueprintTier = BlueprintTier.SAFE) -> Blueprint:
        """The blueprint of that number.

        Raises:
            BlueprintError: there is none, or its tier is above what was approved.
        """
        blueprint = self._blueprints.get(identifier)
        if blueprint is None:
            raise BlueprintError(
                f"There is no blueprint {identifier!r}.", remedy=f"Choose one of: {', '.join(self._blueprints)}."
            )
        if blueprint.tier > tier_ceiling:
            raise BlueprintError(
                f"{identifier} ({blueprint.name}) is {blueprint.tier.name} and not approved here.",
                why=f"Approved are blueprints up to {tier_ceiling.name}.",
                remedy="Approve the tier explicitly, or choose another blueprint.",
            )
        return blueprint

    def query(
        self,
        signature: SlotSignature,
        *,
        tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
        parameter_budget: int | None = None,
    ) -> QueryAnswer:
        """Which blueprints, with their default parameters, may grow in that slot; cheapest in parameters first."""
        candidates: list[tuple[int, Blueprint]] = []
        left_out: dict[str, str] = {}
        for blueprint in self._blueprints.values():
            if blueprint.tier > tier_ceiling:
                left_out[blueprint.id] = f"{blueprint.tier.name} is not approved"
            elif reason := blueprint.misfit(signature):
                left_out[blueprint.id] = reason
            elif parameter_budget is not None and (size := blueprint.parameters(signature)) > parameter_budget:
                left_out[blueprint.id] = f"{size} parameters are more than the budget of {parameter_budget}"
            else:
                candidates.append((blueprint.parameters(signature), blueprint))
        candidates.sort(key=lambda pair: (pair[0], pair[1].id))
        return QueryAnswer(tuple(blueprint for _, blueprint in candidates), left_out)


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
