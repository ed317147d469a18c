"""Blend modes in whole runs: a run killed on its ramp goes on bit for bit, and a final-size model is blended alike."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.kasmina.blending import MODES
from esper_ray.tolaria.trainer import Block, RunRequest, Stopped, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = (
    "run.dataset=digits", "run.mode=lockstep", "run.epochs=6", "run.host_width=8", "run.boundary_every=12",
    "run.device=cpu", "tamiyo.plateau_rate=10", "tamiyo.onset=0", "seeds.blend_mode=confidence",
    "seeds.blend_schedule=cosine",
)  # fmt: skip


def trainer(home, *, resume=False, **changes) -> Trainer:
    config = configuration.load(None, [f"home={home}", *SETTINGS])
    around = replace(inprocess.surroundings(config), **changes)
    return Trainer(RunRequest("r", config, resume=resume), around)


def test_a_run_stopped_on_a_ramp_by_confidence_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    whole = trainer(tmp_path / "a")
    result = whole.run()
    assert {block["blend_mode"] for block in result["blocks"]} == {"confidence"}
    stopped = []

    def on_the_ramp() -> bool:
        ramping = [seed for seed in first.garden.in_stage(Stage.BLENDING) if 0.3 < seed.alpha < 0.8]
        stopped.extend(ramping)
        return bool(ramping)

    first = trainer(tmp_path / "b", should_stop=on_the_ramp)
    with pytest.raises(Stopped):
        first.run()
    assert stopped
    second = trainer(tmp_path / "b", resume=True)
    second.run()
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert len(second.recorder.folder.joinpath("events.jsonl").read_text()) > 0


@pytest.mark.parametrize("mode", list(MODES))
def test_a_final_size_model_from_scratch_is_blended_as_the_grown_one_was(mode, tmp_path):
    config = configuration.load(None, [f"home={tmp_path}", *SETTINGS, "run.epochs=2"])
    rows = [{"slot": 0, "blueprint": "BP004", "parameters": {}, "blend_mode": mode}]
    request = RunRequest("r", config, arm="final", blocks=tuple(map(Block.of, rows)))
    made = Trainer(request, inprocess.surroundings(config))
    result = made.run()
    assert result["blocks"] == rows
    assert json.loads((made.folder / "manifest.json").read_text())["blocks"] == rows
    assert json.loads((made.folder / "model" / "model.json").read_text())["blocks"][0]["blend_mode"] == mode
