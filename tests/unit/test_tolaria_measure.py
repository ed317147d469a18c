"""What a live seed is worth, and on how many samples that is asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper_ray.tasks.data import Split
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.measure import evaluate, measure_seeds
from tests.seed_worlds import World


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize(("wanted", "every"), [(10, 4), (0, 1), (100, 1)])
def test_a_seed_is_measured_on_as_many_samples_as_were_asked_for_evenly_picked(wanted, every):
    world = World(Plain(), measure_samples=wanted)
    world.step()
    world.go_live(alpha=1.0)
    split = Split(torch.randn(40, 1, 6, 6), torch.arange(40) % 4)
    meter = CostMeter()
    on = evaluate(world.model, split, meter, "on")
    found, credit = measure_seeds(world.garden, split, on, meter, "a structure")
    world.garden.switch.off = frozenset({1})
    with torch.no_grad():
        off = F.cross_entropy(world.model.eval()(split.inputs), split.targets, reduction="none")
    assert found[1].gain == pytest.approx(float((off - on.losses)[::every].mean()), rel=1e-4)
    assert credit is not None
    assert credit.joint.mean == pytest.approx(found[1].gain)
    without = meter.per_sample(("evaluate", ("a structure", "without", 1)))
    drift = meter.per_sample(("drift", "a structure"))
    whole = meter.per_sample(("evaluate", "on"))
    assert meter.total == pytest.approx(40 * whole + (without + drift) * 40 / every)
