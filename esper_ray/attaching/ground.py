"""What has to be known of a model before anything can grow in it, and of the data that it is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper_ray.config import Config
from esper_ray.contracts.ports import HostGraph, RunOpening, SlotInfo
from esper_ray.errors import HostError
from esper_ray.kasmina.garden import Garden
from esper_ray.tasks import hostgraph
from esper_ray.tasks import slots as places
from esper_ray.tasks.data import Split
from esper_ray.tasks.objective import Objective
from esper_ray.tasks.propose import Proposal, propose
from esper_ray.tolaria.trainer import Surroundings


@dataclass(frozen=True, slots=True)
class Ground:
    """A model as one dry forward shows it.

    Attributes:
        parameters: of the host alone.
        sample: some inputs [N, ...], N at most 3.
        flops: of one sample's forward and backward pass through the host.
    """

    slots: tuple[SlotInfo, ...]
    proposals: tuple[Proposal, ...]
    sample: Tensor
    graph: HostGraph
    flops: float
    parameters: int


def explore(model: nn.Module, slots: places.Slots | Literal["auto"], sample: Tensor) -> Ground:
    """Find the slots and their shapes by a dry forward of ``sample`` [N, ...].

    Raises:
        HostError: a slot does not do; the text says which and why.
    """
    proposals: Sequence[Proposal] = ()
    if slots == "auto":
        proposals = propose(model, sample)
        slots = [proposal.name for proposal in proposals]
    found, few = places.find(model, sample, slots), sample[:3].detach().clone()
    with places.undisturbed(model):
        graph = hostgraph.trace(model, few[:2], list(dict.fromkeys(slots)))
        flops = _flops(model, few)
    return Ground(found, tuple(proposals), few, graph, flops, sum(each.numel() for each in model.parameters()))


def _flops(model: nn.Module, sample: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        outputs = model(sample)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
    return float(counter.get_total_flops()) / len(sample)


def opening(
    name: str, ground: Ground, garden: Garden, config: Config, around: Surroundings, *, epochs: int, epoch: int = 0
) -> RunOpening:
    """What Tamiyo is told of the loop, at its begin or where it goes on after ``epoch``."""
    return RunOpening(
        run=name,
        seed=config.run.seed,
        slots=ground.slots,
        candidates=tuple(candidate for slot in ground.slots for candidate in around.candidates(slot)),
        controller=config.tamiyo.controller,
        epochs=epochs,
        host_parameters=ground.parameters,
        max_parameters=config.run.max_parameters,
        max_flops=config.run.max_flops,
        host_flops=garden.limits.host_flops,
        probation_epochs=config.seeds.probation_epochs,
        lockstep=config.run.mode == "lockstep",
        epoch=epoch,
        branch=garden.branch,
        settings=config.tamiyo.model_dump(mode="json"),
        graph=ground.graph,
    )


def held_out(validation: Iterable[tuple[Tensor, Tensor]], objective: Objective, model: nn.Module, most: int) -> Split:
    """At most ``most`` samples of the batches of (inputs, targets), beside the model.

    Raises:
        HostError: there are less than two.
    """
    device = places.device_of(model)
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for batch, wanted in validation:
        inputs.append(batch.to(device))
        targets.append(wanted.to(device))
        if sum(map(len, targets)) >= most:
            break
    if sum(map(len, targets)) < 2:
        raise HostError("The validation data are empty.", remedy="Give batches of (inputs, targets), held out.")
    return Split(torch.cat(inputs)[:most], torch.cat(targets)[:most], objective)
