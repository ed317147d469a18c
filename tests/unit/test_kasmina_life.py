"""The life of a seed, complete: every stage with every event, and that nothing jumps on the way."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import SeedConfig
from esper_ray.contracts.enums import BlendMode, CommandType
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation as Operation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.errors import ConfigError, KernelError, LifecycleError
from esper_ray.kasmina import snapshot
from esper_ray.kasmina.advance import SeedMeasurement
from esper_ray.kasmina.blending import MODES, SCHEDULES
from esper_ray.kasmina.garden import Garden
from esper_ray.kasmina.lifecycle import HOLDABLE, LIFE, LIVE, TRANSITIONS, least_stay

BLUEPRINT = 4
STEPS = 6
SIGNATURES = {
    "conv": SlotSignature("conv", (8, 5, 5)),
    "sequence": SlotSignature("sequence", (6, 8)),
    "vector": SlotSignature("vector", (8,)),
}
STAGES = [stage for stage in Stage if stage is not Stage.UNKNOWN]
WORTHY = SeedMeasurement(gain=0.1, gain_error=0.01, cosine=0.9, scale=1.1, shift=0.0)
WORTHLESS = SeedMeasurement(gain=-1.0, gain_error=0.01, cosine=-0.9, scale=90.0, shift=9.0)
HEALTHY = {"norms": [1.0] * 9, "advantages": [-1.0] * 3 + [0.0] * 3 + [1.0] * 3, "violations": 0}


class Host(nn.Module):
    """A classifier with one slot behind ``body``; the input has the slot's own shape."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Conv2d(8, 8, 3, padding=1) if kind == "conv" else nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).relu()
        h = h.mean((2, 3)) if self.kind == "conv" else h
        return self.head(h)


class Loop:
    """The least a garden asks of its trainer; ``dirty`` things of a culled seed remain."""

    dirty = 0

    def adopt(self, seed):
        pass

    def release(self, seed):
        pass

    def fossilise(self, seed):
        pass

    def leftovers(self, seed):
        return self.dirty

    def foreign_groups(self, seed):
        return []

    def keep_checkpoint(self):
        return None

    def planned_graft(self, seed):
        return None

    def record_graft(self, seed, step):
        pass


MADE = inprocess.LocalKernels()


class Source:
    """Kernels that come, fail, or are still on their way, as the test says."""

    def __init__(self) -> None:
        self.state = "coming"

    def fetch(self, spec):
        self.spec = spec
        return self

    def wait(self, timeout):
        if self.state == "failed":
            raise KernelError("The forge could not build it.")
        return MADE.fetch(self.spec).wait(None) if self.state == "there" else None


CONFIG = SeedConfig(
    training_epochs=2,
    blending_epochs=2,
    shadowing_epochs=2,
    probation_epochs=2,
    max_stage_epochs=4,
    embargo_epochs=2,
    output_move=1000.0,
)


class Life:
    """One garden with one slot, moved on by what really moves it."""

    def __init__(self, kind: str = "conv", mode: str = "residual", schedule: str = "linear") -> None:
        torch.manual_seed(0)
        self.source, self.loop = Source(), Loop()
        config = CONFIG.model_copy(update={"blend_mode": mode, "blend_schedule": schedule})
        self.garden = Garden(
            Host(kind), (SlotInfo(0, "body", SIGNATURES[kind]),), config, self.source, self.loop,
            run_seed=3, max_parameters=10**6, lockstep=False,
        )  # fmt: skip
        self.garden.model.eval()
        self.inputs = torch.randn(6, *SIGNATURES[kind].shape, generator=torch.Generator().manual_seed(5))
        self.slot, self.step, self.epoch = self.garden.slots[0], 0, 0
        self.end_epoch()

    @property
    def stage(self) -> Stage:
        assert self.slot.seed is None or self.slot.seed.stage is self.slot.stage
        return self.slot.stage

    @property
    def alpha(self) -> float:
        return self.slot.seed.alpha if self.slot.seed else 0.0

    def output(self) -> torch.Tensor:
        with torch.no_grad():
            return self.garden.model(self.inputs)

    def order(self, operation: Operation) -> str:
        directive = SeedDirective(operation, blueprint=BLUEPRINT)
        return self.garden.apply(
            AdaptationCommand(1, CommandType.SEED, "r", self.epoch, 0, "test", seed_directive=directive)
        )

    def steps(self, count: int = STEPS) -> None:
        for _ in range(count):
            self.garden.before_step(self.step)
            self.output()
            self.step += 1

    def end_epoch(self, measurement: SeedMeasurement | None = None, loss: float = 1.0) -> None:
        self.epoch += 1
        measured = {self.slot.seed.number: measurement} if self.slot.seed and measurement else {}
        self.garden.close_epoch(self.epoch, step=self.step, steps_per_epoch=STEPS, loss=loss, measured=measured)

    def prove(self, evidence: str = "good") -> None:
        """Lay before the gate of this stage what the word says."""
        seed = self.slot.seed
        self.loop.dirty = int(evidence != "good")
        if seed is None:
            return
        if evidence == "none":
            seed.evidence = {}
        elif self.stage is Stage.TRAINING:
            seed.evidence = {**HEALTHY, "violations": int(evidence == "bad")}
        elif evidence == "bad" and self.stage is Stage.BLENDING:
            seed.alpha = 0.5

    def spend(self, epochs: int) -> None:
        """Let the stage look as if ``epochs`` of it had passed when the next one ends."""
        if self.slot.seed is not None:
            self.slot.seed.stage_epoch = self.garden.epoch - epochs + 1
        else:
            self.slot.embargo_until = self.epoch + 1 + least_stay(self.stage, CONFIG) - epochs


ROAD = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED)


def walk(life: Life, to: Stage) -> Life:
    """Lead a seed from DORMANT to a stage, by orders, kernels, steps and epochs."""
    while life.stage is not to:
        advance(life, to)
    life.garden.drain_events()
    return life


def advance(life: Life, to: Stage) -> None:
    stage = life.stage
    if stage is Stage.DORMANT:
        assert life.order(Operation.CANCEL if to is Stage.TERMINATED else Operation.GERMINATE) == ""
    elif stage is Stage.GERMINATED:
        life.source.state = "there"
        life.garden.before_step(life.step)
    elif stage is Stage.TRAINING and to in (Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING):
        assert life.order(Operation.CULL) == ""
    elif stage in (Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING):
        life.steps()
        life.prove()
        life.end_epoch(WORTHY)
    elif stage is Stage.PROBATIONARY:
        for _ in range(CONFIG.probation_epochs):
            life.end_epoch(WORTHY)
        assert life.order(Operation.FOSSILIZE) == ""
    else:
        life.loop.dirty = 1
        life.end_epoch()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_reached_by_what_really_moves_a_seed(stage):
    assert walk(Life(), stage).stage is stage


def test_a_fossil_can_be_terminated_too_and_its_block_stays_in_the_model():
    life = walk(Life(), Stage.FOSSILIZED)
    before = life.output()
    assert life.order(Operation.CANCEL) == ""
    assert life.stage is Stage.TERMINATED
    assert torch.equal(life.output(), before)
    assert any(name.startswith("esper_grown.") for name in life.garden.model.state_dict())


@pytest.mark.parametrize(("stage", "to"), list(itertools.product(STAGES, Stage)))
def test_a_transition_that_the_table_lacks_raises_with_both_names_and_changes_nothing(stage, to):
    life = walk(Life(), stage)
    if to in TRANSITIONS[stage]:
        life.garden.enter(life.slot, to, "test")
        assert life.slot.stage is to
    else:
        with pytest.raises(LifecycleError, match=f"{stage.name}.*{to.name}"):
            life.garden.enter(life.slot, to, "test")
        assert life.stage is stage
        assert life.garden.drain_events() == []


# What an event does in a stage; whatever is not here leaves the stage as it is.
PASSES, REFUSES, BLIND = "gate passes", "gate refuses", "gate has no evidence"
SHORT, LONG = "stay too short", "stay too long"
ARRIVES, FAILS = "kernel arrives", "kernel fails"
EPOCH_ENDS = (PASSES, REFUSES, BLIND, SHORT, LONG)
EVENTS = (*Operation, ARRIVES, FAILS, *EPOCH_ENDS)
EFFECT = {
    (Stage.DORMANT, Operation.GERMINATE): Stage.GERMINATED,
    (Stage.DORMANT, Operation.CANCEL): Stage.TERMINATED,
    (Stage.GERMINATED, Operation.CANCEL): Stage.CULLED,
    (Stage.GERMINATED, ARRIVES): Stage.TRAINING,
    (Stage.GERMINATED, FAILS): Stage.CULLED,
    (Stage.TRAINING, Operation.START_GRAFTING): Stage.BLENDING,
    (Stage.TRAINING, PASSES): Stage.BLENDING,
    (Stage.BLENDING, PASSES): Stage.SHADOWING,
    (Stage.SHADOWING, Operation.EVALUATE): Stage.PROBATIONARY,
    (Stage.SHADOWING, PASSES): Stage.PROBATIONARY,
    (Stage.PROBATIONARY, Operation.FOSSILIZE): Stage.FOSSILIZED,
    (Stage.FOSSILIZED, Operation.CANCEL): Stage.TERMINATED,
    **{(stage, Operation.CULL): Stage.CULLED for stage in (Stage.GERMINATED, Stage.TRAINING, *LIVE)},
    **{(stage, LONG): Stage.CULLED for stage in (Stage.GERMINATED, Stage.TRAINING, *LIVE)},
    **{(Stage.CULLED, each): Stage.EMBARGOED for each in EPOCH_ENDS},
    (Stage.EMBARGOED, PASSES): Stage.DORMANT,
    **{(Stage.EMBARGOED, each): Stage.RESETTING for each in (REFUSES, BLIND, LONG)},
    (Stage.RESETTING, PASSES): Stage.DORMANT,
    (Stage.RESETTING, SHORT): Stage.DORMANT,  # its least stay is none
}
HELD = {(stage, Operation.STABILIZE) for stage in HOLDABLE}


def happen(life: Life, event) -> str:
    """Let an event come about; for an order, why it was refused."""
    if isinstance(event, Operation):
        life.prove()
        life.spend(least_stay(life.stage, CONFIG) + 1)
        if life.slot.seed and life.stage in LIVE:
            life.slot.seed.evidence.update(gain=0.1, gain_error=0.01, cosine=0.9, scale=1.0, shift=0.0, loss=1.0)
        return life.order(event)
    if event in (ARRIVES, FAILS):
        life.source.state = "there" if event == ARRIVES else "failed"
        life.garden.before_step(life.step)
        return ""
    if life.stage is Stage.BLENDING:
        life.steps(2 * STEPS)
    life.prove({PASSES: "good", SHORT: "good", REFUSES: "bad", BLIND: "none", LONG: "bad"}[event])
    least = least_stay(life.stage, CONFIG)
    life.spend({SHORT: least - 1, LONG: CONFIG.max_stage_epochs}.get(event, least))
    good = event in (PASSES, SHORT)
    life.end_epoch(None if event == BLIND else WORTHY if good else WORTHLESS)
    return ""


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name if isinstance(event, Operation) else event)
@pytest.mark.parametrize("stage", STAGES)
def test_what_each_event_does_in_each_stage(stage, event):
    life = walk(Life(), stage)
    reason = happen(life, event)
    effect = EFFECT.get((stage, event))
    assert life.stage is (effect or stage)
    events = life.garden.drain_events()
    if isinstance(event, Operation):
        refused = [each for each in events if each["kind"] == "refusal"]
        assert bool(reason) is bool(refused) is (effect is None and (stage, event) not in HELD)
        assert all(stage.name in each["reason"] and each["operation"] == event.name for each in refused)
    if event in (REFUSES, BLIND) and LIFE[stage].follows and stage is not Stage.CULLED:
        (verdict,) = [each for each in events if each["kind"] == "gate"]
        assert not verdict["passed"]
        assert verdict["reason"]
        # A reset asks what remains, and that can always be counted.
        assert ("no evidence" in verdict["reason"]) is (event == BLIND and life.slot.seed is not None)


@pytest.mark.parametrize("evidence", ["bad", "none"])
def test_a_fossil_wants_evidence_and_a_refused_order_says_which_was_missing_or_wrong(evidence):
    life = walk(Life(), Stage.PROBATIONARY)
    life.spend(3)
    if evidence == "none":
        life.slot.seed.evidence = {}
    else:
        life.end_epoch(WORTHLESS)
    reason = life.order(Operation.FOSSILIZE)
    assert ("no evidence" if evidence == "none" else "within") in reason
    assert life.stage is Stage.PROBATIONARY


@pytest.mark.parametrize(
    ("stage", "order"),
    [
        (Stage.TRAINING, Operation.START_GRAFTING),
        (Stage.SHADOWING, Operation.EVALUATE),
        (Stage.PROBATIONARY, Operation.FOSSILIZE),
    ],
)
def test_an_order_does_not_shorten_the_least_stay(stage, order):
    life = walk(Life(), stage)
    life.prove()
    assert "of at least 2 epochs" in life.order(order)
    assert life.stage is stage


def test_a_held_seed_stays_and_its_ramp_stands_still_until_the_next_boundary():
    life = walk(Life(), Stage.BLENDING)
    life.steps(3)
    alpha, before = life.alpha, life.output()
    assert life.order(Operation.STABILIZE) == ""
    life.steps()
    assert life.alpha == alpha
    assert torch.equal(life.output(), before)
    life.end_epoch(WORTHY)
    life.steps(1)
    assert life.alpha == pytest.approx(alpha + 1 / (2 * STEPS))


def test_the_longest_stay_counts_on_while_a_seed_is_held():
    life = walk(Life(), Stage.TRAINING)
    for _ in range(CONFIG.max_stage_epochs):
        life.order(Operation.STABILIZE)
        life.prove()
        life.end_epoch()
    assert life.stage is Stage.CULLED


def test_a_repeat_offender_rests_twice_as_long_each_time():
    life, rests = Life(), []
    for _ in range(3):
        walk(life, Stage.TRAINING)
        life.order(Operation.CULL)
        life.loop.dirty = 0
        began = life.epoch
        while life.stage is not Stage.DORMANT:
            life.end_epoch()
        rests.append(life.epoch - began - 1)
    assert rests == [2, 4, 8]


def test_a_slot_that_cannot_be_cleaned_is_asked_again_after_each_epoch():
    life = walk(Life(), Stage.RESETTING)
    for _ in range(3):
        life.end_epoch()
    refused = [event for event in life.garden.drain_events() if event["kind"] == "gate"]
    assert [event["passed"] for event in refused] == [False] * 3
    life.loop.dirty = 0
    life.end_epoch()
    assert life.stage is Stage.DORMANT


def test_single_stages_can_have_a_longest_stay_of_their_own():
    life = walk(Life(), Stage.TRAINING)
    life.garden.config = CONFIG.model_copy(update={"longest_stay": {"training": 7}})
    for _ in range(6):
        life.prove("bad")
        life.end_epoch()
    assert life.stage is Stage.TRAINING
    life.end_epoch()
    assert life.stage is Stage.CULLED


@pytest.mark.parametrize("setting", ["seeds.training_epochs=9", "seeds.longest_stay={blending: 1}"])
def test_stays_that_no_seed_could_survive_are_refused(setting):
    with pytest.raises(ConfigError, match="would be culled"):
        configuration.load(None, [setting, "seeds.blending_epochs=2"])


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


def test_the_directive_chooses_the_mode_and_the_schedule_else_the_configuration_does():
    for given, schedule, expected in (
        (BlendMode.UNKNOWN, "", (BlendMode.CHANNEL, "cosine")),
        (BlendMode.CONVEX, "sigmoid", (BlendMode.CONVEX, "sigmoid")),
    ):
        life = Life("conv", "channel", "cosine")
        directive = SeedDirective(Operation.GERMINATE, BLUEPRINT, blend_mode=given, blend_schedule=schedule)
        order = AdaptationCommand(1, CommandType.SEED, "r", 0, 0, "test", seed_directive=directive)
        assert life.garden.apply(order) == ""
        assert (life.slot.seed.mode, life.slot.seed.schedule) == expected


def test_an_unknown_schedule_and_a_lack_of_memory_are_refused_by_g0(monkeypatch):
    life = Life()
    directive = SeedDirective(Operation.GERMINATE, BLUEPRINT, blend_schedule="zigzag")
    order = AdaptationCommand(1, CommandType.SEED, "r", 0, 0, "test", seed_directive=directive)
    assert "zigzag" in life.garden.apply(order)
    monkeypatch.setattr("esper_ray.kasmina.orders._free_bytes", lambda device: 100)
    assert "are free" in life.order(Operation.GERMINATE)
    assert life.stage is Stage.DORMANT
