"""Isolation's promises: the shadow pass is exact and begins at the slot; each kind of leak is caught and named."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import NissaConfig
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CircuitBreakerState
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina import isolation, kernels, snapshot
from esper_ray.kasmina.leaks import Leak
from esper_ray.kasmina.witness import Trace
from esper_ray.nissa.alerts import Alerts, alert_rules
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests.seed_worlds import Host, World, assert_same, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def from_the_slot(world: World, inputs) -> bool:
    return world.garden.isolated.way(inputs) == "from the slot"


def whole(world: World) -> None:
    """From now on this world's shadow passes are whole ones."""
    for seed in world.garden.seeds:
        seed.evidence["upstream"] = {"order": 0, "modules": {}}


def quiet_host() -> Host:
    """One in which a pass draws nothing, so that a whole shadow pass and one from the slot must agree."""
    host = Host()
    host.dropout.p = 0.0
    host.forward = lambda x: host.head(host.tail(torch.cat([host.stem(x), host.body(host.stem(x))], 1)).mean((2, 3)))
    return host


# The shadow pass


def test_after_the_first_one_a_shadow_pass_runs_only_what_comes_after_the_slot():
    world = World(monitor_every=100)
    world.step()
    assert world.model.ran == ["stem.0", "body.0", "tail.0", "head"] * 2
    world.step()  # watched: the second of each hundred is
    world.model.ran.clear()
    world.step()
    assert world.model.ran == ["stem.0", "body.0", "tail.0", "head", "tail.0", "head"]


class Overwriting(Host):
    """It changes the slot's output in place, as `nn.ReLU(inplace=True)` behind a module does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self.body[:2]

    def forward(self, x):
        low = self.stem(x)
        return self.head(self.tail(torch.cat([low, F.relu_(self.body(low))], 1)).mean((2, 3)))


class Reusing(Host):
    """It runs its stem again behind the slot, on what the seed has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        high = self.body(self.stem(x))
        return self.head(self.tail(torch.cat([high, self.stem(self.widen(high))], 1)).mean((2, 3)))


@pytest.mark.parametrize("make", [quiet_host, Overwriting, Reusing])
def test_a_pass_from_the_slot_gives_the_gradients_of_a_whole_one_bit_for_bit(make):
    torch.manual_seed(5)
    a = World(make())
    torch.manual_seed(5)
    b = World(make())
    b.model.load_state_dict(a.model.state_dict())
    for _ in range(5):
        a.step()
        b.step()
        whole(b)
    assert_same(weights(a.branch), weights(b.branch))
    assert a.garden.violations == b.garden.violations == 0
    a.garden.before_step(a.number)
    inputs, _ = a.batch()
    a.model(inputs)
    assert from_the_slot(a, inputs)


def test_what_the_host_overwrites_is_kept_as_a_copy():
    world = World(Overwriting())
    for _ in range(3):
        world.step()
    assert world.garden.seeds[0].evidence["upstream"]["modules"] == {"stem": False, "body": True}


def test_a_module_that_is_called_again_behind_the_slot_runs_again():
    host = Reusing()
    trace = Trace(host, ["body"])
    with trace.looking():
        host(torch.randn(2, 1, 6, 6))
    assert trace.upstream() == {"body": ["body"]}


def test_seeds_that_are_isolated_together_share_a_pass_from_the_first_slot():
    world = World(slots=("body", "stem"), sow=(0, 1))
    for _ in range(4):
        world.step()
    assert list(world.garden.isolated._upstream()) == ["stem"]
    assert all(seed.gradient_norm > 0.0 for seed in world.garden.seeds)
    assert world.garden.violations == 0


class Skipping(Host):
    """Which stages it runs is drawn anew in each pass, from Python's generator and from numpy's."""

    def forward(self, x):
        low = self.stem(x)
        if random.random() < 0.5:
            low = self.stem(x + low.mean(1, keepdim=True))
        high = self.body(low)
        return self.head(self.tail(torch.cat([low, high * np.random.uniform(0.5, 1.0)], 1)).mean((2, 3)))


@pytest.mark.parametrize("make", [Host, Skipping, Overwriting])
def test_the_host_and_all_its_generators_go_the_way_they_go_without_the_seed(make):
    """Dropout, batch normalisation, a generator of its own, depth drawn from Python's and numpy's."""
    ends = []
    for sow in ((), (0,)):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        world = World(make(), sow=sow, monitor_every=3)
        for _ in range(25):
            world.step()
        if sow:
            assert world.garden.checks > 0
            assert world.garden.violations == 0
            assert world.garden.slots[0].stage is Stage.TRAINING
        drawn = torch.rand(3), torch.rand(3, generator=world.model.noise), random.random(), np.random.uniform()
        ends.append((weights(world.model), drawn))
    assert_same(ends[0][0], ends[1][0])
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_shadow_pass_on_another_batch_than_the_models_own_is_a_whole_one():
    world = World()
    world.step()
    world.garden.before_step(1)
    inputs, _ = world.batch()
    other, targets = world.batch()
    loss = F.cross_entropy(world.model(inputs), targets)
    loss.backward()
    assert from_the_slot(world, inputs)
    assert from_the_slot(world, inputs.clone()), "the same batch, indexed twice"
    assert not from_the_slot(world, other)
    world.model.ran.clear()
    world.garden.train_isolated(1, other, targets, F.cross_entropy, loss, watch=True)
    assert world.model.ran == ["stem.0", "body.0", "tail.0", "head"]
    assert world.garden.violations == 0


def test_a_resumed_garden_goes_on_from_the_slot_at_once():
    world = World()
    world.step()
    data, tensors = snapshot.save(world.garden)
    later = World(sow=())
    snapshot.restore(later.garden, data, tensors)
    later.garden.before_step(1)
    inputs, _ = later.batch()
    later.model(inputs)
    assert from_the_slot(later, inputs)


class Checkpointed(Host):
    """It forgets activations and runs its body again in the backward pass."""

    def forward(self, x):
        low = self.stem(x)
        high = torch.utils.checkpoint.checkpoint(self.body, low, use_reentrant=False)
        return self.head(self.dropout(self.tail(torch.cat([low, high], 1))).mean((2, 3)))


def test_activation_checkpointing_raises_no_alarm_and_seeds_learn():
    world = World(Checkpointed())
    for _ in range(6):
        world.step()
    assert world.diagnoses() == []
    assert world.garden.seeds[0].gradient_norm > 0.0


def test_autocast_and_accumulated_gradients_raise_no_alarm():
    world = World()
    for number in range(6):
        world.garden.before_step(number)
        for _ in range(3):
            inputs, targets = world.batch()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(world.model(inputs), targets)
            loss.backward()
        world.garden.train_isolated(number, inputs, targets, F.cross_entropy, loss, watch=True)
        world.loop.optimizer.step()
        world.loop.optimizer.zero_grad(set_to_none=True)
    assert world.garden.checks == 6
    assert world.diagnoses() == []


def test_gradients_that_are_cleared_between_forward_and_backward_raise_no_alarm():
    world = World()
    for number in range(4):
        world.garden.before_step(number)
        inputs, targets = world.batch()
        loss = F.cross_entropy(world.model(inputs), targets)
        world.loop.optimizer.zero_grad()
        loss.backward()
        world.garden.train_isolated(number, inputs, targets, F.cross_entropy, loss, watch=True)
        world.loop.optimizer.step()
    assert world.garden.checks == 4
    assert world.diagnoses() == []


# Leaks: what plants them, and what they are called


def shared_parameter(world):
    world.branch.register_parameter("borrowed", world.model.body[0].weight)


def parameter_in_a_closure(world):
    plain, shared = world.branch.forward, world.model.stem[0].weight
    world.branch.forward = lambda h: plain(h) * (1 + shared.mean())


def activation_with_its_graph(world):
    caught = {}
    world.model.stem.register_forward_hook(
        lambda _m, _i, out: caught.setdefault("h", out) if out.requires_grad else None
    )
    plain = world.branch.forward
    world.branch.forward = lambda h: plain(h) + caught.pop("h", torch.zeros(())).mean()


def host_that_is_no_constant(world):
    whole(world)  # from the slot there would be nothing before it that could learn

    def learning(module):
        return dict(module.named_parameters()) | {n: b.clone() for n, b in module.named_buffers()}

    world.patch.setattr(isolation, "constants", learning)


def shared_buffer(world):
    world.branch.register_buffer("statistics", world.model.body[1].running_mean)


def written_buffer(world):
    plain, buffer = world.branch.forward, world.model.body[1].running_mean
    world.branch.forward = lambda h: (buffer.add_(0.1), plain(h))[1]


def shared_generator(world):
    world.branch.noise = world.model.noise


def drawing_from_the_hosts_generator(world):
    plain, noise = world.branch.forward, world.model.noise
    world.branch.forward = lambda h: plain(h) + 0.01 * torch.randn(h.shape, generator=noise)


def drawing_from_numpy(world):
    plain = world.branch.forward
    world.branch.forward = lambda h: plain(h) * (1 + 0.01 * np.random.uniform())


def drawing_in_the_models_own_pass(world):
    world.model.stem.register_forward_hook(lambda _m, _i, _o: (torch.rand(3), None)[1])


def in_the_hosts_group(world):
    world.loop.optimizer.param_groups[0]["params"].append(next(world.branch.parameters()))


def hook_on_an_activation(world):
    world.model.stem.register_forward_hook(lambda _m, _i, out: out * 1.01)


def hook_on_a_gradient(world):
    world.model.stem[0].weight.register_hook(lambda g: g * 1.5)


def hook_on_the_way_back(world):
    def write(gradient):
        world.model.head.weight.data.mul_(1.01)

    next(world.branch.parameters()).register_hook(write)


def writing_a_weight(world):
    plain, weight = world.branch.forward, world.model.head.weight
    world.branch.forward = lambda h: (weight.data.mul_(1.01), plain(h))[1]


def writing_its_input(world):
    plain = world.branch.forward
    world.branch.forward = lambda h: plain(h.data.mul_(1.01))


LEAKS = [
    (shared_parameter, Leak.SHARED_PARAMETER, "body.0.weight"),
    (parameter_in_a_closure, Leak.SHARED_PARAMETER, "stem.0.weight"),
    (activation_with_its_graph, Leak.MISSING_DETACH, "activation"),
    (host_that_is_no_constant, Leak.MISSING_DETACH, "seed's input"),
    (shared_buffer, Leak.SHARED_BUFFER, "body.1.running_mean"),
    (written_buffer, Leak.SHARED_BUFFER, "body.1.running_mean"),
    (shared_generator, Leak.SHARED_GENERATOR, "noise"),
    (drawing_from_the_hosts_generator, Leak.SHARED_GENERATOR, "noise"),
    (drawing_from_numpy, Leak.SHARED_GENERATOR, "numpy"),
    (drawing_in_the_models_own_pass, Leak.SHARED_GENERATOR, "torch's default generator"),
    (in_the_hosts_group, Leak.OPTIMIZER_GROUP, "the host's group"),
    (hook_on_an_activation, Leak.WRITING_HOOK, "stem"),
    (hook_on_a_gradient, Leak.WRITING_HOOK, "stem.0.weight"),
    (hook_on_the_way_back, Leak.WRITING_HOOK, "head.weight"),
    (writing_a_weight, Leak.WRITING_HOOK, "head.weight"),
    (writing_its_input, Leak.WRITING_HOOK, "slot's own output"),
]


@pytest.mark.parametrize(("plant", "kind", "where"), LEAKS, ids=[plant.__name__ for plant, _, _ in LEAKS])
def test_each_kind_of_leak_is_caught_at_the_next_look_and_named(plant, kind, where, monkeypatch):
    world = World()
    world.patch = monkeypatch
    for _ in range(3):
        world.step()
    assert world.diagnoses() == []
    plant(world)
    world.step()
    told = world.diagnoses()
    assert len(told) == 1, told
    assert f"{kind.value}: " in told[0]
    assert where in told[0]


def missing_detach(world):
    slot = world.garden.slots[0]
    slot._delta = lambda seed, h: seed.branch(h)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (missing_detach, Leak.MISSING_DETACH),
        (activation_with_its_graph, Leak.MISSING_DETACH),
        (shared_parameter, Leak.SHARED_PARAMETER),
        (parameter_in_a_closure, Leak.SHARED_PARAMETER),
        (shared_buffer, Leak.SHARED_BUFFER),
        (in_the_hosts_group, Leak.OPTIMIZER_GROUP),
        (drawing_from_the_hosts_generator, Leak.SHARED_GENERATOR),
        (writing_a_weight, Leak.WRITING_HOOK),
        (writing_its_input, Leak.WRITING_HOOK),
    ],
)
def test_a_live_seed_that_reaches_the_host_is_caught_and_named(plant, kind):
    world = World()
    world.step()
    world.go_live()
    for _ in range(3):
        world.step()
    assert world.diagnoses() == []
    plant(world)
    world.step()
    world.garden.close_epoch(1, step=world.number, steps_per_epoch=9, loss=1.0, measured={})
    told = world.diagnoses()
    assert len(set(told)) == 1  # what is there without a pass was seen before this step already
    assert f"{kind.value}: " in told[0]


def test_a_hook_of_the_users_own_is_no_leak():
    world = World()
    world.step()
    world.model.stem.register_forward_hook(lambda _m, _i, _o: None)  # it looks on, after the graft
    other = World(sow=())
    other.model.stem.register_forward_hook(lambda _m, _i, out: out * 1.01)  # it writes, before the graft
    other.model.head.weight.register_hook(lambda g: g * 0.5)
    assert other.sow() == ""
    for each in (world, other):
        for _ in range(3):
            each.step()
        assert each.garden.checks >= 3
        assert each.diagnoses() == []


def test_only_the_seed_that_leaks_is_blamed_where_it_can_be_told():
    world = World(slots=("body", "stem"), sow=(0, 1))
    world.step()
    writing_a_weight(world)
    for _ in range(3):
        world.step()
    assert world.garden.slots[0].stage is Stage.CULLED
    assert world.garden.slots[1].stage is Stage.TRAINING


def test_three_violations_open_the_breaker_keep_a_checkpoint_cull_the_seed_and_count_for_the_alert():
    world = World(monitor_every=50, shadow_share=1.0)
    world.step()
    parameter_in_a_closure(world)
    for _ in range(3):  # one look every 50 steps, and after a violation at each step
        world.step()
    garden = world.garden
    assert garden.slots[0].stage is Stage.CULLED
    assert world.loop.kept == 1
    events = garden.drain_events()
    kinds = [event["kind"] for event in events]
    assert kinds.count("isolation") == 3
    assert kinds.index("breaker") < len(kinds) - 1 - kinds[::-1].index("stage")
    culled = next(event for event in events if event["kind"] == "stage" and event["to"] == "CULLED")
    assert "shared parameter" in culled["reason"]
    assert "epoch 7 is kept" in culled["reason"]


def test_an_open_breaker_refuses_the_blueprint_until_its_embargo_is_over_also_after_a_resume():
    world = World(slots=("body", "stem"), embargo_epochs=2)
    garden = world.garden
    garden.isolated.breakers.open("BP004")
    garden.drain_events()
    later = World(slots=("body", "stem"), sow=(), embargo_epochs=2)
    snapshot.restore(later.garden, *snapshot.save(garden))
    for each in (world, later):
        assert "its breaker is open" in each.sow(1)
        each.garden.epoch += 2
        assert each.sow(1) == ""
        changed = [e for e in each.garden.drain_events() if e["kind"] == "breaker"]
        assert [event["value"] for event in changed] == [CircuitBreakerState.HALF_OPEN]


class Bus:
    """A publisher that keeps the telemetry."""

    def __init__(self):
        self.packets = []

    def publish(self, kind, payload, **_):
        if kind is BusMessageType.TELEMETRY:
            self.packets.append(codec.decode_telemetry(payload))


def test_a_leaking_block_in_a_real_run_is_culled_the_host_unharmed_and_the_alert_fires(tmp_path, monkeypatch):
    settings = [
        f"home={tmp_path}", "run.dataset=digits", "run.mode=lockstep", "run.epochs=5", "run.boundary_every=0",
        "run.host_width=8", "tamiyo.plateau_rate=10", "tamiyo.onset=0", "tamiyo.seeds_at_once=1", "run.device=cpu",
        "seeds.monitor_every=2", "seeds.training_epochs=3",
    ]  # fmt: skip
    config = configuration.load(None, settings)
    bus = Bus()
    trainer = Trainer(RunRequest("r", config), replace(inprocess.surroundings(config), publisher=bus))
    weight = trainer.model.stage1[0].weight
    bear = kernels.bear

    def leaking(*what, **named):
        block = bear(*what, **named)
        plain = block.forward
        block.forward = lambda h: plain(h) * (1 + 0 * weight.mean())
        return block

    monkeypatch.setattr(kernels, "bear", leaking)
    result = trainer.run()
    alone = Trainer(RunRequest("alone", config, arm="host"), inprocess.surroundings(config))
    alone.run()
    assert_same(weights(trainer.model), weights(alone.model))
    assert result["isolation_violations"] == 3
    events = [json.loads(line) for line in (trainer.folder / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["kind"] == "isolation"]
    assert all("shared parameter: it computes with the host's stage1.0.weight" in event["diagnosis"] for event in told)
    culled = next(event for event in events if event["kind"] == "stage" and event["to"] == "CULLED")
    assert "is kept on disk" in culled["reason"]
    points = [(packet, point) for packet in bus.packets for point in packet.metrics]
    assert 2.0 in [point.value for _, point in points if point.key == "ob" and "isolation" in point.labels["breaker"]]
    alerts = Alerts(alert_rules(NissaConfig()))
    fired = [alerts.observe(point, run="r", at_ns=packet.timestamp_ns) for packet, point in points]
    names = [alert.name for alert in fired if alert is not None and alert.firing]
    # How long a boundary takes is the machine's affair.
    assert sorted({*names} - {"training_latency_high"}) == ["breaker_open", "kasmina_isolation_violation"]
