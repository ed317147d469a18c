"""A task is a host, its data and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.config import RunConfig
from esper_ray.contracts.ports import HostGraph, SlotInfo
from esper_ray.errors import ConfigError
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import data, hostgraph, own, slots
from esper_ray.tasks.data import DataSet
from esper_ray.tasks.mlp import MLPLite
from esper_ray.tasks.propose import Proposal, propose
from esper_ray.tasks.resnet import ResNetLite
from esper_ray.tasks.slots import check_host
from esper_ray.tasks.transformer import TransformerLite

__all__ = ["Task", "assemble", "build_task", "proposals"]


DATA_OF: Mapping[str, tuple[str, ...]] = {
    "resnet-lite": ("glyphs", "digits", "cifar10"),
    "transformer-lite": ("pycode",),
    "mlp-lite": ("tabular",),
}


@dataclass(frozen=True, slots=True)
class Task:
    """What Tolaria trains. ``slots`` are names of submodules; ``optimizer`` is what the task itself asks for."""

    name: str
    model: nn.Module
    data: DataSet
    slots: tuple[SlotInfo, ...]
    graph: HostGraph
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch, a scalar."""
        return self.data.train.objective.loss(outputs, targets)


def build_task(config: RunConfig, folder: Path, device: torch.device) -> Task:
    """Host and data of a run; see `assemble`.

    Raises:
        EsperError: the task's function, its data, its model or its slots are not what they have to be.
    """
    if not config.is_own_task:
        _check_pair(config)
        return assemble(config, data.load(config, folder), device)
    made = own.make(config)
    return _finish(config, made.model, made.data, made.slots, device, made.optimizer)


def proposals(config: RunConfig, folder: Path) -> tuple[Proposal, ...]:
    """Where seeds could grow in the task's model, whatever slots the task names itself."""
    task = build_task(config, folder, torch.device("cpu"))
    return propose(task.model, task.data.train.inputs[:3])


def assemble(config: RunConfig, dataset: DataSet, device: torch.device) -> Task:
    """A host for data that are there. Its birth weights are a function of the run's seed alone.

    Raises:
        ConfigError: the data are fewer than a batch.
        HostError: the host is larger than hosts may be.
    """
    model: ResNetLite | TransformerLite | MLPLite
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "host"))
        if config.task == "transformer-lite":
            model = TransformerLite(classes=dataset.classes, context=config.context, width=4 * config.host_width)
        elif config.task == "mlp-lite":
            model = MLPLite(columns=dataset.sample_shape[0], classes=dataset.classes, width=4 * config.host_width)
        else:
            model = ResNetLite(channels=dataset.sample_shape[0], classes=dataset.classes, width=config.host_width)
    return _finish(config, model, dataset, model.slots, device)


def _check_pair(config: RunConfig) -> None:
    fitting = DATA_OF[config.task]
    if config.dataset not in fitting:
        needed = " or ".join(filter(None, (", ".join(fitting[:-1]), fitting[-1])))
        raise ConfigError(
            f"run.task is {config.task}, and run.dataset is {config.dataset}.",
            why=f"{config.task} learns from {needed}.",
            remedy=f"Set run.dataset={fitting[0]}, or another task.",
        )


def _finish(
    config: RunConfig,
    model: nn.Module,
    dataset: DataSet,
    wanted: Any,
    device: torch.device,
    optimizer: Mapping[str, Any] | None = None,
) -> Task:
    if len(dataset.train) < config.batch_size:
        raise ConfigError(
            f"run.batch_size is {config.batch_size}, but there are only {len(dataset.train)} training samples.",
            remedy="Lower run.batch_size or raise run.train_samples.",
        )
    check_host(model, config.host_limit)
    model = model.to(device)
    sample = dataset.train.inputs[:3].to(device)
    names = [proposal.name for proposal in propose(model, sample)] if wanted == "auto" else wanted
    found = slots.find(model, sample, names)
    with slots.undisturbed(model):
        graph = hostgraph.trace(model, sample[:2], [slot.name for slot in found])
    return Task(config.task, model, dataset, found, graph, optimizer or {})
