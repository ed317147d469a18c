"""A loop of the user's own as a state and back, so that it goes on as if it had never stopped.

    torch.save(grower.state_dict(), "point.pt")     # after an epoch, or after a whole step

    grower = esper_ray.attach(...)                  # model and optimizer made anew, attached as before
    grower.load_state_dict(torch.load("point.pt"))

The state is made of plain types and tensors, as `torch.load` takes them by default. It holds the model, the user's
optimizer, the seeds with theirs, and torch's generators; schedulers and the order of the data are the loop's. Tamiyo's
memory is in her journal: with the same ``home``, and the same batches, the loop goes on bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_ray.errors import CheckpointError, HostError
from esper_ray.kasmina import snapshot
from esper_ray.kasmina.garden import GROWN
from esper_ray.tasks import slots as places

if TYPE_CHECKING:
    from esper_ray.attaching.grower import Grower

FORMAT = 1
_COUNTERS = ("step", "epoch", "since", "samples", "flops", "after")


@dataclass(slots=True)
class Place:
    """Where a loop stands.

    Attributes:
        loss_sum: of the training losses of this epoch.
        since: steps in this epoch.
        samples: trained on so far.
        flops: spent on training the model so far, without what the meter counts.
        after: `Grower.step` comes after the optimizer's step; None before the first one.
        statistics: of the layers, [layers, ...]; see `tolaria.statistics`.
    """

    loss_sum: Tensor
    step: int = 0
    epoch: int = 0
    since: int = 0
    samples: int = 0
    flops: float = 0.0
    after: bool | None = None
    statistics: npt.NDArray[np.float32] | None = None


def state_of(grower: Grower) -> dict[str, Any]:
    """See `Grower.state_dict`.

    Raises:
        HostError: it is asked for in the middle of a step.
    """
    garden, place = grower.garden, grower.place
    if any(p.grad is not None for seed in garden.seeds for p in grower.companion.trained(seed)):
        raise HostError(
            "A step is not over yet.",
            why="Seeds have gradients that their optimizer has not used.",
            remedy="Call state_dict() after grower.step() and optimizer.step(), before the model's next pass.",
        )
    data, branches = snapshot.save(garden)
    # Whatever trains on must not write in it.
    return copy.deepcopy(
        {
            "format": FORMAT,
            "name": grower.name,
            "seed": grower.config.run.seed,
            "slots": _slots(grower),
            "place": {name: getattr(place, name) for name in _COUNTERS},
            "loss_sum": place.loss_sum,
            "statistics": None if place.statistics is None else torch.from_numpy(place.statistics),
            "blind": garden.isolated.blind,
            "garden": data,
            "branches": branches,
            "sampled": [seed.number for seed in garden.seeds if seed.sample],
            "events": garden.told(),
            "companion": grower.companion.state_dict(),
            "costs": grower.meter.save(),
            "model": dict(grower.model.state_dict()),
            "optimizer": grower.optimizer.state_dict(),
            "generators": _generators(grower),
        }
    )


def restore(grower: Grower, state: Mapping[str, Any]) -> None:
    """See `Grower.load_state_dict`."""
    _demand_fit(grower, state)
    garden, place, device = grower.garden, grower.place, places.device_of(grower.model)
    state = copy.deepcopy(dict(state))
    snapshot.restore(garden, state["garden"], state["branches"])
    for seed in garden.seeds:
        seed.sample = seed.number in state["sampled"]
        if seed.branch is not None:
            seed.branch.to(device)
    grower.companion.load_state_dict(state["companion"], {seed.number: seed for seed in garden.seeds})
    grower.model.load_state_dict(state["model"])
    grower.optimizer.load_state_dict(state["optimizer"])
    grower.meter.load(state["costs"])
    for name in _COUNTERS:
        setattr(place, name, state["place"][name])
    grower.companion.isolated_later = bool(place.after)
    place.loss_sum = state["loss_sum"].to(device)
    place.statistics = None if state["statistics"] is None else state["statistics"].numpy()
    garden.isolated.blind = state["blind"]
    for event in state["events"]:
        garden.note(**event)
    grower.rename(state["name"])
    torch.set_rng_state(state["generators"]["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state["generators"]:
        torch.cuda.set_rng_state(state["generators"]["cuda"].cpu(), device)
    garden.isolated.arm(place.step)


def _slots(grower: Grower) -> list[list[Any]]:
    return [[slot.name, slot.signature.kind, *slot.signature.shape] for slot in grower.ground.slots]


def _generators(grower: Grower) -> dict[str, Tensor]:
    device, found = places.device_of(grower.model), {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _demand_fit(grower: Grower, state: Mapping[str, Any]) -> None:
    """Refuse before anything is changed."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise CheckpointError("This is no state of a loop that grows.", remedy="Give what grower.state_dict() gave.")
    if grower.place.step or grower.garden.seeds:
        raise CheckpointError(
            "This loop has trained already.", remedy="Make model and optimizer anew, attach them, and load then."
        )
    for what, saved, ours in (
        ("list of slots", state["slots"], _slots(grower)),
        ("run.seed", state["seed"], grower.config.run.seed),
    ):
        if saved != ours:
            raise CheckpointError(
                f"The state belongs to another loop: its {what} is {saved}, and {ours} here.",
                remedy="Attach the model as it was attached then.",
            )
    there = state["model"]
    for name, value in grower.model.state_dict().items():
        if not name.startswith(f"{GROWN}.") and (name not in there or there[name].shape != value.shape):
            found = tuple(there[name].shape) if name in there else "not in it"
            raise CheckpointError(
                "The state does not fit the model.",
                why=f"{name} is {found}, and {tuple(value.shape)} in the model.",
                remedy="Make the model as it was made then.",
            )
