"""Learning rates have one writer, who notices another; each policy does what it says, from the first step of a seed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import OptimizerConfig
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.kasmina.slot import Seed
from esper_ray.simic.episode import Kernels
from esper_ray.tolaria.learning_rate import FASTEST, SLOWEST, LearningRates, trust_ratio
from esper_ray.tolaria.loop import Loop
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

CONSTANT = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0, seed_warmup_steps=10)
TINY = (*tiny_runs.SETTINGS, "run.mode=lockstep")


def optimizer_with(*seeds):
    """AdamW over a host's layer and one layer for each seed, after one step."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 3) for _ in range(1 + len(seeds))]
    groups = [
        {"params": list(layer.parameters()), "seed": number} for number, layer in zip((0, *seeds), layers, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    for layer in layers:
        layer(torch.randn(5, 3)).square().sum().backward()
    return optimizer, layers


def seed_in(stage, number=1):
    spec = KernelSpec("BP009", SlotSignature("conv", (4, 8, 8)))
    return Seed(number, 0, spec, stage, 1, 1, 1)


def rate_of(optimizer, number):
    return next(group["lr"] for group in optimizer.param_groups if group["seed"] == number)


@pytest.mark.parametrize("victim", [0, 1])
def test_what_something_else_wrote_is_undone_before_the_step_that_would_use_it(victim):
    optimizer, _ = optimizer_with(1)
    rates = LearningRates(CONSTANT, 100, "host")
    rates.born(1, 0)
    rates.write(optimizer, 0)
    optimizer.param_groups[victim]["lr"] = 5.0
    rates.write(optimizer, 1)
    assert rate_of(optimizer, victim) == pytest.approx(0.1)
    assert rates.outside_writes == 1
    (found,) = rates.drain_events()
    assert found == {"kind": "rate", "seed": victim, "step": 1, "found": 5.0, "expected": 0.1, "times": 1}
    assert rates.drain_events() == []


def test_a_stubborn_writer_is_one_event_with_a_count():
    optimizer, _ = optimizer_with()
    rates = LearningRates(CONSTANT, 100)
    for step in range(8):
        rates.write(optimizer, step)
        optimizer.param_groups[0]["lr"] = 7.0
    assert rates.outside_writes == 7
    assert [event["times"] for event in rates.drain_events()] == [7]


class Collector:
    """A publisher that keeps telemetry."""

    def __init__(self):
        self.points, self.events = [], []

    def publish(self, kind, payload, **_):
        if kind is BusMessageType.TELEMETRY:
            packet = codec.decode_telemetry(payload)
            self.points += packet.metrics
            self.events += packet.events


def test_an_outside_write_in_a_run_has_no_effect_and_reaches_the_files_and_the_bus(tmp_path):
    ends = []
    for name, meddle in (("alone", False), ("meddled", True)):
        config = configuration.load(None, [f"home={tmp_path / name}", *TINY, "run.epochs=2"])
        collector = Collector()
        around = inprocess.surroundings(config, kernels=Kernels(), publisher=collector)
        trainer = Trainer(RunRequest("r", config, arm="host"), around)
        step = trainer.train_step

        def train_step(trainer=trainer, step=step, meddle=meddle):
            if meddle and trainer.step in (3, 4, 11):
                trainer.groups.optimizer.param_groups[0]["lr"] = 10.0
            step()

        trainer.train_step = train_step
        trainer.run()
        ends.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    events = [json.loads(line) for line in (trainer.folder / "events.jsonl").read_text().splitlines()]
    assert [(e["epoch"], e["times"]) for e in events if e["kind"] == "rate"] == [(1, 2), (2, 1)]
    assert [point.value for point in collector.points if point.key == "rw"] == [2.0, 1.0]
    told = [event for event in collector.events if event.kind == "rate.outside"]
    assert [event.attributes["found"] for event in told] == ["10", "10"]


def test_under_the_host_policy_a_seed_has_the_hosts_rate_at_once():
    rates = LearningRates(CONSTANT, 100, "host")
    rates.born(1, 40)
    assert rates.seed_rate(1, 40) == rates.host_rate(40)


def test_a_frozen_seed_learns_in_isolation_stands_still_while_it_is_live_and_learns_again_as_a_fossil():
    optimizer, layers = optimizer_with(1)
    rates = LearningRates(CONSTANT, 100, "frozen")
    rates.born(1, 0)
    rates.write(optimizer, 20, {1: seed_in(Stage.TRAINING)})
    assert rate_of(optimizer, 1) == pytest.approx(0.1)
    for stage in (Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY):
        rates.write(optimizer, 21, {1: seed_in(stage)})
        assert rate_of(optimizer, 1) == 0.0
        before = [parameter.clone() for parameter in layers[1].parameters()]
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, layers[1].parameters(), strict=True))
    rates.write(optimizer, 22, {})
    assert rate_of(optimizer, 1) == pytest.approx(0.1)
    assert rates.outside_writes == 0


def test_the_adaptive_rate_is_the_ratio_of_weights_to_adams_update_within_its_bounds():
    optimizer, layers = optimizer_with(1)
    rates = LearningRates(CONSTANT, 100, "adaptive")
    rates.born(1, 0)
    rates.write(optimizer, 20, {1: seed_in(Stage.TRAINING)})
    assert rate_of(optimizer, 1) == pytest.approx(0.1)
    optimizer.step()
    # Adam's first update is the sign of the gradient.
    size = math.sqrt(sum(parameter.numel() for parameter in layers[1].parameters()))
    weights = math.sqrt(sum(float(parameter.detach().square().sum()) for parameter in layers[1].parameters()))
    rates.write(optimizer, 21, {1: seed_in(Stage.TRAINING)})
    assert SLOWEST < weights / size < FASTEST
    assert rate_of(optimizer, 1) == pytest.approx(0.1 * weights / size, rel=1e-4)
    assert rate_of(optimizer, 0) == pytest.approx(0.1)


@pytest.mark.parametrize(("scale", "bound"), [(1e-6, SLOWEST), (1e6, FASTEST)])
def test_the_adaptive_ratio_stays_within_its_bounds(scale, bound):
    optimizer, layers = optimizer_with(1)
    optimizer.step()
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.mul_(scale)
    assert trust_ratio(optimizer, optimizer.param_groups[1]) == bound


@pytest.mark.parametrize("policy", ["warmup", "host", "adaptive", "frozen"])
def test_every_policy_trains_a_run_with_seeds(tmp_path, policy):
    config = configuration.load(None, [f"home={tmp_path}", *TINY, "run.epochs=7", f"seeds.rate_policy={policy}"])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
    result = trainer.run()
    assert math.isfinite(result["test_loss"])
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(seed["alpha"] > 0.0 for row in rows for seed in row["seeds"])


def test_a_live_seed_under_the_frozen_policy_keeps_its_weights_bit_for_bit(tmp_path):
    settings = [f"home={tmp_path}", *TINY, "run.epochs=9", "seeds.rate_policy=frozen", "seeds.blending_epochs=3"]
    config = configuration.load(None, settings)
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config, kernels=Kernels()))
    seen, close = {}, Loop.close_stages

    def close_stages(quality):
        close(trainer, quality)
        for seed in trainer.garden.in_stage(Stage.BLENDING):
            seen.setdefault(seed.number, []).append([p.detach().clone() for p in seed.branch.parameters()])

    trainer.close_stages = close_stages
    trainer.run()
    assert max(len(versions) for versions in seen.values()) >= 3
    for first, *later in seen.values():
        for version in later:
            assert all(torch.equal(a, b) for a, b in zip(first, version, strict=True))
