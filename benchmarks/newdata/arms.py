"""What one can do with a trained model and new data: the arms, each a plain training loop of the same form.

LoRA is written from Hu et al. 2021 (arXiv:2106.09685): beside a frozen layer W stands B A, A random and B zero. A
convolution's A is a convolution of the same kernel to the rank's channels, its B one of 1x1.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import esper_ray
from benchmarks.newdata.tasks import Pair, Task
from esper_ray.reliability.ids import derive_seed
from esper_ray.tolaria.costs import CostMeter

BATCH = 64
WARMUP, DECAY = 0.02, 0.2


@dataclass(frozen=True, slots=True)
class Arm:
    """How a model meets new data.

    Args:
        trained: of the host: ``all`` or the ``head`` alone.
        host_share: of the rate, for what is not the head.
        adapters: LoRA beside every inner layer, of as many parameters as ``like`` grew.
        settings: of a growing arm; None where nothing grows.
        anew: from random weights, on old and new data together.
    """

    name: str
    trained: str = "all"
    host_share: float = 1.0
    adapters: bool = False
    like: str = ""
    settings: tuple[str, ...] | None = None
    anew: bool = False


_GENTLY = (
    # The host is trained already: there is no plateau to wait for, and more to lose when a seed blends in too fast.
    "tamiyo.warmup_epochs=2", "tamiyo.grow_by=0.05", "tamiyo.underfit_gap=0.9", "run.mode=lockstep",
    "seeds.training_epochs=2", "seeds.blending_epochs=4", "seeds.max_stage_epochs=8",
)  # fmt: skip
_LARGE = (*_GENTLY, "tamiyo.parameter_budget=20000")
_SMALL = (*_GENTLY, "tamiyo.parameter_budget=6000")
ARMS = {
    arm.name: arm
    for arm in (
        Arm("grow", settings=_LARGE),
        Arm("grow, small", settings=_SMALL),
        Arm("grow, host at a tenth", host_share=0.1, settings=_SMALL),
        Arm("grow, host frozen", trained="head", settings=_SMALL),
        Arm("fine-tune everything"),
        Arm("adapters (LoRA)", trained="head", adapters=True, like="grow, host frozen"),
        Arm("last layer", trained="head"),
        Arm("anew, on old and new data", anew=True),
    )
}


class Lora(nn.Module):
    """``layer(x) + B(A(x))``, the layer frozen."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = lora_parts(layer, rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


def lora_parts(layer: nn.Conv2d | nn.Linear, rank: int) -> tuple[nn.Module, nn.Conv2d | nn.Linear]:
    """A and B for one layer."""
    if isinstance(layer, nn.Conv2d):
        kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
        down = nn.Conv2d(layer.in_channels, rank, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
        return down, nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)


def add_adapters(model: nn.Module, names: tuple[str, ...], parameters: int) -> int:
    """Adapters of one rank beside each layer, of about that many parameters in all, rank 1 at least; how many it is."""
    each = sum(_size(model.get_submodule(name), 1) for name in names)
    rank = max(1, round(parameters / each))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        setattr(model.get_submodule(parent), leaf, Lora(layer, rank))
    return rank * each


def _size(layer: nn.Module, rank: int) -> int:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return sum(parameter.numel() for part in lora_parts(layer, rank) for parameter in part.parameters())


def groups(model: nn.Module, arm: Arm, rate: float) -> list[dict[str, Any]]:
    """What is trained at which rate. The head comes first: what grows takes the first group's rate."""
    head = list(model.get_submodule("head").parameters())
    known = {id(parameter) for parameter in head}
    body = []
    for name, parameter in model.named_parameters():
        if id(parameter) in known:
            continue
        parameter.requires_grad_(arm.trained == "all" or ".up." in name or ".down." in name)
        if parameter.requires_grad:
            body.append(parameter)
    found = [{"params": head, "lr": rate}]
    return found + ([{"params": body, "lr": rate * arm.host_share}] if body else [])


def factor(step: int, steps: int) -> float:
    """Warm up, hold, go down to nothing: of the rate at ``step``."""
    rising = (step + 1) / max(1.0, WARMUP * steps)
    falling = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, rising, falling)


def batches(data: Pair, seed: int) -> Iterator[Pair]:
    """Without end; each pass in an order of its own."""
    count = len(data[1])
    for number in iter(int, 1):
        generator = torch.Generator().manual_seed(derive_seed(seed, "newdata order", number))
        for chosen in torch.randperm(count, generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield data[0][chosen], data[1][chosen]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; classes come last."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Pair,
    steps: int,
    seed: int,
    between: Callable[[int, Tensor, Tensor, Tensor], None] = lambda *_: None,
    charge: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """``steps`` steps. Both passes are done inside ``charge()``; ``between`` comes between backward() and step()."""
    rates = [group["lr"] for group in optimizer.param_groups]
    stream = batches(data, seed)
    model.train()
    for step in range(steps):
        inputs, targets = next(stream)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, steps)
        with charge():
            found = loss_of(model(inputs), targets)
            found.backward()  # type: ignore[no-untyped-call]
        between(step, inputs, targets, found)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def cost_of_step(model: nn.Module, data: Pair) -> float:
    """FLOPs of a forward and a backward pass over a batch, of what is trained."""
    with FlopCounterMode(display=False) as counter:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss_of(model(data[0][:BATCH]), data[1][:BATCH]), trained)
    return float(counter.get_total_flops())


@torch.no_grad()
def quality(model: nn.Module, data: Pair) -> dict[str, float]:
    """Accuracy, and loss in nats, of a split."""
    model.eval()
    hits = losses = count = 0.0
    for inputs, targets in zip(data[0].split(500), data[1].split(500), strict=True):
        outputs = model(inputs)
        losses += float(loss_of(outputs, targets)) * targets.numel()
        hits += float((outputs.argmax(-1) == targets).sum())
        count += targets.numel()
    model.train()
    return {"accuracy": hits / count, "loss": losses / count}


def optimizer_for(model: nn.Module, arm: Arm, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model, arm, rate), lr=rate, weight_decay=0.01)


@dataclass(frozen=True, slots=True)
class Grown:
    """What growing made of a model, and all that it cost."""

    parameters: int
    flops: float
    kept: int
    culled: int


def grow(task: Task, model: nn.Module, arm: Arm, worlds: dict[str, dict[str, Pair]], *, rate: float, epochs: int,
         seed: int) -> Grown:  # fmt: skip
    """The loop with esper_ray's two lines. All is charged: both passes, shadow passes, measuring, seeds that failed."""
    data, validation = worlds["new"]["train"], worlds["new"]["validation"]
    assert arm.settings is not None
    before = sum(parameter.numel() for parameter in model.parameters())
    optimizer = optimizer_for(model, arm, rate)
    grower = esper_ray.attach(
        model, list(task.slots), loss=loss_of, optimizer=optimizer, epochs=epochs, sample=data[0][:4],
        config=[*arm.settings, f"run.seed={seed}"],
    )  # fmt: skip
    per_epoch = len(data[1]) // BATCH
    events: list[dict[str, Any]] = []

    def between(step: int, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        if step and step % per_epoch == 0:
            events.extend(grower.epoch([validation]).events)
        grower.step(inputs, targets, loss)

    passes = CostMeter()
    try:
        train(
            model, optimizer, data, epochs * per_epoch, seed, between,
            lambda: passes.charge(grower.garden.structure(), BATCH),
        )  # fmt: skip
        events.extend(grower.epoch([validation]).events)
        after = grower.garden.parameters_in_path()
    finally:
        grower.close()
    stages = [event.get("to", "") for event in events if event.get("kind") == "stage"]
    flops = passes.total + grower.meter.total
    return Grown(after - before, flops, stages.count("FOSSILIZED"), stages.count("CULLED"))


def host(task: Task, worlds: dict[str, dict[str, Pair]], seed: int) -> nn.Module:
    """The host, trained on the old data."""
    torch.manual_seed(derive_seed(seed, "newdata host"))
    model = task.host()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.host_rate, weight_decay=0.01)
    train(model, optimizer, worlds["old"]["train"], task.host_steps, seed)
    return model


def both(worlds: dict[str, dict[str, Pair]]) -> Pair:
    """Old and new training data together."""
    old, new = worlds["old"]["train"], worlds["new"]["train"]
    return torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])


def without_growing(
    task: Task, trained: nn.Module, arm: Arm, worlds: dict[str, dict[str, Pair]], *, rate: float, flops: float,
    adapters: int, seed: int,
) -> tuple[nn.Module, int, float]:  # fmt: skip
    """Any other arm, for as many FLOPs: the model, the parameters it got more, what it cost."""
    torch.manual_seed(derive_seed(seed, "newdata", arm.name))
    model = task.host() if arm.anew else copy.deepcopy(trained)
    added = add_adapters(model, task.adapted, adapters) if arm.adapters else 0
    optimizer = optimizer_for(model, arm, rate)
    data = both(worlds) if arm.anew else worlds["new"]["train"]
    each = cost_of_step(model, data)
    steps = max(1, math.floor(flops / each))
    train(model, optimizer, data, steps, seed)
    return model, added, steps * each
