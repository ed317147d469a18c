"""A run that goes back is where it was, whatever the model has become since; it goes on as another one; it is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts import codec
from esper_ray.contracts.budgets import Budget
from esper_ray.contracts.enums import BusMessageType, CommandType, EmergencyLevel, FieldReportOutcome, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import (
    AdaptationCommand,
    EmergencyDirective,
    PauseDirective,
    RollbackDirective,
    SeedDirective,
)
from esper_ray.contracts.signing import KeyRing, Signer
from esper_ray.errors import CheckpointError, EnvironmentFault, RunError
from esper_ray.kasmina.garden import GROWN
from esper_ray.tolaria import checkpoint, recovery, resume, rollback
from esper_ray.tolaria.rollback import Times, Undo
from esper_ray.tolaria.trainer import RunRequest, Stopped, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "run.dataset=digits",
    "run.mode=lockstep",
    "run.boundary_every=6",
    "run.host_width=4",
    "run.device=cpu",
    "run.keep_checkpoints=30",
    "emergency.snapshots=30",
    "seeds.shadow_share=1.0",
    "seeds.gain_errors=0",
    "tamiyo.plateau_rate=10",
    "tamiyo.onset=0",
    "tamiyo.warmup_epochs=1",
    "tamiyo.latest_growth=0.99",
    "tamiyo.seeds_at_once=1",
)


@pytest.fixture(scope="module")
def kernels():
    return inprocess.LocalKernels()


def make(home, kernels, *settings, resume=False, **around):
    config = configuration.load(None, [f"home={home}", "run.epochs=12", *TINY, *settings])
    surroundings = replace(inprocess.surroundings(config, kernels=kernels), **around)
    return Trainer(RunRequest("r", config, resume=resume), surroundings)


def state(trainer):
    return resume.checkpoint(trainer).copied()


def demand_equal(trainer, saved):
    there = resume.checkpoint(trainer)
    assert there.tensors.keys() == saved.tensors.keys()
    for name, value in saved.tensors.items():
        assert name == "generator/cpu" or torch.equal(there.tensors[name], value), name
    for name in ("step", "garden", "rates"):
        expected = json.loads(json.dumps(saved.data[name]))
        found = json.loads(json.dumps(there.data[name]))
        if name == "garden":
            expected.pop("branch"), found.pop("branch")
        assert found == expected, name


def back_to(epoch, *, full=False, damage=False):
    return Undo("a test", origin="somebody", to_epoch=epoch, full=full, damage=damage)


def incidents(trainer):
    return [json.loads(line) for line in (trainer.folder / "incidents.jsonl").read_text().splitlines()]


def rows(trainer, name="metrics.jsonl"):
    return [json.loads(line) for line in (trainer.folder / name).read_text().splitlines()]


def stages(trainer):
    return [slot.stage for slot in trainer.garden.slots]


def optimizer_size(trainer):
    return sum(len(group["params"]) for group in trainer.groups.optimizer.param_groups)


@pytest.mark.parametrize("full", [False, True], ids=["from memory", "from disk"])
def test_a_rollback_restores_everything_bit_for_bit_whatever_the_seeds_have_become(tmp_path, kernels, full):
    trainer = make(tmp_path, kernels)
    trainer.open()
    saved = {}
    while not any(stage is Stage.FOSSILIZED for stage in stages(trainer)):
        trainer.one_epoch()
        saved[trainer.epoch] = state(trainer)
        assert trainer.epoch < 12, "the heuristic's first seed becomes a fossil"
    live = max(epoch for epoch, each in saved.items() if not saved_fossils(each) and each.group("seeds"))
    bare = max(epoch for epoch, each in saved.items() if not saved_fossils(each) and not each.group("seeds"))

    recovery.go_back(trainer, back_to(live, full=full))  # fossilised since
    demand_equal(trainer, saved[live])
    assert not hasattr(trainer.model, GROWN)
    assert trainer.garden.branch == 1
    live_size = optimizer_size(trainer)

    slot = next(slot for slot in trainer.garden.slots if slot.seed is not None and slot.seed.branch is not None)
    trainer.garden.cull(slot, "a test")  # culled since
    trainer.one_epoch()
    trainer.writer.finish()
    recovery.go_back(trainer, back_to(live, full=full))
    demand_equal(trainer, saved[live])
    assert optimizer_size(trainer) == live_size

    recovery.go_back(trainer, back_to(bare, full=full))  # grafted since
    demand_equal(trainer, saved[bare])
    assert optimizer_size(trainer) < live_size
    assert trainer.garden.branch == 3
    trainer.one_epoch()
    assert rows(trainer)[-1]["branch"] == 3
    assert [row["how"] for row in incidents(trainer) if row["kind"] == "rollback"] == ["full" if full else "fast"] * 3
    trainer.close()


def saved_fossils(saved):
    return any(name.startswith(f"model/{GROWN}") for name in saved.tensors)


def test_what_follows_a_rollback_differs_from_what_was_undone_and_the_rows_of_both_are_kept(tmp_path, kernels):
    trainer = make(tmp_path, kernels)
    trainer.open()
    for _ in range(5):
        trainer.one_epoch()
    before, spent = rows(trainer), trainer.meter.total
    recovery.go_back(trainer, back_to(3))
    assert [row["epoch"] for row in rows(trainer)] == [1, 2, 3]
    assert trainer.meter.total >= spent, "compute that was spent stays spent"
    for _ in range(2):
        trainer.one_epoch()
    after = rows(trainer)
    assert [(row["epoch"], row["branch"]) for row in after] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]
    assert after[:3] == before[:3]
    assert after[3]["training_loss"] != before[3]["training_loss"], "other batches"
    undone = [row for row in rows(trainer, "undone.jsonl") if row["of"] == "metrics.jsonl"]
    assert [(row["epoch"], row["undone_by"]) for row in undone] == [(4, 1), (5, 1)]
    trainer.close()


@pytest.mark.parametrize("point", ["rollback.recorded", "rollback.opened", "rollback.rewound", "later"])
def test_a_run_that_is_lost_in_its_rollback_or_after_it_ends_with_the_same_weights(
    tmp_path, kernels, monkeypatch, point, no_deadline
):
    undisturbed = make(tmp_path / "a", kernels, "run.epochs=8")
    fall_ill_at(undisturbed, step=33)
    expected = undisturbed.run()
    assert undisturbed.garden.branch == 1

    lost = make(tmp_path / "b", kernels, "run.epochs=8")
    fall_ill_at(lost, step=33)
    if point == "later":
        lost.around = replace(lost.around, should_stop=lambda: lost.garden.branch == 1 and lost.step == 40)
    else:
        for module in (rollback, recovery):
            monkeypatch.setattr(module, "passing", stop_at(point))
    with pytest.raises(Stopped):
        lost.run()
    monkeypatch.undo()

    resumed = make(tmp_path / "b", kernels, "run.epochs=8", resume=True)
    fall_ill_at(resumed, step=33)
    result = resumed.run()
    assert resumed.garden.branch == 1
    assert result["test_loss"] == expected["test_loss"]
    assert result["flops"] == expected["flops"]
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert untimed(resumed) == untimed(undisturbed)


@pytest.fixture
def no_deadline():
    """No rollback is told as late: how long one takes on a busy machine is not what the test compares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Times, "overdue", lambda self, *, full: "")
        yield


def untimed(trainer):
    measured = ("prepare", "commit", "confirm", "told")
    return [{key: value for key, value in row.items() if key not in measured} for row in incidents(trainer)]


def fall_ill_at(trainer, *, step, branch=0):
    """The loss is no number from that step on, in that branch alone."""
    whole = trainer.train_step

    def train_step():
        whole()
        if trainer.garden.branch == branch and trainer.step >= step:
            trainer._loss_sum += float("nan")

    trainer.train_step = train_step


def stop_at(wanted):
    def passing(point):
        if point == wanted:
            raise Stopped

    return passing


def test_tamiyo_remembers_the_rollback_also_after_she_was_lost(tmp_path, kernels):
    trainer = make(tmp_path, kernels)
    trainer.open()
    while not any(slot.seed for slot in trainer.garden.slots):
        trainer.one_epoch()
    decided = trainer.epoch
    trainer.one_epoch()
    undone = {(slot.seed.slot, slot.seed.blueprint) for slot in trainer.garden.slots if slot.seed}
    recovery.go_back(trainer, back_to(decided - 1))
    for _ in range(3):
        trainer.one_epoch()
    tamiyo = trainer.around.decider.tamiyo
    view = tamiyo._history.views["r"]
    way = [(each.branch, each.epoch) for each in view.states]
    assert way == [(0, e) for e in range(1, decided)] + [(1, e) for e in range(decided, decided + 3)]
    assert view.undone == undone
    again = {(slot.seed.slot, slot.seed.blueprint) for slot in trainer.garden.slots if slot.seed}
    assert again, "it grows again"
    assert not again & undone, "but not what was undone"
    reports = tamiyo.reports("r")
    assert {(report.slot, report.blueprint) for report in reports} == undone
    assert {(report.outcome, report.notes) for report in reports} == {
        (FieldReportOutcome.ABORTED, "undone by a rollback")
    }

    tamiyo.close()
    reborn = inprocess.surroundings(trainer.config).decider.tamiyo
    assert [(each.branch, each.epoch) for each in reborn._history.views["r"].states] == way
    assert reborn._history.views["r"].undone == undone
    assert reborn.reports("r") == reports
    reborn.close()
    trainer.close()


def test_a_tamiyo_who_could_not_be_told_learns_of_the_rollback_from_the_next_state(tmp_path, kernels):
    trainer = make(tmp_path, kernels)
    trainer.open()
    for _ in range(4):
        trainer.one_epoch()
    decider = trainer.around.decider
    trainer.around = replace(trainer.around, decider=Deaf(decider))
    recovery.go_back(trainer, back_to(2))
    assert incidents(trainer)[0]["told"] is False
    trainer.around = replace(trainer.around, decider=decider)
    trainer.one_epoch()
    states = decider.tamiyo._history.views["r"].states
    assert [(each.branch, each.epoch) for each in states] == [(0, 1), (0, 2), (1, 3)]
    trainer.close()


class Deaf:
    def __init__(self, decider):
        self.decider = decider

    def reopen(self, opening):
        return self

    def wait(self, timeout):
        raise EnvironmentFault("The actor tamiyo was lost.")


class Inbox:
    """Orders of a person, signed with the installation's key; each is given out once."""

    def __init__(self, home, author="operator"):
        self.trainer = None
        self.waiting = []
        self.author = author
        self.home = home

    def __call__(self):
        given, self.waiting = self.waiting, []
        return given

    def put(self, kind, *, keys=None, run="r", **directive):
        command = AdaptationCommand(7, kind, run, 0, self.trainer.around.clock.now_ns(), self.author, **directive)
        signer = Signer(keys or self.trainer.around.keys, self.author, clock=self.trainer.around.clock)
        data = codec.encode_command(command)
        self.waiting.append(signer.seal(data, BusMessageType.ADAPTATION_COMMAND, payload_type="AdaptationCommand"))


def with_inbox(home, kernels, *settings):
    inbox = Inbox(home)
    trainer = inbox.trainer = make(home, kernels, *settings, orders=inbox)
    trainer.open()
    return trainer, inbox


def test_a_person_orders_a_rollback_between_two_steps_and_is_named(tmp_path, kernels):
    trainer, inbox = with_inbox(tmp_path, kernels)
    for _ in range(3):
        trainer.one_epoch()
    inbox.put(
        CommandType.ROLLBACK,
        rollback=RollbackDirective(1),
        annotations={"how": "full", "why": "I liked it better then"},
    )
    trainer.one_epoch()
    assert (trainer.epoch, trainer.garden.branch) == (1, 1)
    done, told = incidents(trainer)
    assert (done["kind"], done["how"], done["origin"], done["to"], done["from_epoch"]) == (
        "rollback",
        "full",
        "operator",
        1,
        3,
    )
    assert done["reason"] == "I liked it better then"
    assert (told["kind"], told["level"]) == ("emergency", "ELEVATED")
    assert not trainer.emergency.conservative, "an order is no damage"
    trainer.one_epoch()
    assert trainer.epoch == 2
    trainer.close()


def refusals(trainer):
    return [row["reason"] for row in rows(trainer, "events.jsonl") if row["kind"] == "refusal"]


def test_orders_that_are_forged_foreign_impossible_or_not_for_a_run_change_nothing_and_are_told(tmp_path, kernels):
    trainer, inbox = with_inbox(tmp_path, kernels)
    trainer.one_epoch()
    inbox.put(CommandType.ROLLBACK, rollback=RollbackDirective(0), keys=KeyRing((("k", b"0" * 32),)))
    inbox.put(CommandType.ROLLBACK, rollback=RollbackDirective(0), run="another")
    inbox.put(CommandType.SEED, seed_directive=SeedDirective(SeedOperation.CULL))
    inbox.put(CommandType.OPTIMIZER)
    inbox.put(CommandType.ROLLBACK, rollback=RollbackDirective(99))
    while trainer.epoch < 2:
        trainer.one_epoch()
    assert trainer.garden.branch == 0
    told = " | ".join(refusals(trainer))
    for part in (
        "key",
        "another",
        "CULL is not possible while the slot is DORMANT",
        "OPTIMIZER",
        "cannot go back to epoch 99",
    ):
        assert part in told, told
    trainer.close()


def test_a_paused_run_waits_and_goes_on_and_a_halted_one_ends_with_its_checkpoint(tmp_path, kernels):
    trainer, inbox = with_inbox(tmp_path, kernels)
    seen = []

    def look():
        seen.append(trainer.orders.paused)
        if len(seen) == 3:
            inbox.put(CommandType.PAUSE, pause=PauseDirective(False))
        return inbox()

    inbox.put(CommandType.PAUSE, pause=PauseDirective(True))
    trainer.around = replace(trainer.around, orders=look)
    trainer.one_epoch()
    assert seen[:4] == [False, True, True, False]
    inbox.put(CommandType.EMERGENCY, emergency=EmergencyDirective(EmergencyLevel.HALT, "enough"))
    with pytest.raises(RunError, match="enough"):
        trainer.one_epoch()
    assert checkpoint.epochs(trainer.folder / "checkpoints") == [1]
    assert incidents(trainer)[-1]["level"] == "HALT"
    trainer.close()


def test_a_rollback_command_of_tamiyo_is_followed_after_its_boundary(tmp_path, kernels):
    trainer = make(tmp_path, kernels)
    trainer.open()
    for _ in range(3):
        trainer.one_epoch()
    place = (trainer.request.run, 3, trainer.around.clock.now_ns(), "tamiyo")
    command = AdaptationCommand(
        1, CommandType.ROLLBACK, *place, annotations={"to": "last"}, rollback=RollbackDirective(0)
    )
    assert codec.decode_command(codec.encode_command(command)) == command
    assert trainer.orders.apply(command) == ""
    assert trainer.epoch == 3, "not inside the boundary"
    trainer.orders.settle()
    assert (trainer.epoch, trainer.garden.branch) == (3, 1)
    trainer.close()


@pytest.mark.parametrize(
    ("kind", "directive"),
    [
        (CommandType.ROLLBACK, {"rollback": RollbackDirective(7)}),
        (CommandType.PAUSE, {"pause": PauseDirective(True)}),
        (CommandType.EMERGENCY, {"emergency": EmergencyDirective(EmergencyLevel.HALT, "enough")}),
    ],
)
def test_an_order_arrives_as_it_was_given(kind, directive):
    command = AdaptationCommand(3, kind, "r", 7, 5, "operator", annotations={"why": "so"}, branch=2, **directive)
    assert codec.decode_command(codec.encode_command(command)) == command


def test_a_damaged_or_foreign_state_is_refused_by_name_and_nothing_changes(tmp_path, kernels):
    trainer = make(tmp_path, kernels)
    trainer.open()
    for _ in range(3):
        trainer.one_epoch()
    trainer.writer.finish()
    folder, before = trainer.folder / "checkpoints", state(trainer)
    (file,) = folder.glob("epoch-000001-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="epoch-000001"):
        rollback.roll_back(trainer, back_to(1, full=True))
    foreign = checkpoint.read(folder, 2)
    checkpoint.write(folder, checkpoint.Checkpoint(2, {**foreign.data, "run": "another"}, foreign.tensors))
    with pytest.raises(CheckpointError, match="belongs to another"):
        rollback.roll_back(trainer, back_to(2, full=True))
    first = next(name for name in foreign.tensors if name.startswith("model/"))
    checkpoint.write(folder, checkpoint.Checkpoint(2, foreign.data, {**foreign.tensors, first: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="does not fit"):
        rollback.roll_back(trainer, back_to(2, full=True))
    with pytest.raises(CheckpointError, match="no checkpoint of epoch 0"):
        rollback.roll_back(trainer, back_to(0, full=True))
    demand_equal(trainer, before)
    assert trainer.garden.branch == 0
    trainer.close()


def test_a_state_that_comes_back_otherwise_than_it_was_saved_is_not_confirmed(tmp_path, kernels, monkeypatch):
    trainer = make(tmp_path, kernels)
    trainer.open()
    for _ in range(2):
        trainer.one_epoch()
    restore = resume.restore

    def wrong(given, saved):
        restore(given, saved)
        with torch.no_grad():
            next(given.model.parameters()).view(-1)[0] += 1.0

    monkeypatch.setattr(resume, "restore", wrong)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        rollback.roll_back(trainer, back_to(1))
    trainer.close()


def test_a_rollback_over_its_deadline_is_told_and_does_nothing_else(tmp_path, kernels, monkeypatch):
    assert Times(149, 249, 99).overdue(full=False) == ""
    assert Times(149, 249, 101).overdue(full=False) == "confirm 101 > 100 ms"
    assert Times(5000, 5000, 1999).overdue(full=True) == ""
    assert "full_rollback 12001 > 12000 ms" in Times(5000, 5000, 2001).overdue(full=True)
    trainer = make(tmp_path, kernels)
    trainer.open()
    for _ in range(2):
        trainer.one_epoch()
    monkeypatch.setattr(rollback, "ROLLBACK_FAST_MS", Budget("rollback", 0.0, "a test"))
    recovery.go_back(trainer, back_to(1))
    assert "deadline" in incidents(trainer)[-1]["reason"]
    assert incidents(trainer)[-1]["level"] == "ELEVATED"
    assert not trainer.emergency.conservative
    trainer.one_epoch()
    assert (trainer.epoch, trainer.garden.branch) == (2, 1)
    trainer.close()
