"""The life of a seed, complete: every stage with every event."""

from __future__ import annotations

import itertools

import pytest
import torch

from esper_ray import config as configuration
from esper_ray.contracts.enums import BlendMode, CommandType
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.enums import SeedOperation as Operation
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.errors import ConfigError, LifecycleError
from esper_ray.kasmina.lifecycle import HOLDABLE, LIFE, LIVE, TRANSITIONS, least_stay
from tests.unit.kasmina_world import BLUEPRINT, CONFIG, STAGES, STEPS, WORTHLESS, WORTHY, Life, walk


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
