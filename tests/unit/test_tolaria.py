"""Tolaria's promises: isolation holds over whole runs, a killed run ends as if it had never been, times are kept."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import OptimizerConfig
from esper_ray.contracts import codec
from esper_ray.contracts.budgets import BOUNDARY_MS
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.metrics import METRICS
from esper_ray.errors import CheckpointError, EnvironmentFault, EsperError, RunError
from esper_ray.tolaria import boundary, checkpoint, recovery
from esper_ray.tolaria.learning_rate import LearningRates
from esper_ray.tolaria.rollback import Undo
from esper_ray.tolaria.trainer import Block, RunRequest, Stopped, Trainer
from tests.tied_seeds import equal_slots, tie_births

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "run.dataset=digits",
    "run.mode=lockstep",
    "run.epochs=9",
    "run.boundary_every=0",
    "run.host_width=8",
    "optimizer.learning_rate=0.01",
    "tamiyo.plateau_rate=10",
    "tamiyo.onset=0",
    "run.device=cpu",
)


def config_at(home, *settings):
    return configuration.load(None, [f"home={home}", *SMALL, *settings])


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_grows_and_writes_down_what_happened(tmp_path):
    config = config_at(tmp_path)
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    result = trainer.run()
    assert result["fossilized"] >= 1
    assert result["parameters"] > result["host_parameters"]
    assert result["isolation_checks"] > 0
    assert result["isolation_violations"] == 0
    metrics = rows(trainer.folder, "metrics.jsonl")
    assert [row["epoch"] for row in metrics] == list(range(1, 10))
    assert all(row["boundary"]["total"] > 0 for row in metrics)
    stages = [event["to"] for event in rows(trainer.folder, "events.jsonl") if event["kind"] == "stage"]
    for stage in ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED"):
        assert stage in stages
    assert json.loads((trainer.folder / "result.json").read_text()) == result


def test_a_seed_stays_at_least_an_epoch_in_every_stage(tmp_path):
    config = config_at(tmp_path)
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    trainer.run()
    entered = {}
    for event in rows(trainer.folder, "events.jsonl"):
        if event["kind"] == "stage" and event["seed"] == 1:
            entered[event["to"]] = event["epoch"]
    order = ["GERMINATED", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED"]
    epochs = [entered[stage] for stage in order]
    assert all(b > a for a, b in itertools.pairwise(epochs)), entered


def test_isolated_seeds_leave_the_host_bit_for_bit_as_it_would_be_without_them(tmp_path):
    """Four epochs of isolation against a run that never grows."""
    stay = ("run.epochs=7", "seeds.training_epochs=9", "seeds.max_stage_epochs=20")
    with_seeds = config_at(tmp_path / "a", *stay)
    grown = Trainer(RunRequest("r", with_seeds), inprocess.surroundings(with_seeds))
    grown.run()
    assert {slot.stage for slot in grown.garden.slots} == {Stage.TRAINING}
    assert grown.garden.isolated_steps >= 3 * grown.steps_per_epoch * with_seeds.seeds.shadow_share
    without = config_at(tmp_path / "b", *stay)
    alone = Trainer(RunRequest("r", without, arm="host"), inprocess.surroundings(without))
    alone.run()
    for name, value in weights(alone).items():
        assert torch.equal(value, grown.model.state_dict()[name]), name


def test_two_lockstep_runs_of_one_manifest_end_with_the_same_weights(tmp_path):
    ends = []
    for home in ("a", "b"):
        config = config_at(tmp_path / home)
        trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
        trainer.run()
        ends.append(weights(trainer))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("stop_at", [50, 90, 115])
def test_a_stopped_and_resumed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, stop_at):
    config = config_at(tmp_path / "a")
    whole = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    expected_result = whole.run()

    config = config_at(tmp_path / "b")
    around = inprocess.surroundings(config)
    stop = threading.Event()
    stopping = configured(around, should_stop=stop.is_set)
    first = Trainer(RunRequest("r", config), stopping)
    step = first.train_step

    def step_then_stop():
        step()
        if first.step == stop_at:
            stop.set()

    first.train_step = step_then_stop
    with pytest.raises(Stopped):
        first.run()
    second = Trainer(RunRequest("r", config, resume=True), inprocess.surroundings(config))
    result = second.run()
    assert second.model.state_dict().keys() == whole.model.state_dict().keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert result["test_accuracy"] == expected_result["test_accuracy"]
    assert [row["epoch"] for row in rows(second.folder, "metrics.jsonl")] == list(range(1, 10))


def configured(around, **changes):
    from dataclasses import replace

    return replace(around, **changes)


def test_the_final_size_model_from_scratch_has_the_same_blocks_and_costs_the_same(tmp_path):
    config = config_at(tmp_path)
    grown = Trainer(RunRequest("r", config), inprocess.surroundings(config)).run()
    blocks = tuple(map(Block.of, grown["blocks"]))
    request = RunRequest("r-final", config, arm="final", blocks=blocks, flops=grown["flops"])
    final = Trainer(request, inprocess.surroundings(config)).run()
    assert final["parameters"] == grown["parameters"]
    assert final["flops"] == pytest.approx(grown["flops"], rel=0.03)


def test_in_lockstep_a_lost_tamiyo_ends_the_run_instead_of_deciding_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(boundary, "LOCKSTEP_PATIENCE_SECONDS", 0.01)
    config = config_at(tmp_path)
    around = configured(inprocess.surroundings(config), decider=Silent(EnvironmentFault("Tamiyo was lost.")))
    with pytest.raises(RunError, match="no decision"):
        Trainer(RunRequest("r", config), around).run()


class Silent:
    """A decider that never answers, or fails."""

    def __init__(self, fault: EsperError | None = None) -> None:
        self.fault = fault

    def open_run(self, opening):
        pass

    def close_run(self, run):
        pass

    def decide(self, run, state):
        return self

    def wait(self, timeout):
        assert timeout <= BOUNDARY_MS.limit / 1e3
        if self.fault:
            raise self.fault


class Collector:
    """A publisher that keeps the keys of all metric points."""

    def __init__(self):
        self.keys = set()

    def publish(self, kind, payload, **_):
        if kind is BusMessageType.TELEMETRY:
            self.keys |= {point.key for point in codec.decode_telemetry(payload).metrics}


def lose_a_checkpoint_and_go_back(config, collector):
    first = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    first.open()
    for _ in range(2):
        first.one_epoch()
    first.close()
    (first.folder / "checkpoints" / "epoch-000002.json").write_text("{")
    second = Trainer(RunRequest("r", config, resume=True), inprocess.surroundings(config, publisher=collector))
    second.open()
    second.one_epoch()
    recovery.go_back(second, Undo("a test", to_epoch=1, damage=False))
    second.close()


def test_every_metric_of_the_loop_and_of_the_seeds_is_really_sent(tmp_path, monkeypatch):
    collector = Collector()
    for home, settings in (("a", ()), ("b", ("seeds.gain_errors=1000",))):
        config = config_at(tmp_path / home, *settings)
        Trainer(RunRequest("r", config), inprocess.surroundings(config, publisher=collector)).run()
    # Conflicts of gradients are there to be told of where seeds share parameters.
    equal_slots(monkeypatch)
    tie_births(monkeypatch)
    config = config_at(tmp_path / "tied")
    Trainer(RunRequest("r", config), inprocess.surroundings(config, publisher=collector)).run()
    lose_a_checkpoint_and_go_back(config_at(tmp_path / "back"), collector)
    promised = {metric.key for metric in METRICS if metric.emitter in ("tolaria", "kasmina")}
    assert promised - collector.keys == set()


PLAIN = """
import sys, torch
from safetensors.torch import load_file
folder = sys.argv[1]
program = torch.export.load(folder + "/model/model.pt2").module()
torch.set_num_threads(1)
assert not any(name.startswith("esper_ray") for name in sys.modules)
batch = load_file(folder + "/batch.safetensors")
print(torch.equal(program(batch["inputs"]), batch["logits"]))
"""


def test_plain_pytorch_loads_the_grown_model_and_predicts_bit_for_bit_the_same(tmp_path):
    config = config_at(tmp_path)
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    trainer.run()
    inputs = trainer.task.data.test.inputs[:37].contiguous()
    with torch.no_grad():
        logits = trainer.model.eval()(inputs)
    save_file({"inputs": inputs, "logits": logits}, trainer.folder / "batch.safetensors")
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(trainer.folder)], capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == "True", answer.stderr


@pytest.mark.parametrize("fault", [None, EnvironmentFault("Tamiyo was lost.")])
def test_a_late_or_lost_decision_is_no_change_and_counted(tmp_path, fault):
    config = config_at(tmp_path, "run.mode=live", "run.epochs=4")
    around = configured(inprocess.surroundings(config), decider=Silent(fault))
    result = Trainer(RunRequest("r", config), around).run()
    assert result["status"] == "finished"
    assert result["missed_deadlines"] == 4
    assert result["parameters"] == result["host_parameters"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for epoch in (1, 2):
        checkpoint.write(folder, checkpoint.Checkpoint(epoch, {"a": epoch}, {"w": torch.full((3,), float(epoch))}))
    assert checkpoint.read_latest(folder).epoch == 2
    (file,) = folder.glob("epoch-000002*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert checkpoint.read_latest(folder).epoch == 1
    next(folder.glob("epoch-000001*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="can be read"):
        checkpoint.read_latest(folder)


def test_an_outside_write_to_a_learning_rate_is_counted_and_undone():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "seed": 0}], lr=1.0)
    rates = LearningRates(OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0), 100)
    rates.write(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 5.0
    rates.write(optimizer, 1)
    assert rates.outside_writes == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_the_stable_schedule_is_constant_until_its_decay_and_a_seed_warms_up():
    rates = LearningRates(OptimizerConfig(learning_rate=1.0, warmup=0.1, decay=0.2, seed_warmup_steps=10), 100)
    assert rates.host_rate(0) == pytest.approx(0.1)
    assert rates.host_rate(50) == rates.host_rate(79) == 1.0
    assert rates.host_rate(90) == pytest.approx(0.5)
    rates.born(1, 40)
    assert rates.seed_rate(1, 40) == pytest.approx(0.1)
    assert rates.seed_rate(1, 50) == pytest.approx(1.0)
