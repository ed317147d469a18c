"""A world in which seeds share parameters: a host with equal slots, and births that tie each block to the first one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_ray import tasks
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.kasmina import kernels
from esper_ray.tasks import hostgraph
from esper_ray.tolaria import loop

WIDTH = 4
STAGES = ("one", "two", "three")


class EqualHost(nn.Module):
    """Three stages [N, WIDTH, 8, 8], pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        for name in STAGES:
            inputs = 1 if name == "one" else WIDTH
            self.add_module(
                name, nn.Sequential(nn.Conv2d(inputs, WIDTH, 3, padding=1), nn.GroupNorm(1, WIDTH), nn.ReLU())
            )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        for name in STAGES:
            images = self.get_submodule(name)(images)
        logits: Tensor = self.head(images.mean(dim=(2, 3)))
        return logits


def equal_slots(patch: pytest.MonkeyPatch) -> None:
    """Digits are learned by an `EqualHost` from now on."""
    build = tasks.build_task

    def built(run: Any, folder: Any, device: torch.device) -> tasks.Task:
        task = build(run, folder, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = EqualHost().to(device)
            graph = hostgraph.trace(model, task.data.train.inputs[:2].to(device), STAGES)
        signature = SlotSignature("conv", (WIDTH, 8, 8))
        slots = tuple(SlotInfo(index, name, signature) for index, name in enumerate(STAGES))
        return replace(task, model=model, slots=slots, graph=graph)

    patch.setattr(loop, "build_task", built)


def tie_births(patch: pytest.MonkeyPatch) -> None:
    """Blocks of one blueprint have their parameters in common from now on."""
    bear = kernels.bear
    first: dict[str, nn.Module] = {}

    def born(kernel: Any, seed: Any, **given: Any) -> nn.Module:
        branch = bear(kernel, seed, **given)
        model = first.setdefault(kernel.spec.key, branch)
        for name, module in branch.named_modules():
            for key in list(module._parameters):
                setattr(module, key, model.get_submodule(name)._parameters[key])
        return branch

    patch.setattr(kernels, "bear", born)
