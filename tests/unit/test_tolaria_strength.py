"""An isolated seed's gain is cut back to what its training batches want, and its host does not notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.kasmina.slot import Pass
from esper_ray.tasks.data import Split
from esper_ray.tolaria.costs import CostMeter
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.measure import evaluate
from esper_ray.tolaria.strength import SHARES, cut_back
from tests import tiny_runs
from tests.seed_worlds import World, assert_same, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def shadow_loss(world: World, split: Split) -> float:
    world.garden.switch.current = Pass.SHADOW
    try:
        return evaluate(world.model, split, CostMeter(), "on").loss
    finally:
        world.garden.switch.current = Pass.MODEL


@pytest.mark.parametrize("times", [1e-3, 1.0, 50.0])
def test_of_all_shares_of_the_gain_the_one_with_the_least_loss_is_kept(times):
    world = World(Plain())
    world.step()
    split = Split(torch.randn(40, 1, 6, 6), torch.arange(40) % 4)
    gain = world.branch.scale
    with torch.no_grad():
        gain.mul_(times)
    learned, host = gain.detach().clone(), weights(world.model)
    losses = {}
    for share in SHARES:
        with torch.no_grad():
            gain.copy_(share * learned)
        losses[share] = shadow_loss(world, split)
    with torch.no_grad():
        gain.copy_(learned)
    chosen = cut_back(world.garden, split, CostMeter())
    assert losses[chosen[1]] == min(losses.values())
    assert torch.equal(gain, chosen[1] * learned)
    assert_same(host, weights(world.model))
    if times == 50.0:
        assert chosen[1] < 1.0, "fifty times too loud"


def loop_after_isolation(home, *settings) -> Loop:
    config = configuration.load(None, [f"home={home}", "run.mode=lockstep", *tiny_runs.SETTINGS, *settings])
    loop = Loop(config, inprocess.LocalKernels(), name="r", data=home)
    loop.begin(3 * loop.steps_per_epoch)
    loop.train_epoch()
    loop.close_stages(loop.measure())
    directive = SeedDirective(SeedOperation.GERMINATE, blueprint=9)
    order = AdaptationCommand(1, CommandType.SEED, "r", 1, 0, "t", slot=1, seed_directive=directive)
    assert loop.garden.apply(order) == ""
    loop.train_epoch()
    return loop


def test_in_a_run_it_is_paid_for_and_the_host_goes_its_way_bit_for_bit(tmp_path):
    plain = loop_after_isolation(tmp_path)
    cut = loop_after_isolation(tmp_path, "seeds.cut_back=true")
    assert_same(weights(plain.model), weights(cut.model))
    assert cut.meter.total > plain.meter.total
    before, after = (loop.garden.slots[1].seed.branch.scale for loop in (plain, cut))
    assert any(torch.equal(after, share * before) for share in SHARES)
