"""The page docs/blueprints.md, made from the table: ``python -m esper_ray.karn.page > docs/blueprints.md``."""

from __future__ import annotations

from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.catalog import CATALOG
from esper_ray.karn.recipe import Blueprint

EXAMPLES = {
    "conv": SlotSignature("conv", (32, 12, 12)),
    "sequence": SlotSignature("sequence", (64, 32)),
    "vector": SlotSignature("vector", (32,)),
}
_HEAD = """# The blueprints

Made from the table by `python -m esper_ray.karn.page`; do not edit. `esper blueprints show BP009 --slot 32x12x12` tells what
one costs in your slot, `esper blueprints list --slot 32x12x12` what fits it and why the rest does not.

A blueprint is a recipe for a block that is added to a slot, `y = h + alpha * scale * body(h)`. Slots are *conv* (C x H x W),
*sequence* (T x D) or *vector* (D); blocks for sequences are causal. Costs below are those in slots of {examples}, with default
parameters: trainable parameters, thousands of FLOPs of one sample's forward pass (a multiply-add is 2), and an **estimate** of
a step (forward and backward, batch of 64, one thread of a busy server processor). What the forge measured is in each artifact.

- **SAFE** (BP001-BP035) may grow anywhere. Conv slots are offered those marked with a dot, so that a decision stays within its
  time; `seeds.offer=wide` offers all. Sequence and vector slots are offered all that fit.
- **EXPERIMENTAL** (BP036-BP042) grow where a run approves them: `--set seeds.approved=[BP036]`.
- **HIGH_RISK** (BP043-BP050) do one bad thing each and are quarantined: no approval gives them out, only a drill's sandbox.
- **Your own** (BP051-BP063): `@register_blueprint` on a small class, as in [examples/own_blueprint.py](../examples/own_blueprint.py);
  `esper blueprints check MODULE` checks it as ours are tested. A run takes it with `seeds.modules` and `seeds.approved`. It is
  built in the training process itself, not by the forge, and runs eagerly.

`seeds.birth=copy` lets a newborn begin with the weights of the nearest block of its blueprint, where shapes allow.
"""  # noqa: E501  as wide as the other pages
_STOPPED = {
    "BP043": "G1 within six isolated steps: the gradient exploded (or the loss does not fall, if the host normalises)",
    "BP044": "G1 (the gradient vanished), within six isolated steps",
    "BP045": "the forge's check, and G0 at the graft: before its first step",
    "BP046": "G1 in the epoch in which it goes off; live, the epoch is undone and the seed removed. Its host is sound",
    "BP047": "the forge's time limit: its job is killed",
    "BP048": "the forge's memory limit: its job fails",
    "BP049": "the forge's check, and G0 at the graft: before its first step",
    "BP050": "G1 after its first epoch: its loss does not fall; behind it G2 (validation loss), G3 (slot's output)",
}


def page() -> str:
    """The whole page."""
    examples = ", ".join("x".join(map(str, slot.shape)) for slot in EXAMPLES.values())
    parts = [_HEAD.format(examples=examples)]
    for tier in (BlueprintTier.SAFE, BlueprintTier.EXPERIMENTAL):
        parts.append(f"## {tier.name}\n")
        parts += [_entry(blueprint) for blueprint in CATALOG if blueprint.tier is tier]
    parts.append("## HIGH_RISK\n\n| | name | what it does | what stops it in the drills |\n|---|---|---|---|")
    for blueprint in CATALOG:
        if blueprint.id in _STOPPED:
            row = (blueprint.id, blueprint.name, blueprint.description, _STOPPED[blueprint.id])
            parts.append(f"| {' | '.join(row)} |")
    return "\n".join(parts) + "\n"


def _entry(blueprint: Blueprint) -> str:
    dot = " •" if blueprint.tier is BlueprintTier.SAFE and "conv" in blueprint.kinds and blueprint.offered else ""
    lines = [
        f"### {blueprint.id} {blueprint.name}{dot}",
        "",
        f"{blueprint.description} *{blueprint.family}*; {blueprint.source}.",
        "",
    ]
    needs = _needs(blueprint)
    lines += [f"- needs {needs}"] if needs else []
    for name, bound in blueprint.bounds.items():
        lines.append(f"- `{name}` {bound.minimum:g} to {bound.maximum:g}, default {bound.default:g}: {bound.meaning}")
    for kind in blueprint.kinds:
        slot = EXAMPLES[kind]
        cost = blueprint.costs(slot)
        lines.append(
            f"- {kind}: {cost.parameters:,} parameters, {cost.flops / 1e3:,.1f} kFLOPs, "
            f"about {blueprint.latency_ms(slot):.1f} ms a step"
        )
    return "\n".join(lines) + "\n"


def _needs(blueprint: Blueprint) -> str:
    least, most = blueprint.positions
    side = blueprint.smallest_side
    needs = [f"a map of at least {side}x{side}"] if side > 1 else []
    needs += [f"at least {least} positions"] if least > 1 and "sequence" in blueprint.kinds else []
    needs += [f"at most {most} positions"] if most else []
    return ", ".join(needs)


if __name__ == "__main__":
    print(page(), end="")
