"""Kasmina's promises: births change nothing, isolation is exact, the host path stays open, gates want evidence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper_ray import inprocess
from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleGate as Gate
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective, blueprint_number
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.errors import LifecycleError
from esper_ray.karn.catalog import CATALOG
from esper_ray.kasmina import gates, isolation
from esper_ray.kasmina.blending import SCHEDULES, alpha_at
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.lifecycle import TRANSITIONS, gate_of

SIGNATURE = SlotSignature("conv", (16, 6, 6))
SLOTS = (SlotInfo(0, "body", SIGNATURE),)


class Host(nn.Module):
    """A tiny host with one slot and dropout, so that randomness is at stake too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.body(x)).mean((2, 3)))


class Loop:
    """The least a garden asks of its trainer."""

    def __init__(self) -> None:
        self.adopted: list[int] = []
        self.grafts: dict[int, int] = {}

    def adopt(self, seed):
        self.adopted.append(seed.number)

    def release(self, seed):
        self.adopted.remove(seed.number)

    def fossilise(self, seed):
        pass

    def leftovers(self, seed):
        return int(seed in self.adopted)

    def foreign_groups(self, seed):
        return []

    def keep_checkpoint(self):
        return None

    def planned_graft(self, seed):
        return None

    def record_graft(self, seed, step):
        self.grafts[seed] = step


def plant(config: SeedConfig | None = None, blueprint: int = 9) -> Garden:
    torch.manual_seed(0)
    garden = Garden(
        Host(), SLOTS, config or SeedConfig(), inprocess.LocalKernels(), Loop(),
        run_seed=7, max_parameters=10**6, lockstep=True,
    )  # fmt: skip
    assert garden.apply(command(SeedOperation.GERMINATE, blueprint=blueprint)) == ""
    return garden


def command(operation: SeedOperation, **directive: int) -> AdaptationCommand:
    return AdaptationCommand(
        1, CommandType.SEED, "r", 1, 0, "test", seed_directive=SeedDirective(operation, **directive)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(4, (16,), generator=generator)


def set_stage(garden: Garden, stage: Stage, alpha: float) -> None:
    slot = garden.slots[0]
    slot.stage = slot.seed.stage = stage
    slot.seed.alpha = alpha


@pytest.mark.parametrize(("stage", "to"), list(itertools.product(Stage, Stage)))
def test_only_transitions_of_the_table_are_possible(stage, to):
    if to in TRANSITIONS[stage]:
        assert gate_of(stage, to) is TRANSITIONS[stage][to]
    else:
        with pytest.raises(LifecycleError, match=f"{stage.name}.*{to.name}"):
            gate_of(stage, to)


def test_all_eleven_stages_are_in_the_table():
    assert set(TRANSITIONS) == set(Stage)
    assert len(Stage) == 12  # the eleven and UNKNOWN


@pytest.mark.parametrize("blueprint", [b.id for b in CATALOG.query(SIGNATURE).candidates if b.id != "BP001"])
def test_a_birth_changes_no_output_and_the_newborn_learns_at_once(blueprint):
    garden = plant(blueprint=blueprint_number(blueprint))
    garden.model.eval()
    inputs, targets = batch()
    before = garden.model(inputs)
    garden.before_step(0)
    assert garden.slots[0].stage is Stage.TRAINING
    assert torch.equal(garden.model(inputs), before)
    isolation.shadow_step(garden.model, garden.switch, garden.seeds, inputs, targets, F.cross_entropy, seed=0)
    branch = garden.slots[0].seed.branch
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in branch.parameters())
    assert all(p.grad is None for p in garden.model.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_host_path_stays_open_and_the_branch_gives_the_host_no_gradient(alpha):
    garden = plant()
    garden.before_step(0)
    garden.model.eval()
    inputs, targets = batch()
    set_stage(garden, Stage.BLENDING, alpha)
    seed = garden.slots[0].seed
    captured = {}
    handle = garden.model.head.register_full_backward_hook(lambda _m, gin, _o: captured.update(h=gin[0]))
    loss = F.cross_entropy(garden.model(inputs), targets)
    loss.backward()
    handle.remove()
    first = garden.model.body[0].weight
    assert first.grad.abs().max() > 0
    # The gradient at the slot's output goes to the host unchanged: as if the branch were a constant.
    h = garden.model.body(inputs) if alpha == 0.0 else _without_hook(garden, inputs)
    h.backward(captured["h"][:, :, None, None].expand_as(h) / 36)
    expected = first.grad.clone() / 2  # the second backward added the same once more
    first.grad = None
    F.cross_entropy(garden.model(inputs), targets).backward()
    torch.testing.assert_close(first.grad, expected)
    if alpha > 0:
        assert all(p.grad.abs().max() > 0 for p in seed.branch.parameters())


def _without_hook(garden, inputs):
    garden.switch.off = frozenset({garden.slots[0].seed.number})
    try:
        return garden.model.body(inputs)
    finally:
        garden.switch.off = frozenset()


def test_a_fossil_and_its_host_train_as_one():
    garden = plant()
    garden.before_step(0)
    inputs, targets = batch()
    garden.model.eval()
    set_stage(garden, Stage.PROBATIONARY, 1.0)
    before = garden.model(inputs)
    garden.slots[0].seed.evidence = {"gain": 1.0, "gain_error": 0.1, "loss": 1.0, "loss_before": 1.0}
    garden.epoch += 1
    assert garden.apply(command(SeedOperation.FOSSILIZE)) == ""
    assert torch.equal(garden.model(inputs), before)
    F.cross_entropy(garden.model(inputs), targets).backward()
    assert any("esper_grown" in name for name, p in garden.model.named_parameters() if p.grad is not None)


def test_a_culled_seed_leaves_the_output_as_it_was_and_the_slot_wakes_up_after_its_embargo():
    garden = plant(SeedConfig(embargo_epochs=1))
    garden.model.eval()
    inputs, _ = batch()
    before = garden.model(inputs)
    garden.before_step(0)
    set_stage(garden, Stage.BLENDING, 1.0)
    assert not torch.equal(garden.model(inputs), before)
    assert garden.apply(command(SeedOperation.CULL)) == ""
    assert torch.equal(garden.model(inputs), before)
    stages = []
    for epoch in range(1, 5):
        garden.close_epoch(epoch, step=epoch, steps_per_epoch=1, loss=1.0, measured={})
        stages.append(garden.slots[0].stage)
    assert stages[0] is Stage.EMBARGOED
    assert stages[-1] is Stage.DORMANT
    assert not garden.trainer.adopted
    assert garden.apply(command(SeedOperation.GERMINATE, blueprint=9)) == ""


def test_a_block_without_parameters_can_be_isolated_and_does_not_pass_g1():
    garden = plant(SeedConfig(max_stage_epochs=1), blueprint=1)
    garden.before_step(0)
    inputs, targets = batch()
    loss = F.cross_entropy(garden.model(inputs), targets)
    loss.backward()
    garden.train_isolated(0, inputs, targets, F.cross_entropy, loss, watch=True)
    garden.close_epoch(1, step=1, steps_per_epoch=1, loss=1.0, measured={})
    assert garden.slots[0].stage is Stage.CULLED


def test_the_monitor_is_silent_on_a_clean_seed_and_fires_on_a_planted_leak():
    garden = plant(SeedConfig(monitor_every=1, shadow_share=1.0))
    garden.before_step(0)
    inputs, targets = batch()

    def step(number: int) -> None:
        garden.model.zero_grad()
        loss = F.cross_entropy(garden.model(inputs), targets)
        loss.backward()
        assert garden.shadow_due(number) == "watched"
        garden.train_isolated(number, inputs, targets, F.cross_entropy, loss, watch=True)

    garden.model.dropout.p = 0.0
    for number in range(5):
        step(number)
    assert garden.checks == 5
    assert garden.violations == 0
    branch = garden.slots[0].seed.branch
    shared = garden.model.body[0].weight
    # The leak: the seed computes with a weight of the host.
    leak = branch.forward
    branch.forward = lambda h: leak(h) * (1 + shared.mean())
    for number in range(5, 8):
        step(number)
    events = [event for event in garden.drain_events() if event["kind"] == "isolation"]
    assert len(events) == 3
    assert garden.slots[0].stage is Stage.CULLED


def test_an_unknown_blueprint_or_too_many_parameters_are_refused_with_their_reason():
    garden = Garden(
        Host(), SLOTS, SeedConfig(), inprocess.LocalKernels(), Loop(), run_seed=0, max_parameters=1000, lockstep=True
    )
    assert "no blueprint" in garden.apply(command(SeedOperation.GERMINATE, blueprint=499))
    assert "1000 of run.max_parameters" in garden.apply(command(SeedOperation.GERMINATE, blueprint=9))
    assert garden.slots[0].stage is Stage.DORMANT
    assert [event["kind"] for event in garden.drain_events()].count("refusal") == 2


@pytest.mark.parametrize("gate", list(gates.GATES))
def test_missing_evidence_denies(gate):
    verdict = gates.GATES[gate]({}, SeedConfig())
    assert not verdict.passed
    assert "no evidence" in verdict.reason


GOOD = {
    Gate.G0_SANITY: {"digest_known": True, "shape_kept": True, "birth_change": 0.0, "dead_parameters": 0},
    Gate.G1_GRADIENT_HEALTH: {"norms": [1.0] * 9, "advantages": [-1.0] * 3 + [0.0] * 3 + [1.0] * 3, "violations": 0},
    Gate.G2_STABILITY: {"alpha": 1.0, "loss_before": 1.0, "losses": [1.1, 0.9], "moves": [0.1, 0.5, 0.4]},
    Gate.G3_INTERFACE: {"cosine": 0.9, "scale": 1.2, "shift": 0.1, "gain": 0.1},
    Gate.G4_SYSTEM_IMPACT: {"gain": 0.1, "gain_error": 0.01, "loss": 0.9, "loss_before": 1.0},
    Gate.G5_RESET: {"leftovers": 0},
}
BAD = [
    (Gate.G0_SANITY, {"digest_known": False}, "digest"),
    (Gate.G0_SANITY, {"shape_kept": False}, "shape"),
    (Gate.G0_SANITY, {"birth_change": 0.1}, "changes"),
    (Gate.G0_SANITY, {"dead_parameters": 2}, "no gradient"),
    (Gate.G1_GRADIENT_HEALTH, {"norms": [1.0] * 8 + [float("nan")]}, "finite"),
    (Gate.G1_GRADIENT_HEALTH, {"norms": [0.0] * 9}, "vanished"),
    (Gate.G1_GRADIENT_HEALTH, {"norms": [1e6] * 9}, "exploded"),
    (Gate.G1_GRADIENT_HEALTH, {"advantages": [1.0] * 3 + [0.0] * 3 + [-1.0] * 3}, "does not fall"),
    (Gate.G1_GRADIENT_HEALTH, {"violations": 1}, "violations"),
    (Gate.G2_STABILITY, {"alpha": 0.5}, "alpha"),
    (Gate.G2_STABILITY, {"losses": [2.0]}, "rose"),
    (Gate.G2_STABILITY, {"losses": [1.0, float("nan")]}, "loss is not finite"),
    (Gate.G2_STABILITY, {"moves": [0.1, 60.0, 0.1]}, "output moved"),
    (Gate.G2_STABILITY, {"moves": [0.1, float("nan"), 0.1]}, "output is not finite"),
    (Gate.G3_INTERFACE, {"cosine": 0.0}, "turned away"),
    (Gate.G3_INTERFACE, {"scale": 9.0}, "scale"),
    (Gate.G3_INTERFACE, {"shift": 9.0}, "mean"),
    (Gate.G4_SYSTEM_IMPACT, {"gain": 0.005}, "within"),
    (Gate.G4_SYSTEM_IMPACT, {"gain": -0.5}, "within"),
    (Gate.G4_SYSTEM_IMPACT, {"loss": 2.0}, "risen"),
    (Gate.G4_SYSTEM_IMPACT, {"loss": float("nan")}, "risen"),
    (Gate.G5_RESET, {"leftovers": 1}, "remain"),
]


@pytest.mark.parametrize("gate", list(GOOD))
def test_good_evidence_passes(gate):
    verdict = gates.GATES[gate](GOOD[gate], SeedConfig())
    assert verdict.passed, verdict.reason
    assert verdict.evidence


@pytest.mark.parametrize(("gate", "change", "reason"), BAD)
def test_each_kind_of_bad_evidence_is_refused_by_its_reason(gate, change, reason):
    verdict = gates.GATES[gate]({**GOOD[gate], **change}, SeedConfig())
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_alpha_rises_from_exactly_0_to_exactly_1(schedule):
    ramp = [alpha_at(schedule, k / 100) for k in range(101)]
    assert ramp[0] == 0.0
    assert ramp[-1] == 1.0
    assert all(b >= a for a, b in itertools.pairwise(ramp))
    assert max(b - a for a, b in itertools.pairwise(ramp)) < 0.05
