"""The tasks' promises: data without downloads, drawn once and always the same, in three splits that share nothing."""

from __future__ import annotations

import pytest
import torch

from esper_ray.config import RunConfig
from esper_ray.errors import ConfigError
from esper_ray.tasks import build_task, data, glyphs

SMALL = {"train_samples": 300, "validation_samples": 100, "test_samples": 100}
CPU = torch.device("cpu")


def test_glyphs_are_the_same_in_every_folder_and_cached(tmp_path):
    first = data.load(RunConfig(**SMALL), tmp_path / "a")
    second = data.load(RunConfig(**SMALL), tmp_path / "b")
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.test.targets, second.test.targets)
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 3
    before = [file.stat().st_mtime_ns for file in files]
    data.load(RunConfig(**SMALL), tmp_path / "a")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_the_splits_share_no_image(tmp_path):
    loaded = data.load(RunConfig(**SMALL), tmp_path)
    images = torch.cat([split.inputs.flatten(1) for split in (loaded.train, loaded.validation, loaded.test)])
    assert len(torch.unique(images, dim=0)) == len(images)


def test_difficulty_changes_the_images_and_every_class_occurs(tmp_path):
    easy, easy_labels = glyphs.load_split(tmp_path, "train", 2000, difficulty=0.2)
    hard, _ = glyphs.load_split(tmp_path, "train", 2000, difficulty=1.5)
    assert easy.dtype is torch.uint8
    assert easy.shape == (2000, 1, glyphs.SIZE, glyphs.SIZE)
    assert set(easy_labels.tolist()) == set(range(len(glyphs.CLASSES)))
    assert not torch.equal(easy, hard)


def test_every_font_draws_every_class_differently():
    templates = glyphs.draw_templates()
    assert templates.shape[0] == len(glyphs.font_files()) >= 10
    for font in templates:
        assert (font.amax((1, 2)) > 0.5).all()
        assert len(torch.unique(font.flatten(1), dim=0)) == len(glyphs.CLASSES)


def test_digits_are_split_by_the_runs_seed(tmp_path):
    first, again, other = (data.load(RunConfig(dataset="digits", seed=seed), tmp_path) for seed in (0, 0, 1))
    assert torch.equal(first.train.targets, again.train.targets)
    assert not torch.equal(first.train.targets, other.train.targets)
    assert sum(map(len, (first.train, first.validation, first.test))) == 1797


def test_a_host_is_a_function_of_the_runs_seed_and_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    models = [build_task(RunConfig(dataset="digits", seed=seed), tmp_path, CPU).model for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.stage1[0].weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_slots_have_the_shapes_that_one_dry_forward_shows(tmp_path):
    task = build_task(RunConfig(**SMALL), tmp_path, CPU)
    assert [slot.signature.shape for slot in task.slots] == [(16, 24, 24), (32, 12, 12), (64, 6, 6)]


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.batch_size"):
        build_task(RunConfig(**SMALL, batch_size=400), tmp_path, CPU)
