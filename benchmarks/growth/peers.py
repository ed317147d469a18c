"""Growing as the literature does it, at the places and times at which the grown run of the same seed did.

| family | a newborn block |
|---|---|
| gradmax | a residual pair of layers: the first is zero, the second is what makes the first one's gradient largest |
| net2net | a pair of layers that begins as the identity, with a little noise |
| gromo | none: it widens; see `gromo_peer` |

Evci et al. 2022, arXiv:2201.05125, section 3; Chen et al. 2016, arXiv:1511.05641, section 2.3.

There are no shadow passes, gates or counterfactual measurements, so these have more steps for the same FLOPs. GradMax's
blocks have about the parameters of the final-size model's; an identity is as wide as its slot, or twice as wide. A
newborn's rate rises as a seed's does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.growth.runs import KERNELS
from benchmarks.growth.tasks import StudyTask
from esper_ray.config import Config
from esper_ray.contracts.ports import SlotInfo
from esper_ray.karn.catalog import CATALOG
from esper_ray.reliability.ids import derive_seed
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.measure import evaluate

NOISE = 0.01
"""Deviation of what is added to an identity, as a share of a usual weight's (Net2Net breaks symmetries so)."""
SVD_FLOPS = 20
"""Times n^3 for a full singular value decomposition: Golub & Van Loan 2013, figure 8.6.1, rounded up."""


class Pair(nn.Module):
    """Two maps [N, C, ...] -> [N, inner, ...] -> [N, C, ...] with an activation after the first."""

    def __init__(self, slot: SlotInfo, inner: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv = slot.signature.kind == "conv"
        channels = slot.signature.shape[0 if self.conv else -1]
        make = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if self.conv else nn.Linear
        self.first, self.second = make(channels, inner), make(inner, channels)
        for layer in (self.first, self.second):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=math.sqrt(1.0 / fan_in), generator=generator)
            nn.init.zeros_(layer.bias)


class GradMax(Pair):
    """``h + second(gelu(first(h)))``: GELU has a gradient at 0, which a ReLU lacks."""

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(F.gelu(self.first(h)))

    @torch.no_grad()
    def maximise(self, h: Tensor, gradient: Tensor) -> float:
        """Zero the first map; the second one's neurons become the leading left singular vectors of the gradient.

        Args:
            h, gradient: the slot's output and the loss's gradient there, [N, C, H, W], [N, T, C] or [N, C].

        Returns:
            The FLOPs of the decomposition.
        """
        inner = self.first.weight.shape[0]
        into, out = self._neighbourhoods(h), self._neighbourhoods(gradient, flipped=True)
        left, _, _ = torch.linalg.svd(out.T @ into)
        chosen = torch.zeros(left.shape[0], inner)
        count = min(inner, left.shape[1])
        chosen[:, :count] = left[:, :count]
        weight = self.second.weight
        kernel = chosen.T.reshape(inner, weight.shape[0], *weight.shape[2:]).transpose(0, 1)
        weight.copy_(kernel * (weight.norm() / math.sqrt(count)))
        nn.init.zeros_(self.first.weight)
        return float(SVD_FLOPS * left.shape[0] ** 3)

    def _neighbourhoods(self, x: Tensor, *, flipped: bool = False) -> Tensor:
        """[positions, C * 9] of a map, [positions, C] of vectors."""
        if not self.conv:
            return x.flatten(0, -2)
        around = F.unfold(x, 3, padding=1)
        if flipped:
            around = around.unflatten(1, (x.shape[1], 9)).flip(2).flatten(1, 2)
        return around.transpose(1, 2).flatten(0, 1)


class Net2Net(Pair):
    """Begins as the identity. After a ReLU two rectified identities are one; else h is rectified in halves."""

    def __init__(self, slot: SlotInfo, inner: int, generator: torch.Generator) -> None:  # noqa: ARG002
        self.rectified = slot.signature.kind != "sequence"
        channels = slot.signature.shape[0 if slot.signature.kind == "conv" else -1]
        super().__init__(slot, channels if self.rectified else 2 * channels, generator)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.mul_(NOISE)
            unit = torch.eye(channels)
            first = unit if self.rectified else torch.cat([unit, -unit])
            for layer, added in ((self.first, first), (self.second, first.T)):
                centre = layer.weight[:, :, 1, 1] if self.conv else layer.weight
                centre.add_(added)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(h)))
        return F.relu(y) if self.rectified else y


METHODS: Mapping[str, type[Pair]] = {"gradmax": GradMax, "net2net": Net2Net}


class PeerLoop(Loop):
    """Tolaria's loop, its batches, rates and costs; blocks come by the method's own rule."""

    def __init__(self, task: StudyTask, config: Config, home: Path, family: str) -> None:
        super().__init__(config, KERNELS, name=family, data=home / "data")
        self.family = family
        self.planned = {block.slot: block for block in task.blocks}
        self.grown: tuple[int, ...] = ()

    @property
    def structure(self) -> tuple[int, ...]:
        """Models of equal structure cost the same."""
        return self.grown

    def boundary(self) -> None:
        """Between two epochs."""

    def mature(self) -> None:
        """Become at once what it would grow to, so that it is known what that costs."""

    def grow(self, index: int) -> None:
        """Put a newborn into that slot."""
        slot = self.task.slots[index]
        generator = torch.Generator().manual_seed(derive_seed(self.config.run.seed, self.family, index))
        blueprint = CATALOG.get(self.planned[index].blueprint)
        channels = slot.signature.shape[0 if slot.signature.kind == "conv" else -1]
        area = 9 if slot.signature.kind == "conv" else 1
        inner = max(1, round(blueprint.parameters(slot.signature) / (2 * area * channels)))
        block = METHODS[self.family](slot, inner, generator)
        if isinstance(block, GradMax):
            self._maximise(block, slot)
        module = self.model.get_submodule(slot.name)
        self.model.add_module(f"peer{index}", block)
        module.register_forward_hook(lambda _module, _inputs, output: block(output))
        self.grown += (index,)
        self.rates.born(index + 1, self.step)
        self.groups.optimizer.add_param_group({"params": list(block.parameters()), "seed": index + 1})

    def _maximise(self, block: GradMax, slot: SlotInfo) -> None:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            seen.append(output)

        handle = self.model.get_submodule(slot.name).register_forward_hook(keep)
        inputs, targets = self._batch(self.step)
        with self.meter.charge(("gradmax", self.grown, slot.index), len(targets)):
            self.task.loss(self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            handle.remove()
            (h,) = seen
            assert h.grad is not None
            decomposition = block.maximise(h.detach(), h.grad)
        self.meter.total += decomposition
        self.groups.optimizer.zero_grad(set_to_none=True)

    def train_step(self) -> None:
        inputs, targets = self._batch(self.step)
        with self.meter.charge(("step", self.structure), len(targets)):
            loss = self.task.loss(self.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.rates.write(self.groups.optimizer, self.step)
        self.groups.optimizer.step()
        self.groups.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss.detach()
        self.step += 1


def loop_of(family: str) -> type[PeerLoop]:
    """GroMo's own loop is loaded only where it is wanted: the library need not be there.

    Raises:
        ImportError: it is wanted, and not there.
    """
    if family != "gromo":
        return PeerLoop
    from benchmarks.growth.gromo_peer import GromoLoop

    return GromoLoop


def train(
    home: Path, task: StudyTask, config: Config, family: str, grown: Mapping[str, Any], budget: float
) -> dict[str, Any]:
    """Train within ``budget`` FLOPs, growing where and when ``grown`` did, as shares of the run."""
    births = {
        slot: step / grown["steps"] for slot, step in zip(grown["graft_slots"], grown["graft_steps"], strict=True)
    }
    steps = _affordable(task, config, home, family, births, budget)
    processor, start = time.process_time(), time.perf_counter()
    loop = loop_of(family)(task, config, home, family)
    loop.steps_per_epoch = math.ceil(steps / config.run.epochs)
    loop.begin(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.run.seed, family))
        while loop.step < steps:
            _one_epoch(loop, births)
    quality = evaluate(loop.model, loop.validation, loop.meter, loop.structure)
    test = evaluate(loop.model, loop.task.data.test, CostMeter(), "test")
    return {
        "validation_accuracy": quality.accuracy, "validation_loss": quality.loss, "test_accuracy": test.accuracy,
        "test_loss": test.loss, "flops": loop.meter.total, "steps": loop.step,
        "parameters": len(nn.utils.parameters_to_vector(loop.model.parameters())),
        "host_parameters": loop.host_parameters, "born": len(loop.grown), "fossilized": len(loop.grown), "culled": 0,
        "processor_seconds": time.process_time() - processor, "wall_seconds": time.perf_counter() - start,
    }  # fmt: skip


def _one_epoch(loop: PeerLoop, births: Mapping[int, float]) -> None:
    end = min(loop.step + loop.steps_per_epoch, loop.total_steps)
    while loop.step < end:
        for slot, share in births.items():
            if slot not in loop.grown and loop.step >= share * loop.total_steps:
                loop.grow(slot)
        loop.train_step()
    loop.epoch += 1
    evaluate(loop.model, loop.validation, loop.meter, loop.structure)
    loop.boundary()


def _affordable(
    task: StudyTask, config: Config, home: Path, family: str, births: Mapping[int, float], budget: float
) -> int:
    """How many steps the budget pays for. One step of each structure is done on a model of its own to know its cost."""
    loop = loop_of(family)(task, config, home, family)
    loop.begin(1)
    order = sorted(births, key=lambda slot: births[slot])
    costs, once = [], 0.0
    for slot in (None, *order):
        if slot is not None:
            before = loop.meter.total
            loop.grow(slot)
            loop.mature()
            once += loop.meter.total - before
        before = loop.meter.total
        loop.train_step()
        step, before = loop.meter.total - before, loop.meter.total
        evaluate(loop.model, loop.validation, loop.meter, loop.structure)
        costs.append((step, loop.meter.total - before))
    shares = sorted(births.values())
    steps = max(2, int((budget - once) / costs[0][0]))
    while (cost := once + _cost(steps, config.run.epochs, shares, costs)) > budget and steps > 2:
        steps = max(2, min(steps - 1, int(steps * budget / cost)))
    return steps


def _cost(steps: int, epochs: int, shares: Sequence[float], costs: Sequence[tuple[float, float]]) -> float:
    """FLOPs of the steps and of a look at the validation split after each epoch and at the end.

    Args:
        shares: of the run at which each birth is, rising.
        costs: of a step and of a look, for each number of births.
    """
    every = math.ceil(steps / epochs)
    grown = [sum(step >= share * steps for share in shares) for step in range(steps)]
    ends = [min(start + every, steps) - 1 for start in range(0, steps, every)]
    training = sum(costs[count][0] for count in grown)
    return training + sum(costs[grown[end]][1] for end in ends) + costs[grown[-1]][1]
