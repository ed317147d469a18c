"""Tamiyo's promises: it grows on a plateau, keeps what helps, removes what harms, and answers the same twice."""

from __future__ import annotations

import math

import pytest

from esper_ray import config as configuration
from esper_ray.config import TamiyoConfig
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CommandType, FieldReportOutcome, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import SeedState, SystemState
from esper_ray.contracts.ports import Candidate, RunOpening, SlotInfo, SlotSignature
from esper_ray.contracts.signing import Signer, Verifier, load_keys
from esper_ray.errors import AuthenticityError, RunError, WrongType
from esper_ray.reliability.clock import ManualClock
from esper_ray.tamiyo.controller import Tamiyo
from esper_ray.tamiyo.heuristic import CONTROLLERS, heuristic, strongest, trend
from esper_ray.tamiyo.view import RunView

SLOTS = tuple(SlotInfo(i, f"stage{i}", SlotSignature("conv", (16, 8, 8))) for i in range(3))
CANDIDATES = tuple(
    Candidate(slot, blueprint, "family", size, size * 10)
    for slot in range(3)
    for blueprint, size in ((2, 32), (9, 4000))
)
CONFIG = TamiyoConfig(plateau_rate=0.1, warmup_epochs=3, window=3, onset=0)


def opening(**changes):
    given = {"run": "r", "seed": 1, "slots": SLOTS, "candidates": CANDIDATES, "controller": "heuristic", "epochs": 20}
    given |= {"host_parameters": 1000, "max_parameters": 10**6, "settings": CONFIG.model_dump()}
    return RunOpening(**{**given, **changes})


def state(epoch, loss=1.0, seeds=(), **changes):
    given = {"run": "r", "epoch": epoch, "global_step": epoch * 10, "timestamp_ns": 1, "training_loss": loss}
    return SystemState(
        **{**given, "validation_loss": loss, "validation_accuracy": 0.5, "seeds": tuple(seeds), **changes}
    )


def seed(stage, gain=None, error=0.01, slot=0, number=1):
    metrics = {} if gain is None else {"g": gain, "ge": error}
    return SeedState(number, slot, 9, stage, alpha=1.0, metrics=metrics)


def view(*states, **changes):
    return RunView(opening(**changes), CONFIG, list(states))


def test_a_falling_loss_is_left_alone_and_a_flat_one_makes_every_free_slot_grow():
    falling = [state(e, math.exp(-0.5 * e)) for e in range(1, 5)]
    assert heuristic(view(*falling), CONFIG) == []
    flat = [state(e, 1.0 - 0.001 * e) for e in range(1, 6)]
    proposals = heuristic(view(*flat), CONFIG)
    assert [(p.operation, p.slot, p.blueprint) for p in proposals] == [
        (SeedOperation.GERMINATE, slot, 9) for slot in range(3)
    ]
    assert "loss falls" in proposals[0].why


def test_a_host_that_still_underfits_when_cheap_growth_ends_grows_and_one_that_overfits_does_not():
    falling = [state(e, math.exp(-0.5 * e)) for e in range(1, 6)]
    assert "underfits at 25%" in heuristic(view(*falling), CONFIG)[0].why
    assert heuristic(view(*falling[:4]), CONFIG) == [], "not yet"
    overfitting = [state(e, math.exp(-0.5 * e), training_loss=0.3 * math.exp(-0.5 * e)) for e in range(1, 6)]
    assert heuristic(view(*overfitting), CONFIG) == []


def test_a_noisy_plateau_is_not_taken_for_a_sure_one():
    noisy = [state(e, loss) for e, loss in enumerate((1.0, 0.5, 1.1, 0.4), start=1)]
    assert heuristic(view(*noisy), CONFIG) == []


def test_who_has_hardly_begun_to_learn_is_on_no_plateau():
    slow = [state(e, loss) for e, loss in enumerate((3.80, 3.79, 3.78, 3.77), start=1)]
    assert heuristic(view(*slow), CONFIG), "the rate alone takes it for one"
    begun = CONFIG.model_copy(update={"onset": 0.1})
    assert heuristic(view(*slow), begun) == []
    flat = [state(e, loss) for e, loss in enumerate((3.80, 2.02, 2.01, 2.00), start=1)]
    assert heuristic(view(*flat), begun)


def test_a_seed_is_removed_for_surely_harming_only():
    for gain, expected in ((-0.021, [SeedOperation.CULL]), (-0.019, [])):
        states = [state(e, math.exp(-e), [seed(Stage.PROBATIONARY, gain)]) for e in (4, 5)]
        assert [p.operation for p in heuristic(view(*states), CONFIG)] == expected, "its error is 0.01"


def test_no_growth_before_the_warm_up_nor_late_in_the_run():
    flat = [state(e) for e in (1, 2)]
    assert heuristic(view(*flat), CONFIG) == []
    late = [state(e) for e in range(14, 19)]
    assert heuristic(view(*late), CONFIG) == []


def test_a_proven_seed_is_fossilised_a_harmful_one_culled_an_unsure_one_watched():
    for gain, expected in ((0.5, SeedOperation.FOSSILIZE), (-0.5, SeedOperation.CULL), (0.001, None)):
        states = [state(e, math.exp(-e), [seed(Stage.PROBATIONARY, gain)]) for e in (4, 5)]
        found = [p.operation for p in heuristic(view(*states), CONFIG)]
        assert found == ([expected] if expected else [])


def test_a_seed_is_watched_for_a_whole_epoch_first():
    states = [state(4, 1.0, [seed(Stage.SHADOWING, 0.5)]), state(5, 0.5, [seed(Stage.PROBATIONARY, 0.5)])]
    assert heuristic(view(*states), CONFIG) == []


def test_the_strongest_block_within_the_budget_is_chosen():
    assert strongest(CANDIDATES[:2], 5000).blueprint == 9
    assert strongest(CANDIDATES[:2], 100).blueprint == 2
    assert strongest(CANDIDATES[:2], 10) is None


def test_the_trend_of_an_exact_exponential_has_no_doubt():
    found = trend([math.exp(-0.2 * k) for k in range(6)])
    assert found.rate == pytest.approx(0.2)
    assert found.highest == pytest.approx(0.2)


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_every_controller_is_a_pure_function_of_the_view(name):
    flat = [state(e) for e in range(1, 9)]
    assert CONTROLLERS[name](view(*flat), CONFIG) == CONTROLLERS[name](view(*flat), CONFIG)


class Desk:
    """A Tamiyo with everything around it."""

    def __init__(self, home, clock=None):
        self.clock = clock or ManualClock()
        self.config = configuration.load(None, [f"home={home}", "tamiyo.plateau_rate=0.1"])
        self.keys = load_keys(home / "keys")
        self.signer = Signer(self.keys, "tolaria", clock=self.clock)
        self.published = []
        self.tamiyo = self.make()

    def make(self):
        return Tamiyo(self.keys, journal=self.config.home / "t.db", publisher=self, clock=self.clock)

    def publish(self, kind, payload, *, event_id=None, **_):
        assert kind is BusMessageType.FIELD_REPORT
        self.published.append((event_id, codec.decode_report(payload)))

    def seal(self, given):
        kind = BusMessageType.SYSTEM_STATE
        return [self.signer.seal(p, kind, payload_type="SystemStatePacket") for p in codec.encode_state(given)]

    def decide(self, given):
        answer = self.tamiyo.decide("r", self.seal(given))
        verifier = Verifier(self.keys, clock=self.clock)
        return [codec.decode_command(verifier.open_direct(data).payload) for data in answer]


def test_no_change_is_a_decision_too(tmp_path):
    desk = Desk(tmp_path)
    desk.tamiyo.open_run(opening())
    assert [command.type for command in desk.decide(state(1))] == [CommandType.NO_OP]


def test_the_same_state_asked_twice_gets_the_same_commands_also_after_a_restart(tmp_path):
    desk = Desk(tmp_path)
    desk.tamiyo.open_run(opening())
    answers = [desk.decide(state(epoch)) for epoch in range(1, 5)]
    assert answers[-1][0].type is CommandType.SEED
    assert desk.decide(state(4)) == answers[-1]
    desk.tamiyo.close()
    desk.tamiyo = desk.make()
    assert desk.decide(state(4)) == answers[-1]
    growing = [SeedState(i + 1, i, 9, Stage.GERMINATED) for i in range(3)]
    assert desk.decide(state(5, seeds=growing))[0].type is CommandType.NO_OP


def test_a_tamiyo_that_was_killed_decides_as_one_that_was_not(tmp_path):
    whole, killed = Desk(tmp_path / "a"), Desk(tmp_path / "b")
    for desk in (whole, killed):
        desk.tamiyo.open_run(opening(slots=SLOTS[:1]))
        for epoch in range(1, 5):
            desk.decide(state(epoch))
        desk.decide(state(5, seeds=[seed(Stage.PROBATIONARY, 0.5)]))
    killed.tamiyo.close()
    killed.tamiyo = killed.make()
    answers = [desk.decide(state(6, seeds=[seed(Stage.PROBATIONARY, 0.5)])) for desk in (whole, killed)]
    assert answers[0] == answers[1]
    assert answers[0][0].seed_directive.operation is SeedOperation.FOSSILIZE
    for desk in (whole, killed):
        desk.tamiyo.close_run("r")
    assert whole.published == killed.published
    assert len(whole.published) == 1


def test_a_run_decides_by_its_own_settings(tmp_path):
    desk = Desk(tmp_path)
    desk.tamiyo.open_run(opening(settings={**CONFIG.model_dump(), "warmup_epochs": 10}))
    assert [desk.decide(state(epoch))[0].type for epoch in range(1, 5)] == [CommandType.NO_OP] * 4


def test_an_unknown_run_and_a_replayed_state_are_refused(tmp_path):
    desk = Desk(tmp_path)
    with pytest.raises(RunError, match="does not know"):
        desk.decide(state(1))
    desk.tamiyo.open_run(opening())
    sealed = desk.seal(state(1))
    desk.tamiyo.decide("r", sealed)
    with pytest.raises(AuthenticityError) as caught:
        desk.tamiyo.decide("r", sealed)
    assert caught.value.reason == "nonce_replayed"


def test_a_state_that_says_it_is_something_else_is_refused(tmp_path):
    desk = Desk(tmp_path)
    desk.tamiyo.open_run(opening())
    (packet,) = codec.encode_state(state(1))
    for kind, name in (
        (BusMessageType.ADAPTATION_COMMAND, "SystemStatePacket"),
        (BusMessageType.ALERT, "TelemetryPacket"),
    ):
        with pytest.raises(WrongType):
            desk.tamiyo.decide("r", [desk.signer.seal(packet, kind, payload_type=name)])


@pytest.mark.parametrize(
    ("gain", "outcome"),
    [
        (0.5, FieldReportOutcome.SUCCESS),
        (-0.5, FieldReportOutcome.REGRESSION),
        (0.001, FieldReportOutcome.NEUTRAL),
        (None, FieldReportOutcome.ABORTED),
    ],
)
def test_each_germination_is_reported_once_with_what_it_led_to(tmp_path, gain, outcome):
    desk = Desk(tmp_path)
    desk.tamiyo.open_run(opening(slots=SLOTS[:1]))
    for epoch in range(1, 5):
        commands = desk.decide(state(epoch))
    for epoch in range(5, 9):
        culled = SeedState(1 if epoch == 5 else 0, 0, 9, Stage.TRAINING if epoch == 5 else Stage.EMBARGOED)
        desk.decide(state(epoch, seeds=[seed(Stage.PROBATIONARY, gain) if gain is not None else culled]))
    desk.tamiyo.close_run("r")
    desk.tamiyo.close_run("r")
    reports = [report for _, report in desk.published if report.command_id == commands[0].command_id]
    assert [report.outcome for report in reports] == [outcome]
    assert reports[0].blueprint == 9
    assert reports[0].window_epochs == (3 if gain is not None else 0)


def test_a_germination_that_never_took_effect_is_not_reported(tmp_path):
    desk = Desk(tmp_path)
    desk.tamiyo.open_run(opening(slots=SLOTS[:1], settings={**CONFIG.model_dump(), "latest_growth": 0.2}))
    assert [desk.decide(state(epoch))[0].type for epoch in range(1, 5)][-1] is CommandType.SEED
    for epoch in range(5, 8):
        desk.decide(state(epoch))
    desk.tamiyo.close_run("r")
    assert desk.published == []
