"""`esper blueprints`: which blocks there are, what one is and costs in a slot, and checking blocks of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from esper_ray import config as configuration
from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotKind, SlotSignature
from esper_ray.errors import BlueprintError
from esper_ray.karn.catalog import CATALOG, TASK_KINDS, Blueprint

app = typer.Typer(help="Blocks that can grow: list, show, check your own.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)
_KINDS: dict[int, SlotKind] = {3: "conv", 2: "sequence", 1: "vector"}

Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]
Slot = Annotated[str, typer.Option("--slot", help="A slot's shape, such as 32x12x12, 64x32 or 24.", metavar="SHAPE")]


@app.command("list")
def list_blueprints(
    slot: Slot = "",
    task: Annotated[str, typer.Option("--task", help="Only what fits that task's slots.", metavar="TASK")] = "",
    settings: Settings = None,
) -> None:
    """List all blueprints; with a slot, what fits it, what it costs there, and why the others do not grow in it."""
    seeds = configuration.load(None, settings or ()).seeds
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    if task and task not in TASK_KINDS and ":" not in task:
        raise BlueprintError(
            f"There is no task {task!r}.", remedy=f"Choose one of {', '.join(TASK_KINDS)}, or MODULE:FUNCTION of yours."
        )
    if not slot:
        left_out = CATALOG.of_task(task, approved=seeds.approved).left_out if task else {}
        for column in ("", "name", "tier", "what it is"):
            table.add_column(column, no_wrap=column != "what it is", min_width=5)
        for each in sorted(CATALOG, key=lambda each: each.id in left_out):
            why, gone = left_out.get(each.id), each.id in left_out
            said = f"Not here: {why}." if why else f"{each.description} For {_slots(each)}."
            table.add_row(each.id, each.name, each.tier.name.lower(), said, style="dim" if gone else "")
        console.print(table)
        return
    signature = parse_slot(slot)
    answer = CATALOG.query(signature, approved=seeds.approved, offer=seeds.offer)
    for column in ("", "name", "parameters", "kFLOPs", "about ms a step", "why not"):
        table.add_column(
            column,
            justify="right" if column in ("parameters", "kFLOPs", "about ms a step") else "left",
            no_wrap=column != "why not",
        )
    for each in answer.candidates:
        table.add_row(each.id, each.name, *_figures(each, signature), "")
    for each in CATALOG:
        if each.id in answer.left_out:
            table.add_row(each.id, each.name, "", "", "", answer.left_out[each.id], style="dim")
    console.print(table)


@app.command()
def show(
    identifier: Annotated[str, typer.Argument(help="A blueprint's number, such as BP009.", metavar="BLUEPRINT")],
    slot: Slot = "32x12x12",
) -> None:
    """Show one blueprint: its parameters, what it costs in a slot, and a diagram of what it computes."""
    blueprint = described(identifier)
    signature = parse_slot(slot)
    console.print(f"{blueprint.id}  {blueprint.name}  ({blueprint.family}, {blueprint.tier.name.lower()})")
    console.print(f"{blueprint.description}\nSource: {blueprint.source}\nSlots: {', '.join(blueprint.kinds)}")
    for name, bound in blueprint.bounds.items():
        console.print(f"  {name:10} {bound.minimum:g} to {bound.maximum:g}, {bound.default:g}: {bound.meaning}")
    reason = blueprint.misfit(signature)
    if reason:
        console.print(f"In {slot}: does not fit; it is {reason}.")
        return
    size, flops, ms = _figures(blueprint, signature)
    console.print(f"In {slot}: {size} parameters, {flops} kFLOPs a sample, about {ms} ms a step over a batch of 64.")
    if blueprint.tier is not BlueprintTier.HIGH_RISK:
        console.print(diagram(blueprint, signature), markup=False)


@app.command()
def check(
    module: Annotated[
        str, typer.Argument(help="A module that registers blocks, by its import path.", metavar="MODULE")
    ],
    folder: Annotated[Path, typer.Option("--folder", help="From where it is imported.")] = Path(),
) -> None:
    """Check the blocks of a module as our own are tested: in each slot that they fit, at their parameters' bounds."""
    from esper_ray.karn import own, properties

    failed = False
    for blueprint in own.load([module], str(folder)):
        slots = [slot for slot in properties.SLOTS if not blueprint.misfit(slot)]
        console.print(f"{blueprint.id}  {blueprint.name}: {len(slots)} slots")
        for promise in (*properties.QUICK, *properties.THOROUGH):
            said = _broken(promise, blueprint, slots)
            failed = failed or bool(said)
            console.print(f"  {'broken' if said else 'kept  '}  {promise.__name__.replace('_', ' ')}{said}")
    if failed:
        raise BlueprintError(f"A block of {module} breaks a promise.", remedy="See above, and karn/properties.py.")
    console.print("Approve a block for a run with  --set seeds.modules=[MODULE] --set seeds.approved=[NUMBER]")


def parse_slot(text: str) -> SlotSignature:
    """``32x12x12`` is a map, ``64x32`` a sequence and ``24`` a vector; a full signature is taken too.

    Raises:
        BlueprintError: it is neither.
    """
    kind = _KINDS.get(text.count("x") + 1)
    return SlotSignature.parse(text if "-" in text or kind is None else f"{kind}-{text}")


def described(identifier: str) -> Blueprint:
    """A row of the table for a person to read, whatever its tier.

    Raises:
        BlueprintError: there is none of that number.
    """
    found = next((each for each in CATALOG if each.id == identifier.upper()), None)
    if found is None:
        raise BlueprintError(f"There is no blueprint {identifier}.", remedy="See `esper blueprints list`.")
    return found


def diagram(blueprint: Blueprint, signature: SlotSignature) -> str:
    """The layers of a newborn in the order of their calls, with their shapes, between the slot's input and output."""
    import torch
    from torch import nn

    from esper_ray.karn import blueprints

    branch = blueprints.build(blueprint.id, signature, tier_ceiling=BlueprintTier.EXPERIMENTAL)
    lines: list[str] = []

    def note(name: str) -> object:
        def hook(layer: nn.Module, _: object, out: torch.Tensor) -> None:
            weights = sum(parameter.numel() for parameter in layer.parameters())
            shape = "x".join(map(str, out.shape[1:]))
            lines.append(f"  |   {name:12} {type(layer).__name__:18} -> {shape:14} {weights:>8,} parameters")

        return hook

    for name, layer in branch.named_modules():
        if name and not any(True for _ in layer.children()):
            layer.register_forward_hook(note(name))
    with torch.no_grad():
        branch(torch.randn(2, *signature.shape, generator=torch.Generator().manual_seed(0)))
    shape = "x".join(map(str, signature.shape))
    return "\n".join([f"  h {shape}", "  |", *lines, "  |", "  y = h + alpha * scale * (the above)"])


def _slots(blueprint: Blueprint) -> str:
    return f"{' and '.join(blueprint.kinds)} slots"


def _figures(blueprint: Blueprint, signature: SlotSignature) -> tuple[str, str, str]:
    cost = blueprint.costs(signature)
    return f"{cost.parameters:,}", f"{cost.flops / 1e3:,.0f}", f"{blueprint.latency_ms(signature):.1f}"


def _broken(promise: object, blueprint: Blueprint, slots: list[SlotSignature]) -> str:
    """What was found where it does not hold, or an empty text."""
    from esper_ray.karn import properties

    assert callable(promise)
    for slot in slots:
        for corner, values in properties.corners(blueprint).items():
            try:
                promise(blueprint, slot, values)
            except Exception as error:  # a block may raise anything
                what = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                return f": {what}{error} ({slot}, {corner})"
    return ""
