"""Where the line stands in a loop, how its seeds' rates go, and what of Tolaria's ways is refused there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper_ray
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.errors import ConfigError, HostError
from tests.unit.attaching import EAGER, Loop, UNet, digits, mlp, pixels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


# After the optimizer's step


def test_the_line_may_come_after_the_optimizers_step():
    loop = Loop(mlp(), digits(), ["2", "4"], after=True)
    reports = loop.until("FOSSILIZED")
    assert "FOSSILIZED" in loop.stages(), [str(report) for report in reports]
    gates = [event for event in loop.events if event["kind"] == "gate" and event["gate"] == "G1_GRADIENT_HEALTH"]
    assert gates
    assert loop.grower.garden.checks > 0
    assert loop.grower.garden.violations == 0
    assert loop.grower.place.statistics[:, 1].max() > -12.0, "gradients were looked at before they were cleared"


def test_after_the_step_an_isolated_seed_leaves_the_host_bit_for_bit_alone():
    finals = []
    for controller in ("never", "heuristic"):
        torch.manual_seed(0)
        model = UNet()  # with batch statistics
        settings = [*EAGER, f"tamiyo.controller={controller}", "seeds.training_epochs=6"]
        loop = Loop(model, pixels(), ["down1", "down2"], settings=settings, epochs=5, after=True)
        loop.all()
        assert ("TRAINING" in loop.stages()) == (controller == "heuristic")
        assert "BLENDING" not in loop.stages()
        finals.append([value.clone() for value in model.state_dict().values()] + [torch.rand(1)])
    assert all(map(torch.equal, *finals))


def test_after_the_step_a_seed_is_held_against_the_host_as_it_is_then():
    """The host has learned from the batch by then: against its loss before that no seed would look good enough."""
    loop = Loop(mlp(), digits(), ["2"], after=True)
    loop.until("TRAINING")
    garden, (inputs, targets) = loop.grower.garden, loop.data
    with torch.no_grad():
        now = float(F.cross_entropy(loop.model(inputs[:32]), targets[:32]))
    assert float(garden.isolated.host_loss(0, inputs[:32], targets[:32], F.cross_entropy)) == pytest.approx(now)
    (seed,) = garden.in_stage(Stage.TRAINING)
    with torch.no_grad():
        for parameter in seed.branch.parameters():
            parameter.zero_()
    found = loop.loss(loop.model(inputs[:32]), targets[:32])
    found.backward()
    loop.optimizer.step()
    loop.grower.step(inputs[:32], targets[:32], found)
    assert seed.evidence["advantages"][-1] == pytest.approx(0.0, abs=1e-6)


# Clipping


def clipped_by(clip, *, first, epochs=6):
    loop = Loop(mlp(), digits(), ["2", "4"], epochs=epochs)
    inputs, targets = loop.data
    for _ in range(epochs):
        for start in range(0, 320, 32):
            found = F.cross_entropy(loop.model(inputs[start : start + 32]), targets[start : start + 32])
            found.backward()
            if first:
                clip(loop.model.parameters())
            loop.grower.step(inputs[start : start + 32], targets[start : start + 32], found)
            if not first:
                clip(loop.model.parameters())
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.events += loop.grower.epoch([(inputs[900:], targets[900:])]).events
    return loop


def each_apart(parameters):
    for parameter in parameters:
        nn.utils.clip_grad_norm_([parameter], 0.01)


CLIPS = {
    "norm": (lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05), "multiplied by 0"),
    "value": (lambda parameters: nn.utils.clip_grad_value_(parameters, 0.001), "cut off at 0.001"),
    "each apart": (each_apart, "multiplied by 0.*and more"),
}


@pytest.mark.parametrize(("clip", "words"), CLIPS.values(), ids=CLIPS)
def test_clipping_before_the_line_is_found_out_and_told(clip, words):
    with pytest.raises(HostError, match=f"{words}.*right after backward"):
        clipped_by(clip, first=True)


@pytest.mark.parametrize(("clip", "words"), CLIPS.values(), ids=CLIPS)
def test_clipping_behind_the_line_is_the_users_affair(clip, words):
    loop = clipped_by(clip, first=False)
    assert "TRAINING" in loop.stages()
    assert loop.grower.garden.checks > 0
    assert loop.grower.garden.violations == 0


# Rates and weights


def rates(policy):
    loop = Loop(mlp(), digits(), ["2", "4"], settings=[*EAGER, f"seeds.rate_policy={policy}"])
    found = {}
    while "FOSSILIZED" not in loop.stages() and loop.grower.place.epoch < loop.epochs:
        stages = {seed.number: seed.stage for seed in loop.grower.garden.seeds}
        loop.epoch()
        for seed in loop.grower.garden.seeds:
            stage = stages.get(seed.number)
            if stage is not None:
                # It is grafted in the epoch's first step.
                trained = Stage.TRAINING if stage is Stage.GERMINATED else stage
                found.setdefault(trained, []).append(seed.learning_rate / loop.rate)
    return found


def test_each_policy_of_rates_is_followed():
    warmed, host, frozen = (rates(policy) for policy in ("warmup", "host", "frozen"))
    assert warmed[Stage.BLENDING] == pytest.approx([1.0] * len(warmed[Stage.BLENDING]))
    assert set(host[Stage.TRAINING]) == {1.0}
    assert frozen[Stage.TRAINING][-1] > 0.0
    assert set(frozen[Stage.BLENDING]) == {0.0}


def test_the_adaptive_policy_slows_down_a_seed_whose_updates_are_large_for_its_weights():
    loop = Loop(mlp(), digits(), ["2"], settings=[*EAGER, "seeds.rate_policy=adaptive"])
    loop.until("BLENDING")
    (seed,) = loop.grower.garden.in_stage(Stage.BLENDING)
    loop.epoch()
    assert 0.1 <= seed.learning_rate / loop.rate <= 1.0
    with torch.no_grad():
        for parameter in seed.branch.parameters():
            parameter.mul_(1e-4)
    loop.epoch()
    assert seed.learning_rate / loop.rate == pytest.approx(0.1)


def test_the_adaptive_policy_is_refused_where_there_are_no_updates_of_adams():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"rate_policy=adaptive does not work with SGD"):
        esper_ray.attach(
            model, ["2"], loss=F.cross_entropy, optimizer=optimizer, epochs=3, sample=digits()[0][:4],
            config=["seeds.rate_policy=adaptive"],
        )  # fmt: skip


def test_weights_of_losses_scale_the_gradients_of_live_seeds_alone():
    loop = Loop(mlp(), digits(), ["2", "4"], settings=[*EAGER, "seeds.loss_weights=gain", "optimizer.clip_norm=1e9"])
    loop.until("BLENDING")
    live = loop.grower.garden.in_stage(Stage.BLENDING)
    assert len(live) == 2
    live[0].alpha = live[1].alpha = 0.5
    live[0].evidence["gain"], live[1].evidence["gain"] = 0.3, 0.1
    parameters = {seed.number: next(seed.branch.parameters()) for seed in live}
    F.cross_entropy(loop.model(loop.data[0][:32]), loop.data[1][:32]).backward()
    before = {number: p.grad.clone() for number, p in parameters.items()}
    host = next(loop.model.parameters()).grad.clone()
    used = {}
    companion = loop.grower.companion
    companion._own.register_step_pre_hook(
        lambda *_: used.update({number: p.grad.clone() for number, p in parameters.items()})
    )
    loop.optimizer.step()
    torch.testing.assert_close(used[live[0].number], before[live[0].number] * 1.5)
    torch.testing.assert_close(used[live[1].number], before[live[1].number] * 0.5)
    assert torch.equal(next(loop.model.parameters()).grad, host)


def test_seeds_that_share_parameters_are_refused():
    loop = Loop(mlp(), digits(), ["2", "4"])
    loop.until("TRAINING")
    one, two = loop.grower.garden.seeds
    loop.grower.companion.release(two)
    two.branch.register_parameter("borrowed", next(one.branch.parameters()))
    with pytest.raises(HostError, match="shares parameters with another seed"):
        loop.grower.companion.adopt(two)


def test_distillation_is_refused_where_the_hosts_answers_are_not_seen():
    loop = Loop(mlp(), digits(), ["2"], settings=[*EAGER, "seeds.distill=true"], after=True)
    with pytest.raises(HostError, match="distill does not work here"):
        loop.epoch()
