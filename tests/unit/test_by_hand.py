"""A person decides about seeds: by name, on Tamiyo's own path, recorded with the author, and once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, EmergencyLevel, FieldReportOutcome, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.ports import SlotInfo, SlotSignature
from esper_ray.contracts.signing import Signer
from esper_ray.errors import BlueprintError, RunError
from esper_ray.nissa.report import write_report
from esper_ray.tolaria import by_hand, recovery
from esper_ray.tolaria.rollback import Undo
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

SLOTS = (
    SlotInfo(0, "stage0", SlotSignature("conv", (8, 8, 8))),
    SlotInfo(1, "stage1", SlotSignature("conv", (16, 4, 4))),
)


@pytest.fixture(scope="module")
def kernels():
    return inprocess.LocalKernels()


class Person:
    """Gives orders to a run, as `esper grow` and `esper cull` do; remembers what was told of them."""

    def __init__(self, home, kernels, *settings, resume=False):
        given = (*tiny_runs.SETTINGS, "run.mode=lockstep", "tamiyo.controller=never", "seeds.gain_errors=0", *settings)
        config = configuration.load(None, [f"home={home}", "run.epochs=12", *given])
        self.told, self._waiting, self._count = {}, [], 0
        around = inprocess.surroundings(config, kernels=kernels)
        around = replace(around, orders=self._take, on_progress=lambda progress: self.told.update(progress))
        self.trainer = Trainer(RunRequest("r", config, resume=resume), around)
        self.trainer.open()

    def _take(self):
        given, self._waiting = self._waiting, []
        return given

    def says(self, text, author="anna", why="", **changes):
        clock, trainer = self.trainer.around.clock, self.trainer
        self._count += 1
        now_ns = clock.now_ns() + self._count
        command = by_hand.command(
            by_hand.parse(text), trainer.task.slots, run="r", author=author, now_ns=now_ns, approved=("BP038",), why=why
        )
        command = replace(command, **changes)
        self.sends(command, author)
        return command

    def sends(self, command, author="anna"):
        signer = Signer(self.trainer.around.keys, author, clock=self.trainer.around.clock)
        data = codec.encode_command(command)
        self._waiting.append(signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand"))

    def heard(self, command):
        return self.told["orders"][str(command.command_id)]

    def epochs(self, count=1):
        for _ in range(count):
            self.trainer.one_epoch()

    def rows(self, kind):
        file = self.trainer.folder / "events.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def decisions(self):
        """Those in which something was decided."""
        return [row for row in self.rows("decision") if row["commands"][0]["operation"] != "NO_OP"]

    def stage(self, slot=0):
        return self.trainer.garden.slots[slot].stage


def test_what_a_person_wants_grows_at_the_next_boundary_and_is_recorded_with_the_author(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    person.epochs()
    order = person.says("grow 1 BP004", why="the middle is weak")
    slot = person.trainer.task.slots[1]
    person.epochs()
    assert person.heard(order) == {"state": "done", "why": "", "epoch": 2}
    (made,) = person.decisions()
    assert (made["epoch"], made["controller"], made["why"]) == (2, "anna", "the middle is weak")
    assert made["commands"] == [{"operation": "GERMINATE", "slot": slot.index, "blueprint": "BP004"}]
    assert person.stage(1) is Stage.GERMINATED
    assert [row["passed"] for row in person.rows("gate") if row["gate"] == "G0_SANITY"] == [True]
    person.epochs()
    assert person.stage(1) in (Stage.TRAINING, Stage.BLENDING)
    page = write_report(person.trainer.folder).read_text()
    assert f"germinate BP004 in {slot.name} (anna)" in page
    person.trainer.close()


def test_tamiyo_reports_on_a_persons_seed_with_its_author_and_does_not_call_the_run_learnable(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    order = person.says("grow 1 BP004")
    person.epochs(5)
    person.trainer.around.decider.close_run("r")
    tamiyo = person.trainer.around.decider.tamiyo
    (report,) = tamiyo.reports("r")
    assert (report.command_id, report.policy_version, report.blueprint) == (order.command_id, "anna", 4)
    assert tamiyo._history.views["r"].by_hand
    person.trainer.close()


def test_a_person_culls_and_the_slot_rests(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    person.says("grow 1 BP004")
    person.epochs(2)
    order = person.says("cull 1")
    person.epochs()
    assert person.heard(order)["state"] == "done"
    assert person.stage(1) is Stage.CULLED
    made = person.decisions()[-1]
    assert made["commands"] == [{"operation": "CULL", "slot": 1, "blueprint": "BP004"}]
    (culled,) = [row for row in person.rows("stage") if row["to"] == "CULLED"]
    assert culled["reason"] == "ordered by anna"
    person.trainer.close()


def test_what_cannot_be_done_is_refused_before_the_boundary_with_its_reason(tmp_path, kernels):
    person = Person(tmp_path, kernels, "run.max_parameters=2100")
    first = person.says("grow 0 BP002")
    same_slot = person.says("grow 0 BP004")
    idle = person.says("cull 1")
    large = person.says("grow 1 BP014")
    unapproved = person.says("grow 2 BP038")
    foreign = person.says("grow 2 BP002", run="another")
    person.epochs()
    occupied = person.says("grow 0 BP004")
    person.epochs()
    assert person.heard(first)["state"] == "done"
    for order, words in (
        (same_slot, "another order for that slot"),
        (idle, "CULL is not possible while the slot is DORMANT"),
        (large, "run.max_parameters"),
        (unapproved, "not approved"),
        (occupied, "is not possible while the slot is"),
    ):
        heard = person.heard(order)
        assert heard["state"] == "refused", heard
        assert words in heard["why"], heard
    assert "with BP002 in it" in person.heard(occupied)["why"]
    assert str(foreign.command_id) not in person.told["orders"]
    told = {row["reason"] for row in person.rows("refusal")}
    assert {person.heard(order)["why"] for order in (same_slot, idle, large, unapproved, occupied)} <= told
    assert len(person.trainer.garden.seeds) == 1
    person.trainer.close()


def test_what_became_impossible_meanwhile_is_refused_at_the_boundary(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    person.says("grow 1 BP004")
    person.epochs(2)
    order = person.says("cull 1")
    garden, close_epoch = person.trainer.garden, person.trainer.garden.close_epoch

    def lose_it_first(*given, **named):
        close_epoch(*given, **named)
        garden.cull(garden.slots[1], "a test")

    garden.close_epoch = lose_it_first
    person.epochs()
    assert person.heard(order)["state"] == "refused"
    made = person.decisions()[-1]
    assert made["controller"] == "anna"
    assert "while the slot is CULLED" in made["refused"][0]
    person.trainer.close()


def test_a_conservative_run_grows_nothing_for_anybody(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    person.trainer.emergency.epoch_failed(EmergencyLevel.CONSERVATIVE, "a test")
    order = person.says("grow 1 BP004")
    person.epochs()
    assert "conservative" in person.heard(order)["why"]
    person.trainer.close()


def test_an_order_that_comes_twice_is_carried_out_once(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    order = person.says("grow 1 BP004")
    person.sends(order)
    person.epochs()
    person.sends(order)
    person.epochs()
    assert len(person.decisions()) == 1
    assert person.rows("refusal") == []
    person.trainer.close()


def test_not_more_orders_wait_for_a_boundary_than_a_boundary_has_commands(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    orders = [person.says("grow 1 BP004", slot=slot % 3) for slot in range(3)]
    person.epochs()
    assert [person.heard(order)["state"] for order in orders] == ["done"] * 3
    person.trainer.close()


def test_tamiyo_decides_on_what_a_persons_order_left_free(tmp_path, kernels):
    person = Person(tmp_path, kernels, "tamiyo.controller=heuristic", "tamiyo.warmup_epochs=3")
    person.epochs(2)
    person.says("grow 1 BP002")
    person.epochs()
    by = {row["controller"]: [c["slot"] for c in row["commands"]] for row in person.decisions()}
    assert by == {"anna": [1], "heuristic": [0, 2]}
    assert person.rows("refusal") == []
    person.trainer.close()


@pytest.mark.parametrize("moment", ["waiting", "carried out"])
def test_a_run_that_is_lost_carries_an_order_out_at_the_same_boundary_once(tmp_path, kernels, moment):
    whole = Person(tmp_path / "a", kernels)
    whole.epochs(2)
    whole.says("grow 1 BP004")
    whole.epochs(4)

    lost = Person(tmp_path / "b", kernels)
    lost.epochs(2)
    lost.says("grow 1 BP004")
    if moment == "waiting":
        lost.trainer.measure = break_off
    else:
        lost.trainer._do_boundary = break_off
    with pytest.raises(KeyboardInterrupt):
        lost.epochs()
    lost.trainer.close()
    again = Person(tmp_path / "b", kernels, resume=True)
    again.epochs(4)
    assert [(row["epoch"], row["controller"]) for row in again.decisions()] == [(3, "anna")]
    assert again.decisions() == whole.decisions()
    mine, other = again.trainer.model.state_dict(), whole.trainer.model.state_dict()
    assert mine.keys() == other.keys()
    assert all(value.equal(other[name]) for name, value in mine.items())
    again.trainer.close()
    whole.trainer.close()


def break_off(*_, **__):
    raise KeyboardInterrupt


def test_a_rollback_takes_a_persons_decision_back_for_good_and_says_so(tmp_path, kernels):
    person = Person(tmp_path, kernels)
    person.epochs(2)
    person.says("grow 1 BP004")
    person.epochs(2)
    recovery.go_back(person.trainer, Undo("a test", origin="anna", to_epoch=2, damage=False))
    person.epochs(2)
    assert person.stage(1) is Stage.DORMANT
    (report,) = person.trainer.around.decider.tamiyo.reports("r")
    assert (report.outcome, report.notes) == (FieldReportOutcome.ABORTED, "undone by a rollback")
    person.trainer.close()


def made(text, approved=()):
    return by_hand.command(by_hand.parse(text), SLOTS, run="r", author="anna", now_ns=7, approved=approved, why="so")


def test_slots_and_blocks_are_found_by_number_and_by_name():
    for text in ("grow stage1 BP009", "grow 1 9", "grow stage1 bp9", "grow stage1 residual-basic"):
        command = made(text)
        assert (command.slot, command.seed_directive.operation, command.seed_directive.blueprint) == (
            1,
            SeedOperation.GERMINATE,
            9,
        )
    assert made("cull stage0").seed_directive.operation is SeedOperation.CULL
    assert made("grow stage1 BP038", approved=("BP038",)).seed_directive.blueprint == 38


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grow stag1 BP009", "Did you mean stage1?"),
        ("grow stage1 BP099", "no blueprint BP099"),
        ("grow stage1 residual-basik", "Did you mean residual-basic?"),
        ("grow stage1 BP036", "Add BP036 to seeds.approved"),
        ("grow stage1 BP043", "quarantined"),
        ("grow stage1", "`grow SLOT BLUEPRINT` or `cull SLOT`"),
        ("prune stage1", "`grow SLOT BLUEPRINT` or `cull SLOT`"),
        ("", "`grow SLOT BLUEPRINT` or `cull SLOT`"),
    ],
)
def test_what_is_wrong_with_an_order_is_said_with_the_way_out(text, words):
    with pytest.raises((RunError, BlueprintError)) as fault:
        made(text)
    assert words in str(fault.value)


def test_a_block_of_another_kind_of_slot_is_refused_by_name():
    sequence = (SlotInfo(0, "block0", SlotSignature("vector", (8,))),)
    with pytest.raises(BlueprintError, match="does not fit"):
        by_hand.command(
            by_hand.parse("grow block0 BP009"), sequence, run="r", author="a", now_ns=1, approved=(), why=""
        )
