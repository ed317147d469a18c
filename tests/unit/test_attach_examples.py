"""The examples run as they are written, and are as short as they are said to be."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.cli.app import app
from esper_ray.tolaria.trainer import RunRequest, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["own_loop.py", "own_model.py"])
def test_an_example_is_under_40_lines(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) < 40


def test_the_own_loop_grows_in_this_process(capsys):
    model = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))["main"](epochs=12)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 12
    assert any("fossilized" in line for line in lines)
    assert sum(parameter.numel() for parameter in model.parameters()) > 502


def test_the_own_model_is_trained_by_tolaria(tmp_path):
    config = configuration.load(
        None,
        [
            f"home={tmp_path}", "run.task=examples.own_model:build", f"run.code_folder={ROOT}", "run.mode=lockstep",
            "run.epochs=9", "run.boundary_every=17", "run.device=cpu", "tamiyo.plateau_rate=10", "tamiyo.onset=0",
        ],
    )  # fmt: skip
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    assert [(slot.name, slot.signature.kind) for slot in trainer.task.slots] == [("stem", "conv"), ("body", "conv")]
    assert trainer.config.optimizer.learning_rate == 5e-3
    result = trainer.run()
    assert result["parameters"] > result["host_parameters"]
    assert result["isolation_violations"] == 0
    exported = torch.export.load(trainer.folder / "model" / "model.pt2").module()
    assert exported(trainer.task.data.test.inputs[:3]).shape == (3, 10)
    manifest = json.loads((trainer.folder / "manifest.json").read_text())
    assert manifest["config"]["run"]["task"] == "examples.own_model:build"


def test_the_command_line_shows_where_a_model_could_grow(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = CliRunner().invoke(app, ["slots", "examples.own_model:build"])
    assert found.exit_code == 0
    assert "stem  conv  8x8x8" in found.output
    assert "body  conv  16x4x4" in found.output
