"""A run as a checkpoint and back: everything that decides what its next step will be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import CheckpointError
from esper_ray.kasmina import snapshot
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
        "generator/cpu": torch.get_rng_state(),
    }
    data = {
        "run": trainer.request.run,
        "seed": trainer.config.run.seed,
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "missed": trainer.missed,
        "seconds": trainer.seconds,
        "garden": garden,
        "rates": trainer.rates.save(),
        "costs": trainer.meter.save(),
    }
    return Checkpoint(trainer.epoch, data, tensors)


def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Bring a fresh trainer to where ``saved`` was made.

    Raises:
        CheckpointError: it belongs to another run or seed.
    """
    data = saved.data
    if data["run"] != trainer.request.run or data["seed"] != trainer.config.run.seed:
        raise CheckpointError(
            f"The checkpoint belongs to {data['run']} with seed {data['seed']}.",
            why=f"This is {trainer.request.run} with seed {trainer.config.run.seed}.",
            remedy="Resume a run under its own name and configuration.",
        )
    trainer.epoch, trainer.step = saved.epoch, int(data["step"])
    trainer.missed, trainer.seconds = int(data["missed"]), float(data["seconds"])
    trainer.rates.load(data["rates"])
    trainer.meter.load(data["costs"])
    snapshot.restore(trainer.garden, data["garden"], saved.group("seeds"))
    for seed in trainer.garden.seeds:
        if seed.branch is None:
            continue
        if seed.born_epoch == 0:
            trainer.groups.plant(seed)
            continue
        trainer.groups.adopt(seed)
        if seed.stage is Stage.FOSSILIZED:
            trainer.groups.fossilise(seed)
    trainer.model.load_state_dict(saved.group("model"))
    checkpoints.unpack_optimizer(trainer.groups.optimizer, saved.group("optimizer"), _names(trainer))
    torch.set_rng_state(saved.tensors["generator/cpu"])


def _names(trainer: Trainer) -> dict[torch.Tensor, str]:
    """A name for each trained parameter; fossils have theirs in the host."""
    outside = {number: seed.branch for number, seed in trainer.groups.seeds.items() if seed.branch is not None}
    return checkpoints.names_of(trainer.model, outside)
