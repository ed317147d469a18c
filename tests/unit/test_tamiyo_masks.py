"""What the masks leave is carried out: at every boundary of a run whatever they call legal is refused by nobody."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import TamiyoConfig
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, SeedState, SystemState
from esper_ray.contracts.ports import Candidate, RunOpening, SlotInfo, SlotSignature
from esper_ray.kasmina import orders as kasmina
from esper_ray.kasmina.limits import Limits
from esper_ray.simic.episode import Kernels
from esper_ray.tamiyo import actions
from esper_ray.tamiyo.actions import FOSSILIZE, GERMINATE, NO_OP, OPERATIONS
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.view import Proposal, RunView
from esper_ray.tolaria import rows
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")


def view_of(trainer):
    return trainer.around.decider.tamiyo._history.views["r"]


def everything_legal(view):
    """Each single choice that the masks leave, as a proposal."""
    blueprints = actions.blueprints_of(view)
    legal = actions.masks(view, (), slots=len(view.opening.slots), blueprints=len(blueprints))
    for operation, slot in itertools.product(range(1, len(OPERATIONS)), range(len(view.opening.slots))):
        if not legal.operation[operation] or not legal.slot[operation, slot]:
            continue
        if operation != GERMINATE:
            yield Proposal(OPERATIONS[operation], slot, "")
            continue
        for place in np.flatnonzero(legal.blueprint[slot]):
            yield Proposal(OPERATIONS[operation], slot, "", blueprint=blueprints[int(place)])


def refused(trainer, proposal):
    directive = SeedDirective(proposal.operation, blueprint=proposal.blueprint)
    command = AdaptationCommand(1, CommandType.SEED, "r", 0, 0, "a test", slot=proposal.slot, seed_directive=directive)
    return kasmina.refusal(trainer.garden, command)


@pytest.mark.parametrize("given", [("seeds.probation_epochs=2",), ("run.max_flops=1e12", "run.max_parameters=2600")])
def test_nothing_that_looks_legal_is_refused_and_what_is_due_is_legal(tmp_path, given):
    settings = (*tiny_runs.SETTINGS, "run.epochs=12", "run.boundary_every=4", "run.mode=lockstep", *given)
    settings += (
        "seeds.gain_errors=0",
        "tamiyo.controller=random",
        "tamiyo.probability=0.9",
        "tamiyo.latest_growth=0.95",
    )
    config = configuration.load(None, [f"home={tmp_path}", *settings])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
    trainer.garden.limits.flops *= 1.3 * trainer.garden.limits.host_flops / 1e12
    trainer.open()
    seen = []
    apply = trainer.orders.apply

    def checked(command):
        # The masks of the very state that this command answers, before anything of it is carried out.
        if not seen or seen[-1] != trainer.epoch:
            seen.append(trainer.epoch)
            view = view_of(trainer)
            legal = list(everything_legal(view))
            assert [(each, why) for each in legal if (why := refused(trainer, each))] == []
            ready = {seed.slot for seed in view.seeds() if seed.stage is Stage.PROBATIONARY and view.watched(seed)}
            assert {each.slot for each in legal if each.operation is SeedOperation.FOSSILIZE} == ready
        return apply(command)

    trainer.boundary._apply = checked
    for _ in range(12):
        trainer.one_epoch()
    assert seen
    trainer.close()


SLOTS = tuple(SlotInfo(i, f"stage{i}", SlotSignature("conv", (16, 8, 8))) for i in range(3))
CANDIDATES = tuple(Candidate(slot, n, "f", size, size * 10) for slot in range(3) for n, size in ((2, 32), (9, 4000)))


def view(*seeds, epochs=4, since=1, metrics=None, **changes):
    given = {"host_parameters": 1000, "max_parameters": 10**6, **changes}
    opening = RunOpening("r", 1, SLOTS, CANDIDATES, "heuristic", 20, **given)
    states = [
        SystemState("r", epoch, epoch, 1, 1.0, 1.0, 0.5, metrics=metrics or {}, seeds=seeds if epoch >= since else ())
        for epoch in range(1, epochs + 1)
    ]
    return RunView(opening, TamiyoConfig(), states)


def masks(seen, pending=()):
    return actions.masks(seen, pending, slots=3, blueprints=2)


def test_a_seed_is_fossilised_after_its_least_stay_and_culled_at_any_time():
    seed = SeedState(1, 1, 9, Stage.PROBATIONARY, alpha=1.0, metrics={"g": 0.5, "ge": 0.01})
    for least, since, legal in ((1, 4, 0), (1, 3, 1), (2, 3, 0), (2, 2, 1)):
        found = masks(view(seed, since=since, probation_epochs=least))
        assert found.slot[FOSSILIZE].tolist() == [0, legal, 0], (least, since)
        assert found.slot[actions.CULL].tolist() == [0, 1, 0]


def test_the_heuristic_waits_for_the_same_least_stay():
    seed = SeedState(1, 1, 9, Stage.PROBATIONARY, alpha=1.0, metrics={"g": 0.5, "ge": 0.01})
    for least, since, kept in ((1, 3, True), (2, 3, False), (2, 2, True)):
        seen = view(seed, since=since, probation_epochs=least)
        found = [each.operation for each in CONTROLLERS["periodic"](seen, TamiyoConfig(period=7))]
        assert (SeedOperation.FOSSILIZE in found) is kept


def test_no_block_is_legal_that_would_need_more_computation_than_is_left_also_not_beside_another():
    room = masks(view(metrics={"fr": 40_400.0}))
    assert room.blueprint.tolist() == [[1, 1]] * 3
    beside = masks(view(metrics={"fr": 40_400.0}), [Proposal(SeedOperation.GERMINATE, 0, "", blueprint=9)])
    assert beside.blueprint.tolist() == [[0, 0], [1, 0], [1, 0]]
    none = masks(view(metrics={"fr": 100.0}))
    assert none.slot[GERMINATE].tolist() == [0, 0, 0]
    assert none.operation[NO_OP] == 1


def test_what_is_left_by_the_opening_counts_where_the_state_does_not_say_it():
    assert masks(view(max_flops=1000.0, host_flops=500.0)).blueprint.tolist() == [[1, 0]] * 3


def test_the_room_that_a_decider_is_told_is_never_above_what_the_limit_leaves():
    draw = random.Random(5)

    class Garden:
        seeds = ()

    for _ in range(300):
        limit, host = draw.uniform(1e3, 1e9), draw.uniform(1.0, 1e3)
        Garden.limits = Limits(flops=limit, host_flops=host)
        told = rows.room(Garden)["fr"]
        assert told == np.float32(told)
        assert Garden.limits.refusal((), told) == ""
        assert told > 0.999 * (limit - host)
    Garden.limits = Limits()
    assert rows.room(Garden) == {}


def test_a_limit_on_step_time_is_room_for_computation_as_well():
    limits = Limits(step_ms=12.0, host_flops=1000.0, measured_step_ms=10.0)
    assert limits.room(()) == pytest.approx(200.0)
    assert limits.refusal((), 199) == ""
    assert "run.max_step_ms" in limits.refusal((), 201)
    both = Limits(flops=1100.0, step_ms=12.0, host_flops=1000.0, measured_step_ms=10.0)
    assert both.room(()) == pytest.approx(100.0)
    assert "run.max_flops" in both.refusal((), 150)
