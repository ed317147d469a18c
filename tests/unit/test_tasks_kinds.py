"""The kinds of tasks: bytes of a library, CIFAR-10 from a folder, and functions of the user's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from esper_ray import config as configuration
from esper_ray import inprocess
from esper_ray.config import OptimizerConfig, RunConfig
from esper_ray.errors import ConfigError, DataError, HostError
from esper_ray.karn import blueprints
from esper_ray.karn.catalog import CATALOG
from esper_ray.tasks import build_task, cifar10, data, pycode
from esper_ray.tasks.objective import CLASSIFICATION, from_loss
from esper_ray.tasks.own import make, optimizer_settings
from esper_ray.tasks.transformer import TransformerLite
from esper_ray.tolaria.trainer import RunRequest, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = {"train_samples": 300, "validation_samples": 64, "test_samples": 64, "batch_size": 32}
TEXT = {**SMALL, "task": "transformer-lite", "dataset": "pycode", "context": 16, "host_width": 4}


# pycode


def test_pycode_is_the_next_byte_and_the_same_each_time():
    inputs, targets = pycode.load_split("train", 200, 32)
    assert inputs.shape == targets.shape == (200, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again, _ = pycode.load_split("train", 200, 32)
    assert torch.equal(inputs, again)
    assert b"def " in bytes(inputs.flatten().tolist())


def test_no_file_of_the_library_is_in_two_splits():
    files = pycode.source_files()
    assert all(len(found) > 10 for found in files.values())
    everything = [file for found in files.values() for file in found]
    assert len(set(everything)) == len(everything)


def test_more_bytes_than_the_library_has_are_refused():
    with pytest.raises(DataError, match=r"fewer than 90,000,000.*run\.train_samples"):
        pycode.load_split("train", 90_000_000, 64)


# transformer-lite


def test_no_position_sees_what_comes_after_it_whatever_grows():
    model = TransformerLite(classes=256, context=12, width=16)
    task = build_task(RunConfig(**TEXT), Path("unused"), CPU)
    tokens = torch.randint(256, (2, 12))
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 256
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :7], model(later)[:, :7])
    signature = task.slots[0].signature
    h = torch.randn(2, *signature.shape, requires_grad=True)
    for blueprint in CATALOG.query(signature).candidates:
        branch = blueprints.build(blueprint.id, signature).eval()
        output = h + branch(h)
        (gradient,) = torch.autograd.grad(output[:, :7].square().sum(), h)
        assert not gradient[:, 7:].any(), f"{blueprint.id} ({blueprint.name}) looks ahead"


def test_its_slots_are_sequences_behind_its_blocks(tmp_path):
    task = build_task(RunConfig(**TEXT), tmp_path, CPU)
    assert [(slot.name, slot.signature.kind, slot.signature.shape) for slot in task.slots] == [
        ("block1", "sequence", (16, 16)),
        ("block2", "sequence", (16, 16)),
    ]
    assert task.slots[0].index == 0
    loss = task.loss(task.model(task.data.train.inputs[:8]), task.data.train.targets[:8])
    assert float(loss.detach()) == pytest.approx(np.log(256), rel=0.2)


def test_a_run_on_pycode_grows_end_to_end(tmp_path):
    settings = [f"run.{key}={value}" for key, value in {**TEXT, "train_samples": 2000}.items()]
    pace = ["run.mode=lockstep", "run.epochs=9", "run.boundary_every=20", "run.device=cpu", "seeds.shadow_share=1"]
    growth = ["optimizer.learning_rate=0.005", "tamiyo.plateau_rate=10", "tamiyo.onset=0", "tamiyo.seeds_at_once=1"]
    config = configuration.load(None, [f"home={tmp_path}", *settings, *pace, *growth])
    trainer = Trainer(RunRequest("r", config), inprocess.surroundings(config))
    result = trainer.run()
    assert result["isolation_violations"] == 0
    stages = {
        row["to"]
        for row in map(json.loads, (trainer.folder / "events.jsonl").read_text().splitlines())
        if row["kind"] == "stage"
    }
    assert stages >= {"TRAINING", "BLENDING", "SHADOWING"}
    assert result["parameters"] > result["host_parameters"]
    inputs = trainer.task.data.test.inputs[:3]
    exported = torch.export.load(trainer.folder / "model" / "model.pt2").module()
    assert exported(inputs).shape == (3, 16, 256)


@pytest.mark.parametrize(
    ("task", "dataset", "remedy"),
    [("transformer-lite", "glyphs", "run.dataset=pycode"), ("resnet-lite", "pycode", "run.dataset=glyphs")],
)
def test_a_host_and_data_that_do_not_go_together_are_refused(tmp_path, task, dataset, remedy):
    with pytest.raises(ConfigError, match=remedy):
        build_task(RunConfig(task=task, dataset=dataset), tmp_path, CPU)


def test_a_host_over_the_limit_is_refused_with_its_count(tmp_path):
    with pytest.raises(HostError, match=r"has [\d,]+ parameters, more than 1,000.*run\.host_limit"):
        build_task(RunConfig(**{**TEXT, "host_limit": 1000}), tmp_path, CPU)


# CIFAR-10


RECORDS = 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six files in the published format, of fewer records."""
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)
    place = tmp_path / cifar10.FOLDER
    place.mkdir()
    draw = np.random.default_rng(0)
    for name in (*cifar10.TRAIN_FILES, cifar10.TEST_FILE):
        labels = draw.integers(0, 10, (RECORDS, 1), dtype=np.uint8)
        planes = np.concatenate([np.full((RECORDS, 1024), colour, np.uint8) for colour in (255, 128, 0)], axis=1)
        planes[:, 0] = draw.permutation(RECORDS)
        np.concatenate([labels, planes], axis=1).tofile(place / name)
    return tmp_path


def cifar(folder, **changes):
    return RunConfig(**{**SMALL, "dataset": "cifar10", "data_folder": str(folder), **changes})


def test_cifar_10_is_read_in_the_published_format(folder):
    loaded = data.load(cifar(folder), folder)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [180, 20, 40]
    assert loaded.sample_shape == (3, 32, 32)
    image = loaded.train.inputs[0]
    expected = [(colour / 255 - mean) / deviation for colour, mean, deviation in zip(
        (255, 128, 0), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), strict=True)]  # fmt: skip
    assert image[:, 1, 1].tolist() == pytest.approx(expected, abs=1e-4)
    raw = np.fromfile(folder / cifar10.FOLDER / cifar10.TEST_FILE, np.uint8).reshape(RECORDS, -1)
    assert sorted(loaded.test.targets.tolist()) == sorted(raw[:, 0].tolist())


def test_the_files_may_lie_in_the_folder_itself_and_a_host_is_built_on_them(folder):
    task = build_task(cifar(folder / cifar10.FOLDER, train_samples=100, host_width=8), folder, CPU)
    assert task.slots[0].signature.shape == (8, 32, 32)
    assert len(task.data.train) == 100


def test_a_missing_a_cut_and_a_foreign_file_are_each_named(folder):
    file = folder / cifar10.FOLDER / "data_batch_3.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"data_batch_3.bin has 122,820 bytes instead of 122,920.*cut off"):
        data.load(cifar(folder), folder)
    file.write_bytes(bytes([77]) + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_3.bin has labels above 9"):
        data.load(cifar(folder), folder)
    file.unlink()
    with pytest.raises(DataError, match=r"data_batch_3.bin is not there.*run\.data_folder"):
        data.load(cifar(folder), folder)


# Tasks of one's own

GOOD = """
import torch
from torch import nn

def build():
    x, y = torch.randn(90, 6), torch.randint(3, (90,))
    part = lambda a, b: (x[a:b], y[a:b])
    return {"model": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "loss": nn.functional.cross_entropy,
            "data": {"train": part(0, 60), "validation": part(60, 75), "test": part(75, 90)},
            "optimizer": {"learning_rate": 0.02, "clip_norm": 0.5}}

def own(**changes):
    return {**build(), **changes}
"""


def own(tmp_path, code="", name="build", **changes):
    (tmp_path / "mine.py").write_text(GOOD + code)
    return RunConfig(task=f"mine:{name}", code_folder=str(tmp_path), batch_size=16, **changes)


def test_a_function_gives_model_data_loss_and_settings(tmp_path):
    task = build_task(own(tmp_path), tmp_path, CPU)
    assert [slot.name for slot in task.slots] == ["1"]
    assert len(task.data.validation) == 15
    assert task.data.classes == 3
    settings = optimizer_settings(task.optimizer, OptimizerConfig())
    assert (settings.learning_rate, settings.clip_norm) == (0.02, 0.5)
    assert optimizer_settings(task.optimizer, OptimizerConfig(learning_rate=0.3)).learning_rate == 0.3
    with pytest.raises(ConfigError, match="optimizer settings of the task"):
        optimizer_settings({"momentum": 1}, OptimizerConfig())


def test_what_it_draws_is_named_by_the_runs_seed_and_its_edits_are_seen(tmp_path):
    first, again, other = (make(own(tmp_path, seed=seed)).model[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    late = own(tmp_path, "\ndef late():\n    return own(slots=['0'])\n", name="late")
    assert make(late).slots == ["0"]
    assert str(tmp_path) not in sys.path


def test_data_sets_are_read_through(tmp_path):
    code = """
class Pairs(torch.utils.data.Dataset):
    def __len__(self): return 20
    def __getitem__(self, index): return torch.full((6,), float(index)), index % 3

def sets(): return own(data={name: Pairs() for name in ("train", "validation", "test")})
"""
    made = make(own(tmp_path, code, name="sets"))
    assert made.data.train.inputs[:, 0].tolist() == list(range(20))
    assert made.data.test.targets.tolist() == [index % 3 for index in range(20)]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("absent", "", "mine has no function absent.*It has: build, own"),
        ("fails", "def fails(): raise RuntimeError('no such file')", "mine:fails failed.*RuntimeError: no such file"),
        ("nothing", "def nothing(): pass", "returned a NoneType.*model, data and loss"),
        ("lacks", "def lacks(): return {'model': nn.ReLU()}", "lacks data, loss"),
        ("extra", "def extra(): return own(lr=1)", "unknown keys: lr"),
        ("number", "def number(): return own(model=3)", "model of mine:number is a int"),
        ("text", "def text(): return own(loss='mse')", "loss of mine:text cannot be called"),
        ("two", "def two(): return own(data={'train': 1, 'test': 2})", "not three splits"),
        ("short", "def short(): return own(data=dict.fromkeys(('train', 'validation', 'test'), (torch.ones(3), torch.ones(2))))", "inputs and targets of equal length"),  # noqa: E501
        ("few", "def few(): return own(data=dict.fromkeys(('train', 'validation', 'test'), (torch.ones(1), torch.ones(1))))", "have 1 samples"),  # noqa: E501
        ("where", "def where(): return own(slots=['linear'])", "no module 'linear'"),
    ],
)  # fmt: skip
def test_a_function_that_returns_nonsense_is_refused_with_the_reason(tmp_path, name, code, words):
    with pytest.raises(HostError, match=words):
        build_task(own(tmp_path, f"\n{code}\n", name=name), tmp_path, CPU)


def test_a_path_that_does_not_resolve_is_refused(tmp_path):
    with pytest.raises(HostError, match=r"There is no module nowhere for nowhere.deep:f.*run\.code_folder"):
        make(RunConfig(task="nowhere.deep:f", code_folder=str(tmp_path)))
    (tmp_path / "broken.py").write_text("import\n")
    with pytest.raises(HostError, match=r"broken:f cannot be imported.*SyntaxError"):
        make(RunConfig(task="broken:f", code_folder=str(tmp_path)))


# Objectives


def test_losses_of_samples_have_the_batchs_mean():
    outputs, targets = torch.randn(6, 5, 7), torch.randint(7, (6, 5))
    assert torch.allclose(CLASSIFICATION.losses(outputs, targets).mean(), CLASSIFICATION.loss(outputs, targets))
    made = from_loss(F.mse_loss)
    outputs, targets = torch.randn(6, 3), torch.randn(6, 3)
    assert torch.allclose(made.losses(outputs, targets).mean(), F.mse_loss(outputs, targets))
    assert ((made.score(outputs, targets) > 0) & (made.score(outputs, targets) < 1)).all()


def test_accuracy_counts_positions_wherever_the_classes_are():
    targets = torch.randint(4, (5, 6))
    right = F.one_hot(targets, 4).float()
    assert CLASSIFICATION.score(right, targets).tolist() == [1.0] * 5
    pictures = torch.randint(3, (2, 6, 5))
    assert from_loss(F.cross_entropy).score(F.one_hot(pictures, 3).float().movedim(-1, 1), pictures).tolist() == [1, 1]
