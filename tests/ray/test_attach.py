"""A model of the user's own on a running system: trained by Tolaria, or in a loop of its own with that Tamiyo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper_ray
from esper_ray.errors import EsperError
from esper_ray.runtime import Session
from tests.ray.conftest import variant

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]


def test_a_function_by_its_import_path_is_trained_by_the_system(system: Session) -> None:
    own = variant(system.config, task="examples.own_model:build", code_folder=str(ROOT), boundary_every=17)

    run_id = system.submit(own)
    final = system.wait(run_id)

    assert run_id.startswith("own_mode")
    result = final["arms"][0]["result"]
    assert result["host_parameters"] == 1466
    assert result["epochs"] == own.run.epochs
    assert (system.config.runs / run_id / "model" / "model.pt2").exists()


@pytest.mark.parametrize(
    ("task", "words"),
    [("examples.nowhere:build", "no module examples.nowhere"), ("examples.own_model:make", "has no function make")],
)
def test_a_path_that_does_not_resolve_arrives_as_one_error(system: Session, task: str, words: str) -> None:
    with pytest.raises(EsperError, match=words):
        system.wait(system.submit(variant(system.config, task=task, code_folder=str(ROOT))))


def test_ones_own_loop_grows_by_the_decisions_of_a_running_system(system: Session) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(600, 8)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long() + 2 * (inputs[:, 2] * inputs[:, 3] > 0).long()
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    settings = esper_ray.load(
        settings=["run.mode=lockstep", "tamiyo.plateau_rate=100", "tamiyo.onset=0", "seeds.shadow_share=1"]
    )
    grower = esper_ray.attach(
        model,
        ["1"],
        loss=F.cross_entropy,
        optimizer=optimizer,
        epochs=10,
        sample=inputs,
        config=settings,
        system=system,
    )

    stages = set()
    for _ in range(10):
        for start in range(0, 400, 40):
            batch, wanted = inputs[start : start + 40], targets[start : start + 40]
            loss = F.cross_entropy(model(batch), wanted)
            loss.backward()
            grower.step(batch, wanted, loss)
            optimizer.step()
            optimizer.zero_grad()
        report = grower.epoch([(inputs[400:], targets[400:])])
        stages |= {event["to"] for event in report.events if event["kind"] == "stage"}
    grower.close()

    assert {"GERMINATED", "TRAINING"} <= stages
    assert grower.garden.violations == 0
