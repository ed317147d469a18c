"""A small host with everything that isolation could miss, and a garden in it that trains."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from esper_ray import inprocess
from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.kasmina.garden import Garden

SIGNATURE = SlotSignature("conv", (8, 6, 6))


class Host(nn.Module):
    """Three stages, with dropout, batch normalisation, a skip connection and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)
        self.noise = torch.Generator().manual_seed(3)
        self.ran: list[str] = []
        for name in ("stem.0", "body.0", "tail.0", "head"):
            self.get_submodule(name).register_forward_pre_hook(lambda _m, _i, name=name: self.ran.append(name))

    def forward(self, x):
        low = self.stem(x + 0.01 * torch.randn(x.shape, generator=self.noise))
        high = self.body(self.dropout(low))
        return self.head(self.dropout(self.tail(torch.cat([low, high], 1))).mean((2, 3)))


class Loop:
    """A trainer with a real optimizer: SGD over the host, and a group for each seed."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD([{"params": list(model.parameters()), "seed": 0}], lr=0.01)
        self.kept = 0

    def adopt(self, seed):
        self.optimizer.add_param_group({"params": list(seed.branch.parameters()), "seed": seed.number})

    def release(self, seed):
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["seed"] != seed.number]

    def fossilise(self, seed):
        pass

    def leftovers(self, seed):
        return 0

    def foreign_groups(self, seed):
        own = {id(p) for p in seed.branch.parameters()}
        groups = [g for g in self.optimizer.param_groups if g["seed"] != seed.number]
        return [g["seed"] for g in groups if any(id(p) in own for p in g["params"])]

    def keep_checkpoint(self):
        self.kept += 1
        return 7

    def planned_graft(self, seed):
        return None

    def record_graft(self, seed, step):
        pass


class World:
    """A garden with one seed, and the steps of a small training."""

    def __init__(self, host: nn.Module | None = None, slots=("body",), *, sow=(0,), **settings) -> None:
        torch.manual_seed(0)
        self.model = host or Host()
        self.config = SeedConfig(**{"shadow_share": 1.0, "monitor_every": 1, **settings})
        self.loop = Loop(self.model)
        infos = tuple(SlotInfo(index, name, SIGNATURE) for index, name in enumerate(slots))
        self.garden = Garden(
            self.model, infos, self.config, inprocess.LocalKernels(), self.loop,
            run_seed=7, max_parameters=10**6, lockstep=True,
        )  # fmt: skip
        for slot in sow:
            assert self.sow(slot) == ""
        self.generator = torch.Generator().manual_seed(1)
        self.number, self.batch_size = 0, 8

    def sow(self, slot: int = 0) -> str:
        directive = SeedDirective(SeedOperation.GERMINATE, blueprint=4)
        return self.garden.apply(
            AdaptationCommand(1, CommandType.SEED, "r", 1, 0, "t", slot=slot, seed_directive=directive)
        )

    @property
    def branch(self) -> nn.Module:
        return self.garden.slots[0].seed.branch

    def batch(self):
        size = self.batch_size
        return torch.randn(size, 1, 6, 6, generator=self.generator), torch.randint(4, (size,), generator=self.generator)

    def step(self) -> None:
        inputs, targets = self.batch()
        self.garden.before_step(self.number)
        loss = F.cross_entropy(self.model(inputs), targets)
        loss.backward()
        due = self.garden.shadow_due(self.number)
        if due:
            self.garden.train_isolated(self.number, inputs, targets, F.cross_entropy, loss, watch=due == "watched")
        self.loop.optimizer.step()
        self.loop.optimizer.zero_grad(set_to_none=True)
        self.number += 1

    def diagnoses(self) -> list[str]:
        return [event["diagnosis"] for event in self.garden.drain_events() if event["kind"] == "isolation"]

    def go_live(self, alpha: float = 0.5) -> None:
        slot = self.garden.slots[0]
        slot.stage = slot.seed.stage = Stage.SHADOWING
        slot.seed.alpha = alpha


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
