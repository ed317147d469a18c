"""GroMo, the growing library of the authors of TINY, as a peer: its multilayer perceptron widens, on tables only.

    pip install -e ".[benchmarks]"

It begins as wide as the host. From the first graft of the grown run of the same random seed on, both hidden layers get
the neurons that TINY finds at each boundary (Verbockhaven et al. 2024, arXiv:2405.19816), until they have the
parameters of the final-size model. Its layers have no normalisation, and moments start anew with each growth. Its steps
are planned as if it had its final width from the first growth on, so it spends a little less than its budget.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.growth.peers import SVD_FLOPS, PeerLoop
from benchmarks.growth.tasks import StudyTask
from esper_ray.config import Config
from esper_ray.karn.catalog import CATALOG
from esper_ray.tolaria.groups import Groups

BATCHES = 8
"""Batches over which TINY's statistics are taken."""


class GromoLoop(PeerLoop):
    """Tolaria's loop over a `gromo.containers.growing_mlp.GrowingMLP`."""

    def __init__(self, task: StudyTask, config: Config, home: Path, family: str) -> None:
        from gromo.containers.growing_mlp import GrowingMLP

        super().__init__(task, config, home, family)
        host = self.task
        (self.width,) = host.slots[0].signature.shape
        columns, classes = self.train.inputs.shape[1], host.data.classes
        added = sum(CATALOG.get(block.blueprint).parameters(host.slots[block.slot].signature) for block in task.blocks)
        self.goal = _width(columns, classes, self.host_parameters + added)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.model = GrowingMLP(columns, classes, self.width, 2, activation=nn.ReLU(), device=torch.device("cpu"))
        self.task = dataclasses.replace(host, model=self.model, slots=())

    @property
    def structure(self) -> tuple[int, ...]:
        return tuple(layer.in_features for layer in self.growable)

    @property
    def growable(self) -> list[Any]:
        """The layers whose inputs can become wider: all but the first."""
        model: Any = self.model
        return list(model._growable_layers)

    def grow(self, index: int) -> None:
        """From now on it grows at each boundary, whichever slot that is."""
        self.grown += (index,)
        self.boundary()

    def boundary(self) -> None:
        """Widen each hidden layer that is not as wide as it is to be, by as many neurons as are found at once."""
        if not self.grown or min(self.structure) >= self.goal:
            return
        for place, layer in enumerate(self.growable):
            if layer.in_features < self.goal:
                self._widen(place, layer)
        self.groups = Groups(self.model, self.config.optimizer)

    def mature(self) -> None:
        while self.grown and min(self.structure) < self.goal:
            self.boundary()

    def _widen(self, place: int, layer: Any) -> None:
        """TINY: statistics over some batches, and the neurons that lower the loss most to first order."""
        model: Any = self.model
        model.set_growing_layers(index=place)
        model.init_computation()
        for number in range(BATCHES):
            inputs, targets = self._batch(self.step + number)
            with self.meter.charge(("tiny", place, self.structure), len(targets)):
                model.zero_grad()
                self.task.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                model.update_computation()
        model.compute_optimal_updates(
            compute_delta=False, maximum_added_neurons=self.goal - layer.in_features, numerical_threshold=0.0,
            statistical_threshold=0.0,
        )  # fmt: skip
        model.reset_computation()
        model.select_update(0)
        layer.set_scaling_factor(1.0)
        model.apply_change()
        model.zero_grad(set_to_none=True)
        self.meter.total += SVD_FLOPS * self.goal**3


def _width(columns: int, classes: int, parameters: int) -> int:
    """How wide two hidden layers may be for so many parameters: w^2 + (columns + classes + 2) w + classes."""
    linear = columns + classes + 2
    return int((math.sqrt(linear**2 + 4 * (parameters - classes)) - linear) / 2)
