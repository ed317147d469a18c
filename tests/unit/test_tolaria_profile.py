"""A profile is made of the epochs that it was asked for, changes nothing, and is refused for those that are over."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

from esper_ray import config as configuration
from esper_ray import inprocess, runs
from esper_ray.cli.app import app
from esper_ray.errors import RunError
from esper_ray.simic.episode import Kernels
from esper_ray.tolaria import profile_files, profiling
from esper_ray.tolaria.trainer import RunRequest, Stopped, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "run.dataset=digits",
    "run.mode=lockstep",
    "run.boundary_every=4",
    "run.host_width=4",
    "run.device=cpu",
    "run.epochs=4",
)


def trainer_at(home, *given, **request):
    config = configuration.load(None, [f"home={home}", *TINY, *given])
    return Trainer(RunRequest("r", config, **request), inprocess.surroundings(config, kernels=Kernels()))


def test_without_a_wish_there_is_no_profile_and_with_one_the_weights_are_the_same(tmp_path):
    plain, profiled = trainer_at(tmp_path / "a"), trainer_at(tmp_path / "b", "run.profile_epochs=[2]")
    plain.run()
    profiled.run()
    assert not (plain.folder / "profile").exists()
    assert sorted(file.name for file in (profiled.folder / "profile").iterdir()) == [
        "epoch-000002.json.gz",
        "epoch-000002.txt",
    ]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, profiled.model.state_dict()[name]), name
    table, trace = runs.profile_of(profiled.config.runs, "r", 2)
    assert "esper: training step: 4 x" in table
    assert "esper: boundary: 1 x" in table
    assert "aten::" in table
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert set(profiling.PARTS.values()) <= names


def stopped_in(home, epoch):
    trainer = trainer_at(home)
    step = trainer.train_step

    def train_step():
        if trainer.epoch + 1 == epoch:
            raise Stopped
        step()

    trainer.train_step = train_step
    with pytest.raises(Stopped):
        trainer.run()
    return trainer


def test_a_run_that_trains_is_asked_by_command_and_shows_the_profile_afterwards(tmp_path):
    trainer = stopped_in(tmp_path, 2)
    settings = ["--set", f"home={tmp_path}"]
    asked = CliRunner().invoke(app, ["profile", "r", "--epoch", "3", *settings])
    assert asked.exit_code == 0
    assert "epoch 3 will be profiled" in asked.output
    assert runs.profile_of(trainer.config.runs, "r", 3) is None
    trainer_at(tmp_path, resume=True).run()
    shown = CliRunner().invoke(app, ["profile", "r", "--epoch", "3", "--wait", *settings])
    assert "esper: boundary" in shown.output
    assert not profile_files.wanted_file(trainer.folder, 3).exists()


def test_the_next_epoch_is_the_one_after_the_one_that_is_being_trained(tmp_path):
    trainer = stopped_in(tmp_path, 2)
    assert runs.ask_for_profile(trainer.config.runs, "r") == 3


@pytest.mark.parametrize("epoch", [1, 5])
def test_an_epoch_that_is_over_or_will_never_be_is_refused(tmp_path, epoch):
    trainer = stopped_in(tmp_path, 2)
    with pytest.raises(RunError, match="cannot be profiled"):
        runs.ask_for_profile(trainer.config.runs, "r", epoch)


def test_a_finished_run_cannot_be_asked_any_more(tmp_path):
    trainer = trainer_at(tmp_path)
    trainer.run()
    with pytest.raises(RunError, match="cannot be profiled"):
        runs.ask_for_profile(trainer.config.runs, "r", 4)
