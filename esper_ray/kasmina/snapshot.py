"""A garden as plain data and back: what a checkpoint carries of the seeds.

Restoring rebuilds each branch from its blueprint, puts it back into its slot, and then takes the saved weights.
Fossils are part of the host by then: their weights come with the model's own state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper_ray.contracts.enums import BlendMode
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import blueprint_name
from esper_ray.contracts.ports import KernelSpec
from esper_ray.karn import blueprints
from esper_ray.kasmina import kernels
from esper_ray.kasmina.garden import GROWN, Garden
from esper_ray.kasmina.lifecycle import SETTLED
from esper_ray.kasmina.slot import Seed, Slot

_COUNTERS = ("branch", "next_number", "epoch", "culled", "checks", "violations", "isolated_steps")
_SLOT_FIELDS = ("embargo_until", "offences", "last_seed")
_SEED_FIELDS = (
    "number", "born_epoch", "stage_epoch", "command_id", "schedule", "alpha", "ramp_start", "ramp_steps", "digest",
    "flops_forward", "flops_backward", "gradient_norm", "learning_rate", "violations", "held_until", "evidence",
)  # fmt: skip


def save(garden: Garden) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The garden's state as JSON-ready data, and the weights of branches that are not fossils yet."""
    tensors: dict[str, Tensor] = {}
    rows = []
    for slot in garden.slots:
        row: dict[str, Any] = {"stage": int(slot.stage), **{name: getattr(slot, name) for name in _SLOT_FIELDS}}
        seed = slot.seed
        if seed is not None:
            row["seed"] = {
                "blueprint": seed.blueprint,
                "parameters": dict(seed.spec.parameters),
                "grafted": slot.hooked,
                "mode": int(seed.mode),
                **{name: copy.deepcopy(getattr(seed, name)) for name in _SEED_FIELDS},
            }
            if seed.branch is not None and seed.stage not in SETTLED:
                tensors.update((f"{seed.number}.{name}", value) for name, value in seed.branch.state_dict().items())
        rows.append(row)
    counters = {name: getattr(garden, name) for name in _COUNTERS}
    return {
        "slots": rows,
        "distilling": garden.isolated.teacher.on,
        "breakers": garden.isolated.breakers.save(),
        **counters,
    }, tensors


def clear(garden: Garden) -> None:
    """Take every seed out, fossils included, and forget what was on its way: the host is as it was born."""
    for slot in garden.slots:
        slot.clear()
    if hasattr(garden.model, GROWN):
        delattr(garden.model, GROWN)
    garden.drop_pending()
    garden.drain_events()


def restore(garden: Garden, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Bring a fresh garden into the saved state; kernels that were on their way are asked for again."""
    for name in _COUNTERS:
        setattr(garden, name, data[name])
    garden.isolated.teacher.on = data.get("distilling")
    garden.isolated.breakers.load(data.get("breakers", {}))
    for slot, row in zip(garden.slots, data["slots"], strict=True):
        slot.stage = Stage(row["stage"])
        for name in _SLOT_FIELDS:
            setattr(slot, name, row[name])
        if "seed" in row:
            _restore_seed(garden, slot, row["seed"], tensors)


def _restore_seed(garden: Garden, slot: Slot, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    spec = KernelSpec(blueprint_name(row["blueprint"]), slot.info.signature, row["parameters"])
    known = {name: row[name] for name in _SEED_FIELDS if name in row}
    mode = BlendMode(row.get("mode", BlendMode.RESIDUAL))
    seed = Seed(slot=slot.info.index, spec=spec, stage=slot.stage, mode=mode, **known)
    slot.seed = seed
    if not row["grafted"]:
        garden.expect(kernels.ask(garden.source, seed))
        return
    branch = blueprints.build(
        spec.blueprint,
        spec.signature,
        spec.parameters,
        generator=torch.Generator(),
        approved=garden.config.approved,
    )
    slot.graft(branch)
    if slot.stage in SETTLED:
        garden.become_fossil(slot)
    else:
        prefix = f"{seed.number}."
        branch.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
