"""``slots="auto"``: which modules of a model would make good slots, and why.

A good slot is where a stage or block ends: what follows has learned to read that output, and a block added there works
on features as a whole. So the outermost modules that are made of others are taken; of one with more than 60 % of the
parameters those inside it, if there are any. Where there are none, the activations are, or the layers themselves. Of
many, a few are taken at equal distances through the depth. The model's own output is never one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from esper_ray.errors import HostError
from esper_ray.karn.catalog import CATALOG
from esper_ray.tasks.slots import Place, device_of, dtype_of, signature_of, survey

LARGEST_SHARE = 0.6
FEWEST_CHANNELS = 4
MOST = 4


@dataclass(frozen=True, slots=True)
class Proposal:
    """One slot that was proposed. ``depth`` is the share of the model's parameters that come before its end."""

    name: str
    kind: str
    shape: tuple[int, ...]
    depth: float
    blueprints: int
    why: str


def propose(model: nn.Module, sample: Tensor, most: int = MOST) -> tuple[Proposal, ...]:
    """At most ``most`` places for slots, in the order in which the model runs through them.

    Raises:
        HostError: no module of the model makes a slot; the text says what they are instead.
    """
    places = survey(model, sample)
    total = sum(parameter.numel() for parameter in model.parameters())
    usable = [place for place in places.values() if _good(place)]
    blocks = _blocks(model, {place.name: place for place in usable}, total)
    chosen, sort = (blocks, "block") if blocks else (_layers(model, usable), "layer")
    if not chosen:
        raise HostError(
            f"{type(model).__name__} has no module that makes a slot.",
            why=_why_none(places.values()),
            remedy="Name the slots yourself, or split the model into modules whose output is one tensor.",
        )
    chosen = _spread(sorted(chosen, key=lambda place: place.order), most)
    return tuple(_explain(model, place, places, total, sort) for place in chosen)


def as_table(proposals: Sequence[Proposal]) -> str:
    """The proposals as text, one line each."""
    head = ("slot", "kind", "shape", "depth", "blueprints", "why")
    rows = [
        (p.name, p.kind, "x".join(map(str, p.shape)), f"{100 * p.depth:.0f} %", str(p.blueprints), p.why)
        for p in proposals
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def _good(place: Place) -> bool:
    channels = place.shape[0] if len(place.shape) == 3 else place.shape[-1] if place.shape else 0
    return not place.trouble and not place.final and channels >= FEWEST_CHANNELS


def _blocks(model: nn.Module, usable: Mapping[str, Place], total: int) -> list[Place]:
    """The outermost usable modules that are made of others; of one that is most of the model, those inside it."""

    def inside(module: nn.Module, prefix: str) -> Iterator[Place]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if not any(True for _ in child.children()):
                continue
            place, inner = usable.get(path), list(inside(child, f"{path}."))
            small = place is not None and place.parameters <= LARGEST_SHARE * total
            if place is not None and place.parameters and (small or not inner):
                yield place
            else:
                yield from inner

    return list(inside(model, ""))


def _layers(model: nn.Module, usable: Sequence[Place]) -> list[Place]:
    """For a model without blocks: its activations, or where there are none, its layers with weights."""
    leaves = [place for place in usable if not any(True for _ in model.get_submodule(place.name).children())]
    activations = [place for place in leaves if type(model.get_submodule(place.name)).__module__.endswith("activation")]
    return activations or [place for place in leaves if place.parameters]


def _spread(places: Sequence[Place], most: int) -> list[Place]:
    """At most ``most`` of them at equal distances, the last one among them."""
    count = min(most, len(places))
    return [places[round((k + 1) * len(places) / count) - 1] for k in range(count)]


def _explain(model: nn.Module, place: Place, places: Mapping[str, Place], total: int, sort: str) -> Proposal:
    signature = signature_of(place, dtype_of(model), device_of(model))
    leaves = {name for name, module in model.named_modules() if not any(True for _ in module.children())}
    before = sum(p.parameters for p in places.values() if p.order <= place.order and p.name in leaves)
    fitting = [b for b in CATALOG.query(signature).candidates if b.parameters(signature)]
    smallest = min((blueprint.parameters(signature) for blueprint in fitting), default=0)
    share = f" of {100 * place.parameters / total:.0f} % of the parameters" if place.parameters else ""
    why = f"end of the {sort} {place.title}{share}; what fits begins at {smallest:,} parameters"
    return Proposal(place.name, signature.kind, place.shape, before / total, len(fitting), why)


def _why_none(places: Iterable[Place]) -> str:
    reasons = {place.trouble or "its output is the model's own or too narrow" for place in places}
    return "; ".join(sorted(reasons)) + "." if reasons else "It calls no modules."
