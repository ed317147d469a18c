"""A task is a host, its data and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from esper_ray.config import RunConfig
from esper_ray.contracts.budgets import HOST_PARAMETER_LIMIT
from esper_ray.contracts.ports import HostGraph, SlotInfo, SlotSignature
from esper_ray.errors import ConfigError
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import data, hostgraph
from esper_ray.tasks.data import DataSet
from esper_ray.tasks.resnet import ResNetLite

__all__ = ["Task", "assemble", "build_task"]


@dataclass(frozen=True, slots=True)
class Task:
    """What Tolaria trains. The loss is cross-entropy over classes; ``slots`` are names of submodules."""

    name: str
    model: nn.Module
    data: DataSet
    slots: tuple[SlotInfo, ...]
    graph: HostGraph

    @staticmethod
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets)


def build_task(config: RunConfig, folder: Path, device: torch.device) -> Task:
    """Host and data of a run; see `assemble`."""
    return assemble(config, data.load(config, folder), device)


def assemble(config: RunConfig, dataset: DataSet, device: torch.device) -> Task:
    """A host for data that are there. Its birth weights are a function of the run's seed alone.

    Raises:
        ConfigError: the host is larger than hosts may be, or the data smaller than a batch.
    """
    if len(dataset.train) < config.batch_size:
        raise ConfigError(
            f"run.batch_size is {config.batch_size}, but there are only {len(dataset.train)} training samples.",
            remedy="Lower run.batch_size or raise run.train_samples.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "host"))
        model = ResNetLite(channels=dataset.sample_shape[0], classes=dataset.classes, width=config.host_width)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > HOST_PARAMETER_LIMIT:
        raise ConfigError(
            f"The host has {count:,} parameters, more than {HOST_PARAMETER_LIMIT:,}.", remedy="Lower run.host_width."
        )
    model = model.to(device)
    with torch.random.fork_rng(devices=[]):
        graph = hostgraph.trace(model, dataset.train.inputs[:2].to(device), model.slots)
    return Task(config.task, model, dataset, _find_slots(model, dataset, device), graph)


def _find_slots(model: ResNetLite, dataset: DataSet, device: torch.device) -> tuple[SlotInfo, ...]:
    """Slot shapes by one dry forward of two samples."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:]))
        )
        for name in model.slots
    ]
    with torch.no_grad():
        model(dataset.train.inputs[:2].to(device))
    for handle in handles:
        handle.remove()
    return tuple(
        SlotInfo(index, name, SlotSignature("conv", shapes[name], device=device.type))
        for index, name in enumerate(model.slots)
    )
