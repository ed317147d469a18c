"""Risk holds back what may be decided, level by level, and asks a damaged run to go back: each level is caused here."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CommandType, EmergencyLevel, RiskLevel, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import HardwareContext, SeedState, SystemState
from esper_ray.contracts.ports import Candidate, RunOpening, SlotInfo, SlotSignature
from esper_ray.contracts.signing import Signer, Verifier, load_keys
from esper_ray.reliability.clock import ManualClock
from esper_ray.tamiyo import risk
from esper_ray.tamiyo.brains import ScriptedBrain
from esper_ray.tamiyo.controller import STATISTICS_TYPE, Tamiyo
from esper_ray.tamiyo.heuristic import CONTROLLERS
from esper_ray.tamiyo.risk import Signal
from esper_ray.tolaria.measure import Quality
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

SLOTS = tuple(SlotInfo(i, f"stage{i}", SlotSignature("conv", (16, 8, 8))) for i in range(3))
CANDIDATES = tuple(Candidate(slot, 9, "family", 4000, 40000) for slot in range(3))
# It wants to grow in every free slot at each boundary from the fourth on.
EAGER = {"plateau_rate": 100.0, "onset": 0.0, "warmup_epochs": 1, "latest_growth": 0.9}


def state(epoch, loss=1.0, seeds=(), **changes):
    given = {"run": "r", "epoch": epoch, "global_step": 10 * epoch, "timestamp_ns": 1, "training_loss": loss}
    given |= {"validation_loss": loss, "validation_accuracy": 0.5, "seeds": tuple(seeds)}
    return SystemState(**{**given, **changes})


class Desk:
    """A Tamiyo on a clock that stands still unless an answer is made to take time."""

    def __init__(self, home, **changes):
        self.clock = ManualClock()
        self.keys = load_keys(home / "keys")
        self.signer, self.verifier = Signer(self.keys, "tolaria", clock=self.clock), None
        self.events = []
        self.tamiyo = Tamiyo(self.keys, journal=home / "t.db", publisher=self, home=home, clock=self.clock)
        settings = {**EAGER, **changes.pop("settings", {})}
        given = {"run": "r", "seed": 1, "slots": SLOTS, "candidates": CANDIDATES, "controller": "auto", "epochs": 40}
        given |= {"host_parameters": 1000, "max_parameters": 10**6, "settings": settings}
        self.opening = RunOpening(**{**given, **changes})
        self.tamiyo.open_run(self.opening)

    def publish(self, kind, payload, **_):
        if kind is BusMessageType.TELEMETRY:
            self.events += codec.decode_telemetry(payload).events

    def decide(self, given, gradient=None):
        told = [("SystemStatePacket", packet) for packet in codec.encode_state(given)]
        if gradient is not None:
            told.append((STATISTICS_TYPE, np.full((2, 3), gradient, np.float32).tobytes()))
        kind = BusMessageType.SYSTEM_STATE
        answer = self.tamiyo.decide("r", [self.signer.seal(d, kind, payload_type=name) for name, d in told])
        verifier = Verifier(self.keys, clock=self.clock)
        return [codec.decode_command(verifier.open_direct(data).payload) for data in answer]

    def calm(self, epochs=4, **given):
        for epoch in range(1, epochs + 1):
            self.decide(state(epoch, **given))
        return epochs + 1

    @property
    def risk(self):
        return self.tamiyo._history.views["r"].risk


def kinds(commands):
    return [(each.type, each.seed_directive.operation if each.seed_directive else None) for each in commands]


GROW = (CommandType.SEED, SeedOperation.GERMINATE)


def test_a_calm_run_is_green_and_may_do_all_that_is_legal(tmp_path):
    desk = Desk(tmp_path)
    commands = desk.decide(state(desk.calm()))
    assert desk.risk.level is RiskLevel.GREEN
    assert kinds(commands) == [GROW] * 3
    assert all("risk" not in command.annotations for command in commands)


def test_yellow_softens_to_one_germination_and_says_which_signal_and_threshold(tmp_path):
    desk = Desk(tmp_path)
    commands = desk.decide(state(desk.calm(), loss=1.75))
    assert desk.risk.level is RiskLevel.YELLOW
    assert kinds(commands) == [GROW]
    assert commands[0].annotations["risk"].startswith("YELLOW 0.")
    assert ">= 0.3, performance: loss 1.75 is 1.8x its median" in desk.risk.why


def test_orange_falls_back_to_the_heuristic_and_nothing_germinates(tmp_path):
    desk = Desk(tmp_path)
    policy = ScriptedBrain("a-policy", CONTROLLERS["heuristic"])
    desk.tamiyo.seat.current = policy
    epoch = desk.calm()
    assert desk.decide(state(epoch))[0].issued_by == "a-policy"
    seeds = [SeedState(1, 0, 9, Stage.PROBATIONARY, alpha=1.0, metrics={"g": 0.5, "ge": 0.01})]
    desk.decide(state(epoch + 1, seeds=seeds))
    commands = desk.decide(state(epoch + 2, loss=2.3, seeds=seeds))
    assert desk.risk.level is RiskLevel.ORANGE
    assert kinds(commands) == [(CommandType.SEED, SeedOperation.FOSSILIZE)], "what is under way is tended"
    assert commands[0].issued_by == "heuristic"


def test_red_decides_nothing_and_asks_to_go_back_to_the_last_calm_epoch(tmp_path):
    desk = Desk(tmp_path)
    epoch = desk.calm()
    commands = desk.decide(state(epoch, loss=3.0))
    assert desk.risk.level is RiskLevel.RED
    assert kinds(commands) == [(CommandType.NO_OP, None), (CommandType.ROLLBACK, None)]
    assert commands[1].rollback.epoch == epoch - 1
    assert commands[1].issued_by == "risk"
    assert "RED" in commands[0].annotations["risk"]


def test_red_asks_for_a_pause_where_the_user_wants_that(tmp_path):
    desk = Desk(tmp_path, settings={"on_red": "pause"})
    commands = desk.decide(state(desk.calm(), loss=3.0))
    assert kinds(commands) == [(CommandType.NO_OP, None), (CommandType.PAUSE, None)]
    assert commands[1].pause.paused


def test_critical_is_an_emergency_as_well(tmp_path):
    desk = Desk(tmp_path)
    commands = desk.decide(state(desk.calm(), loss=5.0))
    assert desk.risk.level is RiskLevel.CRITICAL
    assert [kind for kind, _ in kinds(commands)] == [CommandType.NO_OP, CommandType.EMERGENCY, CommandType.ROLLBACK]
    assert commands[1].emergency.level is EmergencyLevel.CONSERVATIVE
    assert "performance" in commands[1].emergency.reason


def test_red_again_soon_after_going_back_is_critical_and_does_not_go_back_again(tmp_path):
    desk = Desk(tmp_path)
    epoch = desk.calm(6)
    desk.decide(state(epoch, loss=3.0))
    desk.tamiyo.open_run(replace(desk.opening, epoch=epoch - 1, branch=1))
    assert desk.risk.level is RiskLevel.GREEN, "what was undone is no risk"
    commands = desk.decide(state(epoch, loss=3.0, branch=1))
    assert desk.risk.level is RiskLevel.CRITICAL
    assert [kind for kind, _ in kinds(commands)] == [CommandType.NO_OP, CommandType.EMERGENCY]
    for later in range(epoch + 1, epoch + 6):
        desk.decide(state(later, branch=1))
    commands = desk.decide(state(epoch + 6, loss=3.0, branch=1))
    assert CommandType.ROLLBACK in [kind for kind, _ in kinds(commands)], "after a calm time it may"


def test_a_level_is_left_after_three_boundaries_below_it_and_each_change_is_told(tmp_path):
    desk = Desk(tmp_path)
    epoch = desk.calm()
    desk.decide(state(epoch, loss=2.3))
    levels = []
    for later in range(epoch + 1, epoch + 4):
        desk.decide(state(later))
        levels.append(desk.risk.level)
    assert levels == [RiskLevel.ORANGE, RiskLevel.ORANGE, RiskLevel.GREEN]
    desk.tamiyo.close_run("r")
    told = [(each.attributes["before"], each.attributes["level"]) for each in desk.events if each.kind == "risk"]
    assert told == [("GREEN", "ORANGE"), ("ORANGE", "GREEN")]


def test_what_is_usual_in_a_run_raises_the_threshold_for_it(tmp_path):
    steady, restless = Desk(tmp_path / "a"), Desk(tmp_path / "b")
    for epoch in range(1, 9):
        steady.decide(state(epoch))
        restless.decide(state(epoch, loss=1.0 if epoch % 2 else 2.0))
    steady.decide(state(9, loss=2.3))
    restless.decide(state(9, loss=2.3))
    assert (steady.risk.level, restless.risk.level) == (RiskLevel.ORANGE, RiskLevel.GREEN)


def test_a_trend_is_not_taken_for_restlessness(tmp_path):
    desk = Desk(tmp_path)
    for epoch in range(1, 8):
        desk.decide(state(epoch, loss=2.0 ** (5 - epoch)))
    desk.decide(state(8, loss=1.15))
    assert desk.risk.level is RiskLevel.ORANGE


def test_exploding_gradients_alone_fall_back_and_with_a_rising_loss_are_damage(tmp_path):
    alone, both = Desk(tmp_path / "a"), Desk(tmp_path / "b")
    for desk in (alone, both):
        for epoch in range(1, 6):
            desk.decide(state(epoch), gradient=-2.0)
    alone.decide(state(6), gradient=2.0)
    assert (alone.risk.level, alone.risk.signal) == (RiskLevel.ORANGE, "gradient")
    both.decide(state(6, loss=2.3), gradient=2.0)
    assert both.risk.level is RiskLevel.RED


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_full_memory_falls_back_but_never_rolls_back_and_counts_for_nothing_in_lockstep(tmp_path, lockstep):
    desk = Desk(tmp_path, lockstep=lockstep)
    full = HardwareContext("cpu", 0, 1000.0, 5.0)
    for epoch in range(1, 6):
        commands = desk.decide(state(epoch, hardware=full))
    assert desk.risk.level is (RiskLevel.GREEN if lockstep else RiskLevel.ORANGE)
    assert kinds(commands) == ([GROW] * 3 if lockstep else [(CommandType.NO_OP, None)])


@pytest.mark.parametrize("lockstep", [False, True])
def test_slowness_falls_back_but_never_rolls_back_and_counts_for_nothing_in_lockstep(tmp_path, lockstep):
    desk = Desk(tmp_path, lockstep=lockstep)
    brain = ScriptedBrain("a-policy", CONTROLLERS["heuristic"])
    think = brain.steps

    def slowly(view):
        desk.clock.advance(0.03)
        return think(view)

    brain.steps = slowly
    desk.tamiyo.seat.current = brain
    for epoch in range(1, 7):
        commands = desk.decide(state(epoch))
    assert desk.risk.level is (RiskLevel.GREEN if lockstep else RiskLevel.ORANGE)
    assert commands[0].issued_by == ("a-policy" if lockstep else "heuristic")


def test_seeds_that_are_removed_one_after_the_other_soften(tmp_path):
    desk = Desk(tmp_path)
    epoch = desk.calm()
    desk.decide(state(epoch, seeds=[SeedState(i + 1, i, 9, Stage.TRAINING) for i in range(3)]))
    desk.decide(state(epoch + 1, seeds=[SeedState(0, i, 0, Stage.CULLED) for i in range(3)]))
    assert (desk.risk.level, desk.risk.signal) == (RiskLevel.YELLOW, "lifecycle")


def test_only_damage_leads_beyond_orange():
    found = {name: Signal(1.0, "") for name in risk.WEIGHTS if name not in risk.DAMAGE}
    found |= {name: Signal() for name in risk.DAMAGE}
    assert risk.level_of(found)[0] is RiskLevel.ORANGE
    assert risk.level_of({**found, "performance": Signal(1.0, "")})[0] is RiskLevel.CRITICAL


def test_a_tamiyo_that_was_lost_sees_the_same_risk(tmp_path):
    desk = Desk(tmp_path)
    desk.decide(state(desk.calm(), loss=2.3))
    before = desk.risk
    desk.tamiyo.close()
    desk.tamiyo = Tamiyo(desk.keys, journal=tmp_path / "t.db", publisher=desk, home=tmp_path, clock=desk.clock)
    assert desk.risk == before


def test_risk_can_be_switched_off(tmp_path):
    desk = Desk(tmp_path, settings={"risk": False})
    assert kinds(desk.decide(state(desk.calm(), loss=9.0))) == [GROW] * 3


# In a run


def worsened(home, factor, *settings):
    """A run whose validation loss is ``factor`` times what it is at epoch 5, on its first branch alone."""
    given = ("run.epochs=9", "run.mode=lockstep", "run.keep_checkpoints=20", "tamiyo.controller=never")
    config = configuration.load(None, [f"home={home}", *tiny_runs.SETTINGS, *given, *settings])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    measure = trainer.measure

    def measured() -> Quality:
        quality = measure()
        ill = trainer.epoch == 5 and trainer.garden.branch == 0
        return replace(quality, loss=quality.loss * factor) if ill else quality

    trainer.measure = measured
    return trainer


def lines(trainer, name):
    return [json.loads(line) for line in (trainer.folder / name).read_text().splitlines()]


def test_a_run_at_red_goes_back_by_itself_and_goes_on(tmp_path):
    trainer = worsened(tmp_path, 5.5, "run.epochs=7")
    trainer.run()
    (turn,) = [row for row in lines(trainer, "incidents.jsonl") if row["kind"] == "rollback"]
    assert (turn["origin"], turn["from_epoch"], turn["to"]) == ("risk", 5, 4)
    assert "performance" in turn["reason"]
    assert [row["branch"] for row in lines(trainer, "metrics.jsonl")] == [0] * 4 + [1] * 3


def test_a_run_at_critical_is_conservative_for_a_dwell_and_then_normal_again(tmp_path):
    trainer = worsened(tmp_path, 9.0)
    result = trainer.run()
    assert result["status"] == "finished"
    incidents = lines(trainer, "incidents.jsonl")
    assert "CONSERVATIVE" in [row["level"] for row in incidents if row["kind"] == "emergency"]
    assert [row["to"] for row in incidents if row["kind"] == "rollback"] == [4]
    levels = [row["emergency"] for row in lines(trainer, "metrics.jsonl")]
    assert "CONSERVATIVE" in levels[4:]
    assert levels[-1] == ""


def test_a_run_at_red_waits_for_a_person_where_the_user_wants_that(tmp_path):
    trainer = worsened(tmp_path, 5.5, "tamiyo.on_red=pause")
    trainer.open()
    for _ in range(5):
        trainer.one_epoch()
    assert trainer.orders.paused
    trainer.close()


def test_an_undisturbed_run_never_leaves_green(tmp_path):
    trainer = worsened(tmp_path, 1.0, "run.epochs=7", "tamiyo.controller=heuristic")
    trainer.run()
    assert not (trainer.folder / "incidents.jsonl").exists()
    assert all("risk" not in json.dumps(row).lower() for row in lines(trainer, "events.jsonl"))
