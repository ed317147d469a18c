"""Each emergency is caused by the real thing, is told at once, and ends as the table of levels says."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import EmergencyConfig
from esper_ray.contracts import codec
from esper_ray.contracts.enums import BusMessageType, CommandType, EmergencyLevel, MessagePriority, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedDirective
from esper_ray.errors import CheckpointError, EnvironmentFault, RunError, StorageFault
from esper_ray.karn import blueprints
from esper_ray.kasmina.lifecycle import LIVE
from esper_ray.reliability import atomic
from esper_ray.tolaria import boundary, checkpoint, resume
from esper_ray.tolaria.emergency import Emergency, LossWatch
from esper_ray.tolaria.rollback import Memory
from esper_ray.tolaria.trainer import RunRequest, Trainer
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    *tiny_runs.SETTINGS,
    "run.mode=lockstep",
    "seeds.gain_errors=0",
    "tamiyo.latest_growth=0.99",
    "tamiyo.seeds_at_once=1",
)
Level = EmergencyLevel


@pytest.fixture(scope="module")
def kernels():
    return inprocess.LocalKernels()


class Collector:
    """A publisher that keeps emergencies, with their priority, and the points of all metrics."""

    def __init__(self):
        self.levels, self.reasons, self.points, self.priorities = [], [], [], set()

    def publish(self, kind, payload, *, priority=MessagePriority.NORMAL, **_):
        if kind is BusMessageType.EMERGENCY_SIGNAL:
            signal = codec.decode_emergency(payload)
            assert signal.run == "r"
            self.levels.append(signal.level)
            self.reasons.append(signal.reason)
            self.priorities.add(priority)
        elif kind is BusMessageType.TELEMETRY:
            self.points += codec.decode_telemetry(payload).metrics

    def values(self, key):
        return [point.value for point in self.points if point.key == key]


def make(home, kernels, *settings, resume=False, **around):
    config = configuration.load(None, [f"home={home}", "run.epochs=8", *TINY, *settings])
    bus = Collector()
    surroundings = replace(inprocess.surroundings(config, kernels=kernels, publisher=bus), **around)
    return Trainer(RunRequest("r", config, resume=resume), surroundings), bus


def rows(trainer, name="metrics.jsonl"):
    return [json.loads(line) for line in (trainer.folder / name).read_text().splitlines()]


def finite(tensors):
    return all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point())


def train_on(trainer):
    """Until something ends it; each checkpoint is on disk before the next epoch begins."""
    while trainer.step < trainer.total_steps:
        trainer.one_epoch()
        trainer.writer.finish()


# Damage


def test_nan_in_the_data_is_undone_three_times_and_then_halts_with_a_sound_checkpoint(tmp_path, kernels):
    trainer, bus = make(tmp_path, kernels)
    trainer.open()
    trainer.one_epoch()
    trainer.train.inputs[::7] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        train_on(trainer)
    trainer.close()
    assert bus.levels == [Level.CONSERVATIVE, Level.CONSERVATIVE, Level.HALT]
    assert bus.priorities == {MessagePriority.CRITICAL}
    assert trainer.garden.branch == 3
    assert finite(trainer.model.state_dict())
    last = checkpoint.read_latest(trainer.folder / "checkpoints")
    assert last.epoch <= 1
    assert finite(last.tensors)
    assert max(bus.values("em")) == Level.HALT
    assert len(bus.values("ro")) == 3


def test_a_halted_run_that_is_resumed_with_sound_data_goes_on(tmp_path, kernels):
    trainer, _ = make(tmp_path, kernels)
    trainer.open()
    trainer.one_epoch()
    trainer.one_epoch()
    trainer.train.inputs[:] = float("nan")
    with pytest.raises(RunError):
        train_on(trainer)
    trainer.close()
    resumed, bus = make(tmp_path, kernels, resume=True)
    assert resumed.run()["status"] == "finished"
    assert Level.HALT not in bus.levels
    assert [row["epoch"] for row in rows(resumed)] == list(range(1, 9))


def test_a_single_bad_moment_costs_an_epoch_and_a_conservative_time_without_growth(tmp_path, kernels):
    trainer, bus = make(tmp_path, kernels, "run.epochs=9", "tamiyo.controller=periodic", "tamiyo.period=1")
    trainer.open()
    trainer.one_epoch()
    clean = trainer.train.inputs.clone()
    trainer.train.inputs[:] = float("nan")
    trainer.one_epoch()
    assert (trainer.epoch, trainer.garden.branch) == (1, 1)
    assert trainer.emergency.conservative
    trainer.train.inputs.copy_(clean)
    seeds = len(trainer.garden.seeds)
    for _ in range(2):
        trainer.one_epoch()
        assert trainer.emergency.conservative, "not over at the next good sample"
    assert trainer.rates.factor == pytest.approx(0.1)
    assert len(trainer.garden.seeds) == seeds, "nothing grows"
    forced = AdaptationCommand(
        1, CommandType.SEED, "r", 3, 0, "tamiyo", slot=2, seed_directive=SeedDirective(SeedOperation.GERMINATE, 9)
    )
    assert "conservative" in trainer.orders.apply(forced), "and nobody can order it"
    trainer.one_epoch()
    assert not trainer.emergency.conservative
    assert trainer.rates.factor == 1.0
    trainer.one_epoch()
    assert len(trainer.garden.seeds) > seeds, "it grows again"
    assert bus.levels == [Level.CONSERVATIVE, Level.NOTICE]
    assert [row["emergency"] for row in rows(trainer)] == ["", "CONSERVATIVE", "CONSERVATIVE", "CONSERVATIVE", ""]
    trainer.close()


def test_an_exploding_seed_is_taken_out_and_its_host_is_unharmed(tmp_path, kernels, monkeypatch):
    trainer, bus = make(tmp_path, kernels, "run.epochs=9")
    build = blueprints.build

    class Exploding(torch.nn.Module):
        """As BP043 is, but only in the path, and too large for any normalisation: no gate has seen it."""

        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, h):
            in_path = any(seed.branch is self and seed.stage in LIVE for seed in trainer.garden.seeds)
            return self.block(h) * (1e25 if in_path else 1.0)

    def build_exploding(*given, **options):
        return Exploding(build(*given, **options))

    monkeypatch.setattr(blueprints, "build", build_exploding)
    trainer.open()
    while trainer.garden.branch == 0:
        trainer.one_epoch()
        assert trainer.epoch < 9, "the seed reaches the path"
    suspects = [row for row in rows(trainer, "incidents.jsonl") if row["kind"] == "rollback"]
    assert suspects[0]["how"] == "fast"
    assert bus.levels[0] is Level.CONSERVATIVE
    assert "training loss" in bus.reasons[0]
    assert Stage.CULLED in {slot.stage for slot in trainer.garden.slots}
    assert not [seed for seed in trainer.garden.seeds if seed.stage in LIVE]
    assert trainer.rates.factor == 1.0, "the seed explains it, not the rate"
    assert finite(trainer.model.state_dict())
    trainer.one_epoch()
    culls = [row for row in rows(trainer, "events.jsonl") if row["kind"] == "stage" and row["to"] == "CULLED"]
    assert "in the path when the training loss" in culls[-1]["reason"]
    assert rows(trainer)[-1]["training_loss"] < 3.0
    trainer.close()


def test_a_learning_rate_a_thousand_times_too_large_is_undone_and_lowered(tmp_path, kernels):
    settings = ("optimizer.learning_rate=10", "tamiyo.controller=never", "run.boundary_every=16")
    trainer, bus = make(tmp_path, kernels, *settings)
    trainer.open()
    while trainer.garden.branch == 0:
        trainer.one_epoch()
        assert trainer.epoch < 8
    assert bus.levels == [Level.CONSERVATIVE]
    assert "over 15 times its running mean" in bus.reasons[0]
    assert trainer.rates.factor == pytest.approx(0.1)
    assert trainer.rates.host_rate(trainer.step) <= 1.0
    trainer.close()


def test_repeated_damage_goes_further_back_each_time():
    memory = Memory(3)
    for epoch in range(5):
        memory.keep(checkpoint.Checkpoint(epoch, {}, {}))
    assert [memory.back(count).epoch for count in (1, 2, 3, 9)] == [4, 3, 2, 2]
    memory.forget_after(3)
    assert memory.back(1).epoch == 3
    assert memory.find(4) is None


# Full disks


def full_disk(monkeypatch, part):
    """The real write fails with ENOSPC, as a full disk's does, for files whose path has ``part``."""
    sync = os.fsync

    def fsync(descriptor):
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fsync)


def test_a_full_disk_at_a_checkpoint_leaves_the_old_ones_and_is_told_and_training_goes_on(
    tmp_path, kernels, monkeypatch
):
    trainer, bus = make(tmp_path, kernels)
    trainer.open()
    for _ in range(2):
        trainer.one_epoch()
    trainer.writer.finish()
    folder = trainer.folder / "checkpoints"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    full_disk(monkeypatch, "/checkpoints/")
    trainer.one_epoch()
    trainer.writer.finish()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    monkeypatch.undo()
    trainer.one_epoch()
    assert bus.levels == [Level.ELEVATED]
    assert "No space left" in bus.reasons[0]
    assert bus.values("ck") == [1.0]
    trainer.one_epoch()
    trainer.writer.finish()
    assert checkpoint.epochs(folder) == [1, 2, 4, 5]
    assert trainer.emergency.level == Level.UNSPECIFIED
    trainer.close()


def test_a_disk_that_stays_full_halts_the_run_and_the_last_checkpoint_resumes_it(tmp_path, kernels, monkeypatch):
    trainer, bus = make(tmp_path, kernels)
    trainer.open()
    trainer.one_epoch()
    trainer.writer.finish()
    full_disk(monkeypatch, "/checkpoints/")
    with pytest.raises(RunError, match="No space left"):
        train_on(trainer)
    trainer.close()
    assert bus.levels == [Level.ELEVATED, Level.ELEVATED, Level.HALT]
    monkeypatch.undo()
    resumed, _ = make(tmp_path, kernels, resume=True)
    resumed.open()
    assert resumed.epoch == 1
    resumed.close()


def test_a_full_disk_under_the_journal_halts_before_anything_undurable_takes_effect(tmp_path, kernels):
    trainer, bus = make(tmp_path, kernels, "run.epochs=3")
    open_run = trainer.open

    def open_on_a_full_disk():
        open_run()
        trainer.one_epoch()
        pages = trainer.recorder._journal._db.execute("PRAGMA page_count").fetchone()[0]
        trainer.recorder._journal._db.execute(f"PRAGMA max_page_count={pages}")
        for number in range(100_000):
            try:
                trainer.recorder._journal.append("filler", bytes(500), key=str(number))
            except StorageFault:
                return

    trainer.open = open_on_a_full_disk
    with pytest.raises(StorageFault, match="full"):
        trainer.run()
    assert bus.levels == [Level.HALT]
    assert "full" in bus.reasons[0]
    assert [row["epoch"] for row in rows(trainer)] == [1]
    assert checkpoint.read_latest(trainer.folder / "checkpoints").epoch == 1
    resumed, _ = make(tmp_path, kernels, "run.epochs=3", resume=True)
    assert resumed.run()["epochs"] == 3


# Tamiyo, and slowness


class Away:
    """A Tamiyo that is dead, or says nothing."""

    def __init__(self, fault=None):
        self.fault = fault

    def open_run(self, opening):
        pass

    close_run = open_run

    def decide(self, run, state):
        return self

    def reopen(self, opening):
        return self

    def wait(self, timeout):
        if self.fault:
            raise self.fault


@pytest.mark.parametrize("fault", [None, EnvironmentFault("The actor tamiyo was lost.")], ids=["silent", "dead"])
def test_without_tamiyo_a_run_goes_on_without_growth_it_is_told_once_and_nothing_is_undone(tmp_path, kernels, fault):
    trainer, bus = make(tmp_path, kernels, "run.mode=live", "run.epochs=6", decider=Away(fault))
    result = trainer.run()
    assert (result["status"], result["missed_deadlines"]) == ("finished", 6)
    assert result["parameters"] == result["host_parameters"]
    assert bus.levels == [Level.NOTICE]
    assert trainer.garden.branch == 0
    assert bus.values("ro") == []


def test_in_lockstep_a_lost_tamiyo_halts_the_run_and_that_is_told(tmp_path, kernels, monkeypatch):
    monkeypatch.setattr(boundary, "LOCKSTEP_PATIENCE_SECONDS", 0.01)
    trainer, bus = make(tmp_path, kernels, decider=Away(EnvironmentFault("The actor tamiyo was lost.")))
    with pytest.raises(RunError, match="no decision"):
        trainer.run()
    assert bus.levels == [Level.HALT]
    assert "The actor tamiyo was lost" in bus.reasons[0]


def test_slowness_alone_never_goes_back(tmp_path, kernels, monkeypatch):
    """Every step, boundary and answer is a hundred seconds late by every clock the run can look at."""
    trainer, bus = make(tmp_path, kernels, "run.mode=live", "run.epochs=4", decider=Away())
    trainer.open()
    ticks = iter(range(0, 10**9, 100))
    for module in ("esper_ray.tolaria.trainer", "esper_ray.tolaria.boundary", "esper_ray.tolaria.recovery"):
        monkeypatch.setattr(f"{module}.time.perf_counter", lambda: float(next(ticks)))
    for _ in range(4):
        trainer.one_epoch()
    monkeypatch.undo()
    assert trainer.garden.branch == 0
    assert set(bus.levels) <= {Level.NOTICE}
    assert not (trainer.folder / "undone.jsonl").exists()
    assert rows(trainer)[-1]["step_ms"] > 1000
    trainer.close()


# Checkpoints


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_that_names_it(tmp_path, kernels, caplog):
    trainer, _ = make(tmp_path, kernels)
    trainer.open()
    for _ in range(3):
        trainer.one_epoch()
    trainer.close()
    folder = trainer.folder / "checkpoints"
    manifest = folder / "epoch-000003.json"
    changed = json.loads(manifest.read_text())
    changed["data"]["step"] += 1
    manifest.write_text(json.dumps(changed))
    resumed, bus = make(tmp_path, kernels, resume=True)
    resumed.open()
    assert resumed.epoch == 2
    assert "epoch-000003.json is damaged" in caplog.text
    assert bus.values("ck") == [1.0]
    (incident,) = rows(resumed, "incidents.jsonl")
    assert (incident["kind"], "epoch-000003" in incident["reason"]) == ("checkpoint", True)
    resumed.close()


def test_a_resumed_run_refuses_a_checkpoint_of_another_run_by_name(tmp_path, kernels):
    trainer, _ = make(tmp_path, kernels)
    trainer.open()
    trainer.one_epoch()
    trainer.close()
    resumed, _ = make(tmp_path, kernels, "run.seed=5", resume=True)
    with pytest.raises(CheckpointError, match="belongs to r with seed 0"):
        resumed.run()


def test_the_last_checkpoints_are_kept_whole_and_nothing_else_lies_about(tmp_path, kernels):
    trainer, _ = make(tmp_path, kernels, "run.keep_checkpoints=2")
    trainer.open()
    for _ in range(4):
        trainer.one_epoch()
    trainer.close()
    folder = trainer.folder / "checkpoints"
    assert checkpoint.epochs(folder) == [3, 4]
    assert len(list(folder.iterdir())) == 4
    for epoch in (3, 4):
        saved = checkpoint.read(folder, epoch)
        assert {"garden", "rates", "costs", "step", "emergency", "watch"} <= saved.data.keys()
        groups = {name.split("/")[0] for name in saved.tensors}
        assert {"model", "optimizer", "generator"} <= groups


def test_an_epoch_that_is_written_again_is_old_or_new_and_never_half(tmp_path, monkeypatch):
    old = checkpoint.Checkpoint(1, {"branch": 0}, {"w": torch.zeros(3)})
    new = checkpoint.Checkpoint(1, {"branch": 1}, {"w": torch.ones(3)})
    checkpoint.write(tmp_path, old)
    write_text = atomic.write_text
    monkeypatch.setattr(checkpoint.atomic, "write_text", lambda *_: (_ for _ in ()).throw(StorageFault("full")))
    with pytest.raises(StorageFault):
        checkpoint.write(tmp_path, new)
    assert torch.equal(checkpoint.read(tmp_path, 1).tensors["w"], torch.zeros(3))
    monkeypatch.setattr(checkpoint.atomic, "write_text", write_text)
    checkpoint.write(tmp_path, new)
    assert torch.equal(checkpoint.read(tmp_path, 1).tensors["w"], torch.ones(3))


def test_training_on_does_not_change_a_state_that_was_kept(tmp_path, kernels):
    trainer, _ = make(tmp_path, kernels)
    trainer.open()
    trainer.one_epoch()
    kept = trainer.memory.back(1)
    before = {name: value.clone() for name, value in kept.tensors.items()}
    data = json.dumps(kept.data)
    for _ in range(3):
        trainer.one_epoch()
    assert all(torch.equal(value, before[name]) for name, value in kept.tensors.items())
    assert json.dumps(kept.data) == data
    assert resume.checkpoint(trainer).epoch == 4
    trainer.close()


# The table itself


def test_a_loss_is_damage_by_its_running_mean_and_a_perfect_model_may_err():
    watch = LossWatch("training", 15.0, 0.1)
    assert watch.judge(2.0) == ""
    assert watch.judge(29.0) == ""
    assert "over 15 times its running mean" in watch.judge(100.0)
    perfect = LossWatch("training", 15.0, 0.5)
    for loss in (2.0, *(0.001,) * 30):
        assert perfect.judge(loss) == ""
    assert perfect.judge(0.2) == "", "200 times the mean, and a tenth of the first loss"
    assert "not finite" in perfect.judge(float("inf"))
    again = LossWatch("training", 15.0, 0.5)
    again.load(json.loads(json.dumps(perfect.save())))
    assert again.save() == perfect.save()


def test_failed_epochs_add_up_until_a_calm_time_has_passed():
    told = []
    emergency = Emergency(EmergencyConfig(), lambda level, reason: told.append(level))
    for _ in range(4):
        assert not emergency.epoch_failed(Level.CONSERVATIVE, "ill")
        assert not emergency.epoch_failed(Level.CONSERVATIVE, "ill")
        for calm in range(3):
            assert emergency.conservative
            assert emergency.epoch_passed() is (calm == 2)
    assert Level.HALT not in told
    assert [emergency.epoch_failed(Level.CONSERVATIVE, "ill") for _ in range(3)] == [False, False, True]
    assert told[-1] is Level.HALT
    assert emergency.save()["failed"] == 0, "who starts it again gives it new attempts"
