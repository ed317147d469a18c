"""Growth stops at its user's limits, which the refusals name, and when it no longer pays."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import esper_ray
from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import TamiyoConfig
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation
from esper_ray.contracts.messages import SeedState, SystemState
from esper_ray.contracts.ports import Candidate, KernelSpec, RunOpening, SlotInfo, SlotSignature
from esper_ray.errors import ConfigError
from esper_ray.kasmina.limits import Limits, flops_of
from esper_ray.kasmina.slot import Seed
from esper_ray.simic.episode import Kernels
from esper_ray.tamiyo.heuristic import heuristic, in_vain
from esper_ray.tamiyo.view import RunView
from esper_ray.tolaria.costs import forward_flops
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (*tiny_runs.SETTINGS, "run.epochs=7")


def trainer_at(home, *given):
    config = configuration.load(None, [f"home={home}", *TINY, *given])
    return Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))


def events(trainer, kind):
    rows = [json.loads(line) for line in (trainer.folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def run_with_a_blind_decider(trainer):
    """Let the decider ask for everything, whatever room there is: G0 alone stands in the way."""
    opening = trainer._opening
    trainer._opening = lambda: replace(opening(), max_flops=0.0, max_parameters=10**9)
    state = trainer.state

    def without_room(*given):
        told = state(*given)
        return replace(told, metrics={key: value for key, value in told.metrics.items() if key != "fr"})

    trainer.state = without_room
    trainer.run()


def test_a_model_never_needs_more_flops_than_its_limit_and_the_refusal_names_it(tmp_path):
    free = trainer_at(tmp_path / "free", "run.mode=lockstep")
    free.run()
    host = forward_flops(trainer_at(tmp_path / "h", "run.mode=lockstep").model, free.train.inputs[:2])
    one = flops_of(free.garden.seeds[0])
    assert len(free.garden.seeds) == 3
    limit = host + 1.5 * one
    bound = trainer_at(tmp_path / "bound", "run.mode=lockstep", f"run.max_flops={limit}")
    run_with_a_blind_decider(bound)
    assert len(bound.garden.seeds) == 1
    assert forward_flops(bound.model, bound.train.inputs[:2]) <= limit
    reasons = {row["reason"] for row in events(bound, "refusal")}
    assert reasons
    assert all("run.max_flops" in reason for reason in reasons)
    assert {row["passed"] for row in events(bound, "gate") if "run.max_flops" in row["reason"]} == {False}


def test_the_heuristic_asks_for_nothing_that_the_limit_would_refuse(tmp_path):
    host = forward_flops(trainer_at(tmp_path / "h", "run.mode=lockstep").model, torch.zeros(1, 1, 8, 8))
    bound = trainer_at(tmp_path / "bound", "run.mode=lockstep", f"run.max_flops={host * 1.05}")
    bound.run()
    assert events(bound, "refusal") == []
    assert forward_flops(bound.model, bound.train.inputs[:2]) <= host * 1.05


def test_a_refusal_for_want_of_parameters_names_its_limit(tmp_path):
    bound = trainer_at(tmp_path, "run.mode=lockstep", "run.max_parameters=2000")
    run_with_a_blind_decider(bound)
    assert any("2000 of run.max_parameters" in row["reason"] for row in events(bound, "refusal"))
    assert bound.garden.parameter_count() <= 2000


def test_a_step_that_would_take_too_long_is_refused_with_both_times():
    seed = Seed(1, 0, KernelSpec("BP009", SlotSignature("conv", (4, 8, 8))), Stage.TRAINING, 1, 1, 1)
    limits = Limits(step_ms=10.0, host_flops=float(flops_of(seed)), measured_step_ms=6.0)
    assert limits.refusal([seed], flops_of(seed) // 2) == ""
    assert "a step takes 6.0 ms and would take about 12.0, more than the 10 of run.max_step_ms" in limits.refusal(
        [seed], 2 * flops_of(seed)
    )


def test_without_limits_nothing_is_refused_and_nothing_is_measured(tmp_path):
    assert Limits().refusal([], 10**15) == ""
    trainer = trainer_at(tmp_path, "run.mode=lockstep")
    assert trainer.garden.limits.host_flops == 0.0


def test_a_run_whose_steps_are_too_long_already_does_not_grow_at_all(tmp_path):
    bound = trainer_at(tmp_path, "run.mode=live", "run.max_step_ms=0.001")
    run_with_a_blind_decider(bound)
    assert bound.garden.seeds == []
    germinations = [row for row in events(bound, "refusal") if row["operation"] == "GERMINATE"]
    asked = [c for row in events(bound, "decision") for c in row["commands"] if c["operation"] == "GERMINATE"]
    assert len(germinations) == len(asked)
    assert all("run.max_step_ms" in row["reason"] for row in germinations)


def test_a_repeated_boundary_judges_the_step_time_that_was_measured_first(tmp_path):
    trainer = trainer_at(tmp_path, "run.mode=live")
    assert trainer.recorder.step_time(0, 3, 4.5) == 4.5
    assert trainer.recorder.step_time(0, 3, 99.0) == 4.5
    assert trainer.recorder.step_time(1, 3, 99.0) == 99.0


def test_a_limit_on_time_in_lockstep_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="no clock decides"):
        configuration.load(None, ["run.mode=lockstep", "run.max_step_ms=5"])


def test_forward_flops_leave_the_model_and_its_randomness_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
    state = torch.get_rng_state()
    assert forward_flops(model, torch.zeros(3, 4)) == 2 * (4 * 8 + 8 * 2)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


# When it no longer pays

SLOT = SlotInfo(0, "stage1", SlotSignature("conv", (4, 8, 8)))
OFFER = Candidate(0, 9, "convolution", 100, 1000)


def lived(*stages, **settings):
    """A run of one slot whose stage at each boundary is given, None for a dormant one; the loss stands still."""
    config = TamiyoConfig(warmup_epochs=1, **settings)
    opening = RunOpening("r", 1, (SLOT,), (OFFER,), "heuristic", 1000, host_parameters=1000, max_parameters=10**6)
    view = RunView(opening, config)
    for epoch, stage in enumerate(stages, start=1):
        seeds = () if stage is None else (SeedState(1, 0, 9, stage),)
        view.states.append(SystemState("r", epoch, epoch, 0, 1.0, 1.0, 0.5, seeds=seeds))
    return view


FAILED = (Stage.TRAINING, Stage.CULLED, Stage.EMBARGOED, None)
KEPT = (Stage.PROBATIONARY, Stage.FOSSILIZED)


@pytest.mark.parametrize(
    ("stages", "count"),
    [
        ((None,) * 3, 0),
        (FAILED * 2, 2),
        (KEPT + FAILED, 1),
        (FAILED * 3 + KEPT, 0),
        ((Stage.TRAINING, Stage.EMBARGOED), 1),
    ],
)
def test_seeds_removed_since_the_last_one_that_stayed_are_counted_once_each(stages, count):
    assert in_vain(lived(*stages)) == count


@pytest.mark.parametrize(("limit", "grows"), [(0, True), (2, False), (3, True)])
def test_when_seed_after_seed_was_removed_the_heuristic_stops_growing(limit, grows):
    view = lived(*FAILED * 2, give_up_after=limit, onset=0.0)
    proposals = heuristic(view, view.config)
    assert [p.operation for p in proposals] == ([SeedOperation.GERMINATE] if grows else [])


# In a loop of one's own


def attached(home, *given):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = [f"home={home}", "run.mode=lockstep", *given]
    return esper_ray.attach(
        model, ["0"], loss=torch.nn.functional.cross_entropy, optimizer=optimizer, epochs=4,
        sample=torch.zeros(2, 6), config=settings,
    )  # fmt: skip


def test_a_model_in_ones_own_loop_keeps_its_limit_on_flops(tmp_path):
    limits = attached(tmp_path, "run.max_flops=150").garden.limits
    assert limits.host_flops == 2 * (6 * 8 + 8 * 3)
    assert "run.max_flops" in limits.refusal([], 100)
    assert limits.refusal([], 5) == ""


def test_a_limit_on_time_is_refused_where_steps_are_not_timed(tmp_path):
    with pytest.raises(ConfigError, match="loop of your own"):
        attached(tmp_path, "run.mode=live", "run.max_step_ms=5")
