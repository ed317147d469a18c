"""Orders from outside: which operation is possible in which stage is in the lifecycle table, and so is its gate.

Whatever is refused is told with its reason, as an event and to whoever asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from esper_ray.contracts.enums import BlendMode, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, blueprint_name
from esper_ray.contracts.ports import KernelSpec
from esper_ray.errors import BlueprintError
from esper_ray.karn.catalog import CATALOG
from esper_ray.kasmina import advance, kernels
from esper_ray.kasmina.blending import MODES, SCHEDULES
from esper_ray.kasmina.gates import Verdict
from esper_ray.kasmina.lifecycle import HOLDABLE, LIFE, least_stay
from esper_ray.kasmina.slot import Seed, Slot
from esper_ray.reliability.failpoints import passing

if TYPE_CHECKING:
    from esper_ray.kasmina.garden import Garden

# A parameter, its gradient and its two moments, in 4 bytes each.
_BYTES_PER_PARAMETER = 16


def carry_out(garden: Garden, command: AdaptationCommand) -> str:
    """Carry out one command; returns why it was refused, or an empty text.

    A GERMINATE only asks for its kernel: the graft happens later, between two steps. STABILIZE holds a seed in its
    stage, and its alpha where it is, until the next boundary; its longest stay goes on counting.
    """
    reason = _carry_out(garden, command)
    if reason:
        operation = command.seed_directive.operation.name if command.seed_directive else command.type.name
        garden.note("refusal", slot=command.slot, seed=command.seed, operation=operation, reason=reason)
    return reason


def refusal(garden: Garden, command: AdaptationCommand) -> str:
    """Why this command would be refused as things stand, or an empty text; nothing is changed or told."""
    reason = _impossible(garden, command)
    directive = command.seed_directive
    if reason or directive is None or directive.operation is not SeedOperation.GERMINATE:
        return reason
    spec, verdict = _sanity(garden, garden.slots[command.slot], directive, _mode(garden, directive))
    return verdict.reason if spec is None else ""


def take_back(garden: Garden) -> list[int]:
    """Undo the germinations of the boundary that has just been; returns their slots.

    Nothing of them is grafted yet. They leave no trace: their numbers are free again, and nobody is told.
    """
    slots = [slot for slot in garden.slots if slot.stage is Stage.GERMINATED]
    found = [slot for slot in slots if slot.seed is not None and slot.seed.born_epoch == garden.epoch]
    for slot in found:
        assert slot.seed is not None
        garden.births.forget(slot.seed)
        slot.seed, slot.stage = None, Stage.DORMANT
    garden.next_number -= len(found)
    return [slot.info.index for slot in found]


def _impossible(garden: Garden, command: AdaptationCommand) -> str:
    """Why the lifecycle does not allow the command now; the gates are not asked."""
    directive = command.seed_directive
    if directive is None:
        return f"{command.type.name} is nothing that the seeds of a model can follow"
    if not 0 <= command.slot < len(garden.slots):
        return f"the model has no slot {command.slot}"
    slot, operation = garden.slots[command.slot], directive.operation
    if command.seed and (slot.seed is None or slot.seed.number != command.seed):
        return f"there is no seed {command.seed} in that slot"
    if operation is SeedOperation.STABILIZE and slot.stage in HOLDABLE:
        return ""
    to = LIFE[slot.stage].orders.get(operation)
    if to is None:
        taken = f", with {slot.seed.spec.blueprint} in it" if slot.seed is not None else ""
        return f"{operation.name} is not possible while the slot is {slot.stage.name}{taken}"
    stay, least = garden.stay(slot), least_stay(slot.stage, garden.config)
    if to not in (Stage.GERMINATED, Stage.CULLED) and stay < least:
        return f"the seed has been in {slot.stage.name} for {stay} of at least {least} epochs"
    return ""


def _carry_out(garden: Garden, command: AdaptationCommand) -> str:
    reason = _impossible(garden, command)
    directive = command.seed_directive
    if reason or directive is None:
        return reason
    slot, operation, author = garden.slots[command.slot], directive.operation, f"ordered by {command.issued_by}"
    if operation is SeedOperation.STABILIZE:
        assert slot.seed is not None
        slot.seed.held_until = garden.epoch + 1
        garden.note("hold", seed=slot.seed.number, slot=slot.info.index, until=garden.epoch, reason=author)
        return ""
    to = LIFE[slot.stage].orders[operation]
    if to is Stage.GERMINATED:
        return _germinate(garden, slot, command, directive)
    if to is Stage.CULLED:
        garden.cull(slot, author)
        return ""
    verdict = advance.try_stage(garden, slot, to, first_epoch=garden.epoch, reason=author)
    return "" if verdict.passed else f"{to.name} was refused by its gate: {verdict.reason}"


def _germinate(garden: Garden, slot: Slot, command: AdaptationCommand, directive: SeedDirective) -> str:
    mode = _mode(garden, directive)
    spec, verdict = _sanity(garden, slot, directive, mode)
    garden.note_gate(Gate.G0_SANITY, verdict, 0, slot.info.index, Stage.DORMANT, Stage.GERMINATED)
    if spec is None:
        return verdict.reason
    slot.seed = Seed(
        number=garden.next_number,
        slot=slot.info.index,
        spec=spec,
        stage=Stage.DORMANT,
        born_epoch=garden.epoch,
        stage_epoch=garden.epoch,
        command_id=command.command_id,
        mode=mode,
        schedule=directive.blend_schedule or garden.config.blend_schedule,
    )
    garden.next_number += 1
    garden.enter(slot, Stage.GERMINATED, f"ordered by {command.issued_by}")
    garden.expect(kernels.ask(garden.source, slot.seed))
    passing("garden.asked")
    return ""


def _mode(garden: Garden, directive: SeedDirective) -> BlendMode:
    return MODES[garden.config.blend_mode] if directive.blend_mode is BlendMode.UNKNOWN else directive.blend_mode


def _sanity(garden: Garden, slot: Slot, directive: SeedDirective, mode: BlendMode) -> tuple[KernelSpec | None, Verdict]:
    """G0 on the order: blueprint approved and fitting, within the parameter limit, ramp known, memory there."""
    try:
        blueprint = CATALOG.get(blueprint_name(directive.blueprint), approved=garden.config.approved)
        spec = blueprint.spec(slot.info.signature, directive.parameters)
        size = blueprint.parameters(slot.info.signature, directive.parameters)
    except BlueprintError as fault:
        return None, Verdict(False, str(fault), {})
    total, need = garden.parameter_count() + size, size * _BYTES_PER_PARAMETER
    reason = ""
    if directive.blend_schedule and directive.blend_schedule not in SCHEDULES:
        reason = f"there is no blend schedule {directive.blend_schedule}, only {', '.join(SCHEDULES)}"
    elif mode is BlendMode.CONFIDENCE and garden.isolated.blind:
        reason = "blend mode confidence asks the model before each pass, and compiled code cannot be asked"
    elif total > garden.max_parameters:
        reason = f"the model would have {total} parameters, more than the {garden.max_parameters} of run.max_parameters"
    elif limit := garden.limits.refusal(garden.seeds, blueprint.flops(slot.info.signature, directive.parameters)):
        reason = limit
    elif need > (free := _free_bytes(slot.info.signature.device)):
        reason = f"it needs {need / 2**20:.0f} MiB to train, and {free / 2**20:.0f} MiB are free"
    else:
        reason = garden.isolated.breakers.refusal(spec.blueprint)
    figures = {"parameters": size, "parameters_in_all": total, "needs_mb": need / 2**20}
    verdict = Verdict(not reason, reason or "blueprint exists, is approved and fits", figures)
    return None if reason else spec, verdict


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
