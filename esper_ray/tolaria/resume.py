"""A run as a checkpoint and back: everything that decides what its next step will be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from esper_ray.errors import CheckpointError
from esper_ray.kasmina import snapshot
from esper_ray.kasmina.garden import GROWN
from esper_ray.kasmina.lifecycle import SETTLED
from esper_ray.tolaria import checkpoint as checkpoints
from esper_ray.tolaria.checkpoint import Checkpoint

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Trainer


def checkpoint(trainer: Trainer) -> Checkpoint:
    """The run as it stands after a boundary."""
    garden, branches = snapshot.save(trainer.garden)
    moments = checkpoints.pack_optimizer(trainer.groups.optimizer, _names(trainer))
    tensors = {
        **{f"model/{name}": value for name, value in trainer.model.state_dict().items()},
        **{f"seeds/{name}": value for name, value in branches.items()},
        **{f"optimizer/{name}": value for name, value in moments.items()},
        **{f"generator/{name}": state for name, state in _generators(trainer).items()},
    }
    data = {
        "run": trainer.request.run,
        "seed": trainer.config.run.seed,
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "missed": trainer.missed,
        "seconds": trainer.seconds,
        "garden": garden,
        "shared": trainer.groups.shared.save(_branches(trainer)),
        "rates": trainer.rates.save(),
        "costs": trainer.meter.save(),
        "emergency": trainer.emergency.save(),
        "watch": {name: watch.save() for name, watch in trainer.watches.items()},
    }
    return Checkpoint(trainer.epoch, data, tensors)


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Bring a fresh trainer to where ``saved`` was made.

    Raises:
        CheckpointError: it belongs to another run or seed, or to another model.
    """
    demand_own(trainer, saved)
    demand_fit(trainer, saved)
    data = saved.data
    trainer.epoch, trainer.step = saved.epoch, int(data["step"])
    trainer.missed, trainer.seconds = int(data["missed"]), float(data["seconds"])
    trainer.rates.load(data["rates"])
    trainer.meter.load(data["costs"])
    snapshot.restore(trainer.garden, data["garden"], saved.group("seeds"))
    trainer.groups.shared.load(data.get("shared", ()), _branches(trainer))
    for seed in trainer.garden.seeds:
        if seed.branch is None:
            continue
        if seed.born_epoch == 0:
            trainer.groups.plant(seed)
            continue
        trainer.groups.adopt(seed)
        if seed.stage in SETTLED:
            trainer.groups.fossilise(seed)
    trainer.model.load_state_dict(saved.group("model"))
    checkpoints.unpack_optimizer(trainer.groups.optimizer, saved.group("optimizer"), _names(trainer))
    trainer.emergency.load(data.get("emergency", trainer.emergency.save()))
    for name, watch in trainer.watches.items():
        watch.load(data.get("watch", {}).get(name, watch.save()))
    torch.set_rng_state(saved.tensors["generator/cpu"])
    if trainer.device.type == "cuda" and "generator/cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors["generator/cuda"], trainer.device)


def clear(trainer: Trainer) -> None:
    """Make a trainer that has trained as fresh as `restore` wants it: no seed, no moments, no schedule begun."""
    snapshot.clear(trainer.garden)
    trainer.begin(trainer.total_steps)


def demand_own(trainer: Trainer, saved: Checkpoint) -> None:
    """Refuse what was made by another run.

    Raises:
        CheckpointError: it belongs to another run or seed.
    """
    data = saved.data
    if data["run"] != trainer.request.run or data["seed"] != trainer.config.run.seed:
        raise CheckpointError(
            f"The checkpoint of epoch {saved.epoch} belongs to {data['run']} with seed {data['seed']}.",
            why=f"This is {trainer.request.run} with seed {trainer.config.run.seed}.",
            remedy="Resume a run under its own name and configuration.",
        )


def demand_fit(trainer: Trainer, saved: Checkpoint) -> None:
    """Refuse what another model left: the host's own tensors must be there, with their shapes.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    there = saved.group("model")
    for name, value in trainer.model.state_dict().items():
        if name.startswith(f"{GROWN}."):
            continue
        if name not in there or there[name].shape != value.shape:
            raise CheckpointError(
                f"The checkpoint of epoch {saved.epoch} does not fit the model.",
                why=f"{name} is {tuple(there[name].shape) if name in there else 'not in it'}, "
                f"and {tuple(value.shape)} in the model.",
                remedy="Use the configuration that the checkpoint was made with.",
            )


def _generators(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(trainer.device)
    return found


def _branches(trainer: Trainer) -> dict[int, nn.Module]:
    return {seed.number: seed.branch for seed in trainer.garden.seeds if seed.branch is not None}


def _names(trainer: Trainer) -> dict[torch.Tensor, str]:
    """A name for each trained parameter; fossils have theirs in the host."""
    outside = {number: seed.branch for number, seed in trainer.groups.seeds.items() if seed.branch is not None}
    return checkpoints.names_of(trainer.model, outside)
