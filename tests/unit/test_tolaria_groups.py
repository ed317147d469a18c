"""The optimizer's groups: newborns leave the host's moments alone, and the removed leave nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import OptimizerConfig
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.kasmina.slot import Seed
from esper_ray.simic.episode import Kernels
from esper_ray.tolaria.groups import Groups
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (*tiny_runs.SETTINGS, "run.mode=lockstep")


def newborn(number, *, size=4):
    spec = KernelSpec("BP009", SlotSignature("vector", (size,)))
    seed = Seed(number, number - 1, spec, Stage.TRAINING, 1, 1, 1)
    seed.branch = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, size))
    return seed


def host():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def step(groups, model, seeds=(), *, at=0):
    """A step whose host gradient does not depend on the seeds."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(at))
    model(inputs).square().sum().backward()
    for seed in seeds:
        seed.branch(inputs).square().sum().mul(1e3).backward()
    groups.clip()
    groups.optimizer.step()
    groups.optimizer.zero_grad(set_to_none=True)


def moments(groups, model):
    return [
        (key, value.clone()) for p in model.parameters() for key, value in sorted(groups.optimizer.state[p].items())
    ]


def same(one, other):
    return len(one) == len(other) and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def test_births_training_and_removal_of_seeds_leave_the_hosts_moments_bit_for_bit():
    ends = []
    for growing in (False, True):
        model = host()
        groups = Groups(model, OptimizerConfig())
        seeds = [newborn(1), newborn(2)]
        for at in range(12):
            if growing and at in (3, 5):
                before = moments(groups, model)
                groups.adopt(seeds[0 if at == 3 else 1])
                assert same(before, moments(groups, model))
            if growing and at == 8:
                groups.release(seeds[0])
            step(groups, model, [s for s in seeds if s.number in groups.seeds], at=at)
        ends.append((moments(groups, model), [("weights", p.detach().clone()) for p in model.parameters()]))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_a_newborns_moments_start_at_zero_with_a_step_count_of_its_own():
    model, seed = host(), newborn(1)
    groups = Groups(model, OptimizerConfig())
    for at in range(4):
        step(groups, model, at=at)
    groups.adopt(seed)
    assert all(parameter not in groups.optimizer.state for parameter in seed.branch.parameters())
    step(groups, model, [seed], at=4)
    assert {float(groups.optimizer.state[p]["step"]) for p in seed.branch.parameters()} == {1.0}
    assert {float(groups.optimizer.state[p]["step"]) for p in model.parameters()} == {5.0}


def test_of_a_removed_seed_nothing_is_left_in_the_optimizer():
    model, seed = host(), newborn(1)
    groups = Groups(model, OptimizerConfig())
    groups.adopt(seed)
    step(groups, model, [seed])
    traces = [weakref.ref(parameter) for parameter in seed.branch.parameters()]
    assert groups.leftovers(1) > 0
    groups.release(seed)
    assert groups.leftovers(1) == 0
    assert len(groups.optimizer.param_groups) == 1
    assert set(groups.optimizer.state) == set(model.parameters())
    seed.branch = None
    gc.collect()
    assert [trace() for trace in traces] == [None] * len(traces)


def test_moments_that_nobody_trains_any_more_count_as_leftovers():
    model, seed = host(), newborn(1)
    groups = Groups(model, OptimizerConfig())
    groups.adopt(seed)
    step(groups, model, [seed])
    orphaned = groups.optimizer.state[next(seed.branch.parameters())]
    groups.release(seed)
    groups.optimizer.state[next(seed.branch.parameters())] = orphaned
    assert groups.leftovers(1) == 1


def test_host_and_seeds_are_clipped_apart():
    model, seeds = host(), [newborn(1), newborn(2)]
    groups = Groups(model, OptimizerConfig(clip_norm=0.5))
    for seed in seeds:
        groups.adopt(seed)
    for size, module in ((1e-3, model), (100.0, seeds[0].branch), (1e-4, seeds[1].branch)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, size)
    groups.clip()
    norms = [float(torch.stack([p.grad.norm() for p in m.parameters()]).norm()) for m in (model, seeds[0].branch)]
    assert norms[1] == pytest.approx(0.5, rel=1e-3)
    assert norms[0] == pytest.approx(1e-3 * sum(p.numel() for p in model.parameters()) ** 0.5, rel=1e-5)
    assert all(bool((p.grad == 1e-4).all()) for p in seeds[1].branch.parameters())


def test_a_culled_seed_of_a_run_is_collected_with_all_its_moments(tmp_path):
    config = configuration.load(None, [f"home={tmp_path}", *TINY, "run.epochs=7"])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
    traces, adopt = [], trainer.adopt

    def watched(seed):
        adopt(seed)
        traces.extend(weakref.ref(parameter) for parameter in seed.branch.parameters())

    trainer.adopt = watched
    close = trainer.close_stages

    def cull_all(quality):
        close(quality)
        if trainer.epoch == 5:
            for slot in trainer.garden.slots:
                if slot.seed is not None:
                    trainer.garden.cull(slot, "for the test")

    trainer.close_stages = cull_all
    trainer.run()
    assert trainer.garden.culled == 3
    gc.collect()
    assert traces
    assert all(trace() is None for trace in traces)
    assert {group["seed"] for group in trainer.groups.optimizer.param_groups} == {0}
    assert set(trainer.groups.optimizer.state) == set(trainer.model.parameters())
