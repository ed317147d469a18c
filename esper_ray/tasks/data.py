"""Data sets as three splits of tensors. Decisions and rewards see `validation`; `test` is read once, at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_ray.config import RunConfig
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import glyphs

_GLYPH_MEAN, _GLYPH_DEVIATION = 0.27, 0.21


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs [N, C, H, W] in float32, normalised, and class labels [N]."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True, slots=True)
class DataSet:
    """The three splits and what a model needs to know of them."""

    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])


def load(config: RunConfig, folder: Path) -> DataSet:
    """The data set that ``config`` names; drawn or read once, then cached in ``folder``."""
    return _digits(config) if config.dataset == "digits" else _glyphs(config, folder)


def _glyphs(config: RunConfig, folder: Path) -> DataSet:
    def split(name: str, samples: int) -> Split:
        images, labels = glyphs.load_split(folder, name, samples, difficulty=config.difficulty)
        return Split((images.float() / 255 - _GLYPH_MEAN) / _GLYPH_DEVIATION, labels)

    return DataSet(
        train=split("train", config.train_samples),
        validation=split("validation", config.validation_samples),
        test=split("test", config.test_samples),
        classes=len(glyphs.CLASSES),
    )


def _digits(config: RunConfig) -> DataSet:
    """scikit-learn's 1,797 digits of 8 x 8, split 60/20/20 by the run's seed.

    The UCI "Optical Recognition of Handwritten Digits" test set.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images.astype(np.float32) / 16 - 0.305) / 0.376).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "digits split"))
    order = torch.randperm(len(labels), generator=generator)
    train, validation = int(0.6 * len(order)), int(0.8 * len(order))
    parts = (order[:train], order[train:validation], order[validation:])
    train_split, validation_split, test_split = (Split(images[part], labels[part]) for part in parts)
    return DataSet(train_split, validation_split, test_split, classes=10)
