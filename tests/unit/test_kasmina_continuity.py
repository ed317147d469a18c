"""Nothing jumps on a seed's way from birth to its end, but a cull; and a restored garden goes on where it was."""

from __future__ import annotations

import itertools

import pytest
import torch

from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation as Operation
from esper_ray.kasmina import snapshot
from esper_ray.kasmina.blending import MODES, SCHEDULES
from esper_ray.kasmina.lifecycle import LIVE
from tests.unit.kasmina_world import ROAD, SIGNATURES, WORTHY, Life, advance, walk

COMBINATIONS = list(itertools.product(MODES, SCHEDULES, SIGNATURES))


@pytest.mark.parametrize(("mode", "schedule", "kind"), COMBINATIONS)
def test_nothing_jumps_from_birth_to_the_end(mode, schedule, kind):
    """The output just before and just after each transition, and alpha; on the ramp, step by step."""
    life, host = Life(kind, mode, schedule), None
    for to in (*ROAD, Stage.TERMINATED):
        while life.stage is not to:
            alpha, before, stage = life.alpha, life.output(), life.stage
            host = before if host is None else host
            if stage in (Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING):
                life.steps()
                before, alpha = life.output(), life.alpha
                life.prove()
                life.end_epoch(WORTHY)
            elif stage is Stage.FOSSILIZED:
                life.order(Operation.CANCEL)
            else:
                advance(life, to)
            torch.testing.assert_close(life.output(), before, rtol=1e-6, atol=1e-6)
            assert life.alpha == alpha
            expected = host if life.stage in (Stage.GERMINATED, Stage.TRAINING) else None
            assert expected is None or torch.equal(life.output(), expected)
    assert life.alpha == 1.0
    assert not torch.allclose(life.output(), host, atol=1e-3)


@pytest.mark.parametrize(("mode", "schedule", "kind"), COMBINATIONS)
def test_a_ramp_moves_the_output_in_small_steps_and_ends_where_it_should(mode, schedule, kind):
    life = walk(Life(kind, mode, schedule), Stage.BLENDING)
    life.slot.seed.ramp_steps = 120
    outputs, alphas = [life.output()], [life.alpha]
    for _ in range(120):
        life.steps(1)
        outputs.append(life.output())
        alphas.append(life.alpha)
    assert alphas[0] == 0.0
    assert alphas[-1] == 1.0
    assert alphas == sorted(alphas)
    whole = float((outputs[-1] - outputs[0]).norm())
    path = [float((b - a).norm()) for a, b in itertools.pairwise(outputs)]
    assert max(path) < 0.06 * max(whole, sum(path))


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("stage", sorted(LIVE))
def test_a_cull_is_the_one_jump_and_is_told_as_such(mode, stage):
    life = Life("conv", mode)
    host = life.output()
    walk(life, stage)
    life.steps(3)
    moved = life.output()
    assert life.order(Operation.CULL) == ""
    assert torch.equal(life.output(), host)
    assert not torch.equal(moved, host)
    told = [event for event in life.garden.drain_events() if event["kind"] == "stage"]
    assert [(event["from"], event["to"]) for event in told] == [(stage.name, "CULLED")]
    assert not life.slot.hooked
    assert not life.garden.model._forward_pre_hooks


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("stage", [Stage.TRAINING, *sorted(LIVE), Stage.FOSSILIZED, Stage.TERMINATED])
def test_a_restored_garden_goes_on_bit_for_bit(mode, stage):
    life = Life("conv", mode)
    if stage is Stage.TERMINATED:
        walk(life, Stage.FOSSILIZED).order(Operation.CANCEL)
    else:
        walk(life, stage)
    life.steps(3)
    data, tensors = snapshot.save(life.garden)
    weights = life.garden.model.state_dict()
    twin = Life("conv", mode)
    snapshot.restore(twin.garden, data, tensors)
    twin.garden.model.load_state_dict(weights)
    twin.step, twin.epoch = life.step, life.epoch
    for each in (life, twin):
        each.steps(2)
    assert twin.stage is life.stage
    assert twin.alpha == life.alpha
    assert torch.equal(twin.output(), life.output())
    assert twin.slot.seed.mode is MODES[mode]
