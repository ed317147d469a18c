"""The table's promises: always the same rows, three splits that share none, and a host whose slots are vectors."""

from __future__ import annotations

import pytest
import torch

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import RunConfig
from esper_ray.tasks import build_task, tabular
from esper_ray.tolaria.trainer import RunRequest, Trainer

TABLE = {"task": "mlp-lite", "dataset": "tabular"}
FEW = {"train_samples": 600, "validation_samples": 100, "test_samples": 100, "host_width": 4}


def test_a_row_does_not_depend_on_how_many_are_asked_for():
    rows, labels = tabular.load_split("train", 2500)
    fewer, their_labels = tabular.load_split("train", 700)
    assert rows.shape == (2500, tabular.COLUMNS)
    assert torch.equal(rows[:700], fewer)
    assert torch.equal(labels[:700], their_labels)


def test_the_splits_share_no_row():
    rows = torch.cat([tabular.load_split(name, 400)[0] for name in ("train", "validation", "test")])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_no_class_is_rare_and_a_linear_model_cannot_tell_them():
    rows, labels = tabular.load_split("train", 8000)
    shares = torch.bincount(labels, minlength=tabular.CLASSES) / len(labels)
    assert float(shares.min()) > 0.05
    wanted = torch.nn.functional.one_hot(labels, tabular.CLASSES).float()
    inputs = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    linear = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    unseen, truth = tabular.load_split("test", 4000)
    found = (torch.cat([unseen, torch.ones(4000, 1)], 1) @ linear).argmax(1)
    assert float((found == truth).float().mean()) < float(shares.max()) + 0.2


def test_its_slots_are_vectors_behind_its_layers(tmp_path):
    task = build_task(RunConfig(**TABLE, **FEW), tmp_path, torch.device("cpu"))
    assert [(slot.name, slot.signature.kind, slot.signature.shape) for slot in task.slots] == [
        ("layer1", "vector", (16,)),
        ("layer2", "vector", (16,)),
    ]


@pytest.mark.usefixtures("one_thread")
def test_a_run_on_a_table_grows_end_to_end(tmp_path):
    settings = [f"run.{key}={value}" for key, value in {**TABLE, **FEW}.items()]
    pace = ["run.mode=lockstep", "run.epochs=8", "run.boundary_every=9", "run.device=cpu", "seeds.shadow_share=1"]
    config = configuration.load(
        None, [f"home={tmp_path}", *settings, *pace, "tamiyo.plateau_rate=10", "tamiyo.onset=0"]
    )
    result = Trainer(RunRequest("r", config), inprocess.surroundings(config)).run()
    assert result["parameters"] > result["host_parameters"]
    assert result["isolation_violations"] == 0
