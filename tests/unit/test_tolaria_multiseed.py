"""Several live seeds: all train, each gets its due, and surgery touches nothing but what they really share."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import OptimizerConfig
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.kasmina.slot import Seed
from esper_ray.simic.episode import Kernels
from esper_ray.tolaria import multiseed
from esper_ray.tolaria.groups import Groups
from esper_ray.tolaria.multiseed import NOBODY, Conflicts, combinations, combine, credit, weights_by_gain
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs
from tests.tied_seeds import equal_slots, tie_births

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (*tiny_runs.SETTINGS, "run.mode=lockstep", "seeds.gain_errors=0")


def train(home, *given):
    config = configuration.load(None, [f"home={home}", *TINY, "run.epochs=6", *given])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
    trainer.run()
    return trainer


def rows(trainer):
    return [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]


# Credit


def game(value, seeds, samples=50):
    """Losses of a game in which the loss taken off is ``value`` of the seeds that are on."""
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(3))
    everyone = frozenset(seeds)
    every = [NOBODY, *combinations(seeds, "shapley")]
    return {off: 2.0 + noise - value(everyone - off) for off in every}


@pytest.mark.parametrize(
    ("value", "alone", "shapley", "joint", "interaction"),
    [
        (lambda on: 0.3 * len(on), 0.3, 0.3, 0.6, 0.0),
        (lambda on: 1.0 if on else 0.0, 0.0, 0.5, 1.0, -1.0),
        (lambda on: 1.0 if len(on) == 2 else 0.0, 1.0, 0.5, 1.0, 1.0),
    ],
    ids=["independent", "either is enough", "both are needed"],
)
def test_two_seeds_get_what_each_is_worth_and_the_interaction_tells_the_rest(value, alone, shapley, joint, interaction):
    losses = game(value, (1, 2))
    for rule, single in (("leave_one_out", alone), ("shapley", shapley)):
        found = credit(losses, (1, 2), rule)
        assert [worth.mean for worth in found.single.values()] == pytest.approx([single, single], abs=1e-5)
        assert found.joint.mean == pytest.approx(joint, abs=1e-5)
        assert found.interaction.mean == pytest.approx(interaction, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=8, max_size=8))
def test_shapley_values_sum_up_to_what_the_seeds_are_worth_together(values):
    seeds = (1, 2, 3)
    table = {frozenset(s for s in seeds if index >> (s - 1) & 1): value for index, value in enumerate(values)}
    found = credit(game(lambda on: table[on], seeds), seeds, "shapley")
    assert sum(worth.mean for worth in found.single.values()) == pytest.approx(found.joint.mean, abs=1e-4)


def test_a_single_seed_has_no_interaction_and_is_measured_once():
    assert combinations((4,), "leave_one_out") == combinations((4,), "shapley") == [frozenset({4})]
    found = credit(game(len, (4,)), (4,), "leave_one_out")
    assert found.single[4] == found.joint
    assert found.interaction.mean == 0.0


@pytest.mark.parametrize("rule", ["leave_one_out", "shapley"])
def test_three_live_seeds_train_and_are_credited_one_by_one_and_together(tmp_path, rule):
    trainer = train(tmp_path, f"seeds.credit={rule}")
    three = [row for row in rows(trainer) if sum(seed["gain"] is not None for seed in row["seeds"]) == 3]
    assert three
    for row in three:
        gains = [seed["gain"] for seed in row["seeds"]]
        together = row["credit"]
        assert len(set(gains)) == 3
        assert together["joint_error"] > 0.0
        if rule == "shapley":
            assert sum(gains) == pytest.approx(together["joint"], abs=1e-5)
        else:
            assert together["interaction"] == pytest.approx(sum(gains) - together["joint"], abs=1e-5)


def test_all_of_three_live_seeds_change_their_weights_in_every_step(tmp_path):
    config = configuration.load(None, [f"home={tmp_path}", *TINY, "run.epochs=6", "seeds.blending_epochs=3"])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
    step, changed = trainer.train_step, []

    def train_step():
        live = trainer.garden.in_stage(Stage.BLENDING)
        before = {seed.number: [p.detach().clone() for p in seed.branch.parameters()] for seed in live}
        step()
        for seed in live if len(live) == 3 else ():
            after = seed.branch.parameters()
            changed.append(any(not torch.equal(a, b) for a, b in zip(before[seed.number], after, strict=True)))

    trainer.train_step = train_step
    trainer.run()
    assert len(changed) >= 3 * 8
    assert all(changed)


# Surgery


def test_gradients_that_agree_are_added_up_bit_for_bit():
    a, b, c = (torch.rand(5, 3, generator=torch.Generator().manual_seed(n)) for n in range(3))
    conflicts = Conflicts()
    total = combine([a, b, c], conflicts, generator=torch.Generator())
    assert torch.equal(total, a + b + c)
    assert conflicts.drain() == 0.0


def test_two_gradients_in_conflict_lose_what_they_hold_against_each_other():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    conflicts = Conflicts()
    total = combine([a, b], conflicts, generator=torch.Generator())
    # a without its part along b is (0.5, 0.5), b without its part along a is (0, 1).
    assert torch.allclose(total, torch.tensor([0.5, 1.5]))
    assert conflicts.drain() == 1.0
    assert conflicts.drain() is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_after_surgery_two_gradients_work_against_neither(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(7, generator=generator), torch.randn(7, generator=generator)
    total = combine([a, b], Conflicts(), generator=generator)
    assert float(total @ a) >= -1e-4
    assert float(total @ b) >= -1e-4


def test_without_surgery_conflicts_are_counted_and_left_alone():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    conflicts = Conflicts()
    assert torch.equal(combine([a, b], conflicts, generator=torch.Generator(), project=False), a + b)
    assert conflicts.drain() == 1.0


def tied():
    """A host, and two seeds whose blocks have one weight in common."""
    torch.manual_seed(1)
    model, seeds = torch.nn.Linear(3, 3), []
    for number in (1, 2):
        seed = Seed(number, number - 1, KernelSpec("BP009", SlotSignature("vector", (3,))), Stage.BLENDING, 1, 1, 1)
        seed.branch = torch.nn.Linear(3, 3)
        seeds.append(seed)
    seeds[1].branch.weight = seeds[0].branch.weight
    groups = Groups(model, OptimizerConfig(clip_norm=1e6))
    for seed in seeds:
        groups.adopt(seed)
    return model, groups, seeds


def backward(model, seeds, signs):
    """Gradients of opposite signs on the seeds' weights."""
    inputs = torch.ones(4, 3)
    model(inputs).sum().backward()
    for seed, sign in zip(seeds, signs, strict=True):
        (sign * seed.branch(inputs)).sum().backward()


def test_a_shared_parameter_is_trained_once_with_the_gradients_of_both():
    model, groups, (one, two) = tied()
    assert groups.shared
    assert one.branch.weight.data_ptr() == two.branch.weight.data_ptr()
    backward(model, (one, two), (1.0, 0.5))
    groups.shared.combine(generator=torch.Generator(), project=True)
    assert torch.allclose(one.branch.weight.grad, torch.full((3, 3), 6.0))
    assert two.branch.weight.grad is None
    groups.clip()
    groups.optimizer.step()
    assert torch.equal(one.branch.weight, two.branch.weight)
    trained = [p for group in groups.optimizer.param_groups for p in group["params"]]
    assert sum(p.data_ptr() == one.branch.weight.data_ptr() for p in trained) == 1
    assert groups.shared.conflicts.drain() == 0.0


def test_gradients_that_cancel_out_are_not_traded_against_each_other():
    model, groups, (one, two) = tied()
    backward(model, (one, two), (1.0, -0.5))
    groups.shared.combine(generator=torch.Generator(), project=True)
    assert float(one.branch.weight.grad.abs().max()) < 1e-6
    assert groups.shared.conflicts.drain() == 1.0


def test_when_the_owner_goes_the_other_seed_goes_on_with_its_moments():
    model, groups, (one, two) = tied()
    backward(model, (one, two), (1.0, 0.5))
    groups.shared.combine(generator=torch.Generator(), project=True)
    groups.clip()
    groups.optimizer.step()
    moment = groups.optimizer.state[one.branch.weight]["exp_avg"].clone()
    groups.release(one)
    assert not groups.shared
    assert torch.equal(groups.optimizer.state[two.branch.weight]["exp_avg"], moment)
    assert groups.leftovers(1) == 0
    before = two.branch.weight.detach().clone()
    two.branch(torch.ones(4, 3)).sum().backward()
    groups.optimizer.step()
    assert not torch.equal(before, two.branch.weight)


def test_surgery_provably_does_nothing_where_nothing_is_shared(tmp_path, monkeypatch):
    """With three live seeds: the same weights bit for bit with it and without, and it is never called."""

    def never(*_, **__):
        raise AssertionError("there is nothing to operate on")

    monkeypatch.setattr(multiseed, "combine", never)
    with_it, without = (train(tmp_path / f"{on}", f"seeds.pcgrad={on}") for on in (True, False))
    assert any(sum(seed["alpha"] > 0.0 for seed in row["seeds"]) == 3 for row in rows(with_it))
    for name, value in with_it.model.state_dict().items():
        assert torch.equal(value, without.model.state_dict()[name]), name
    assert {row["conflict_ratio"] for row in rows(with_it)} == {None}


def test_in_a_run_whose_seeds_share_their_weights_surgery_acts_and_the_conflicts_are_told(tmp_path, monkeypatch):
    equal_slots(monkeypatch)
    ends = []
    for on in (True, False):
        with monkeypatch.context() as patch:
            tie_births(patch)
            ends.append(train(tmp_path / f"{on}", f"seeds.pcgrad={on}"))
    with_it, without = ends
    ratios = [row["conflict_ratio"] for row in rows(with_it) if row["conflict_ratio"] is not None]
    assert any(0.0 < ratio < 1.0 for ratio in ratios)
    assert rows(with_it)[0]["conflict_ratio"] is None
    assert any(
        not torch.equal(value, without.model.state_dict()[name]) for name, value in with_it.model.state_dict().items()
    )


def test_a_resumed_run_ties_again_what_its_seeds_shared_and_ends_as_one_undisturbed(tmp_path, monkeypatch):
    equal_slots(monkeypatch)
    ends = []
    for name in ("whole", "resumed"):
        with monkeypatch.context() as patch:
            tie_births(patch)
            config = configuration.load(None, [f"home={tmp_path / name}", *TINY, "run.epochs=6"])
            trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
            if name == "resumed":
                trainer.open()
                while len(trainer.groups.seeds) < 3:
                    trainer.one_epoch()
                assert trainer.groups.shared
                trainer.one_epoch()
                trainer.close()
                trainer = Trainer(
                    RunRequest("r", config, resume=True), inprocess.surroundings(config, kernels=Kernels())
                )
            trainer.run()
            ends.append(trainer)
    whole, resumed = ends
    assert rows(resumed)[-1]["conflict_ratio"] == rows(whole)[-1]["conflict_ratio"] is not None
    tied = [seed.branch for seed in resumed.garden.seeds if seed.branch is not None]
    assert len({next(branch.parameters()).data_ptr() for branch in tied}) == 1
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_what_is_tied_is_told_by_name_and_tied_again():
    _, groups, (one, two) = tied()
    told = json.loads(json.dumps(groups.shared.save({1: one.branch, 2: two.branch})))
    assert told == [[[1, "weight"], [2, "weight"]]]
    anew = {number: torch.nn.Linear(3, 3) for number in (2, 1)}
    shared = multiseed.Shared()
    shared.load(told, anew)
    assert anew[1].weight.data_ptr() == anew[2].weight.data_ptr()
    assert anew[1].weight is not anew[2].weight
    assert shared.save(anew) == [[(1, "weight"), (2, "weight")]]
    assert [p is anew[2].bias for p in shared.adopt(2, anew[2], {})] == [True]
    assert len(shared.adopt(1, anew[1], {2: anew[2]})) == 2


# Weights


@pytest.mark.parametrize(
    ("gains", "weights"),
    [
        ({1: 0.3, 2: 0.1}, {1: 1.5, 2: 0.5}),
        ({1: 1.0, 2: -0.5}, {1: 2.0, 2: 0.1}),
        ({1: None, 2: 0.2}, {2: 1.0}),
        ({1: -0.1, 2: 0.0}, {}),
        ({1: math.nan}, {}),
    ],
)
def test_weights_of_losses_follow_what_seeds_gain_within_bounds(gains, weights):
    assert weights_by_gain(gains) == pytest.approx(weights)


def test_weighing_scales_the_named_seeds_gradients_and_no_others():
    model, groups, (one, two) = tied()
    backward(model, (one, two), (1.0, 1.0))
    host = [p.grad.clone() for p in model.parameters()]
    groups.weigh({2: 0.25})
    assert torch.equal(one.branch.weight.grad, torch.full((3, 3), 4.0))
    assert torch.equal(two.branch.weight.grad, torch.full((3, 3), 1.0))
    assert all(torch.equal(a, p.grad) for a, p in zip(host, model.parameters(), strict=True))


def test_weighted_losses_leave_isolated_seeds_and_the_host_as_they_are_and_change_live_ones(tmp_path, monkeypatch):
    """By what each was measured to gain, from the first measurement on; nothing else differs from equal weights."""
    weighed, plain = [], Groups.weigh

    def weigh(groups, weights):
        weighed.append(dict(weights))
        plain(groups, weights)

    monkeypatch.setattr(Groups, "weigh", weigh)
    before, after = {}, {}
    for rule in ("equal", "gain"):
        config = configuration.load(
            None, [f"home={tmp_path / rule}", *TINY, "run.epochs=6", f"seeds.loss_weights={rule}"]
        )
        trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
        trainer.open()
        while not any("gain" in seed.evidence for seed in trainer.groups.seeds.values()):
            trainer.one_epoch()
        parts = [trainer.model, *(seed.branch for seed in trainer.garden.seeds)]
        before[rule] = [value.clone() for part in parts for value in part.state_dict().values()]
        live = [seed.branch for seed in trainer.garden.live]
        trainer.one_epoch()
        after[rule] = [value.clone() for part in live for value in part.state_dict().values()]
        trainer.close()
    assert any(len(set(weights.values())) > 1 for weights in weighed), "live seeds that gain unequally"
    assert all(map(torch.equal, before["equal"], before["gain"]))
    assert not all(map(torch.equal, after["equal"], after["gain"]))
