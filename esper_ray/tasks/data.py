"""Data sets as three splits of tensors. Decisions and rewards see `validation`; `test` is read once, at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_ray.config import RunConfig
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import cifar10, glyphs, pycode, tabular
from esper_ray.tasks.objective import CLASSIFICATION, Objective

CHUNK, CHUNK_BYTES = 500, 2**23
_GLYPH_MEAN, _GLYPH_DEVIATION = 0.27, 0.21


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs [N, ...] and targets [N, ...], and what is asked of them.

    Pictures are [N, C, H, W] in float32, normalised, with class labels [N]; rows of a table are [N, columns]; sequences
    are [N, T] numbers of bytes.
    """

    inputs: Tensor
    targets: Tensor
    objective: Objective = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        return Split(self.inputs.to(device), self.targets.to(device), self.objective)

    @property
    def chunk(self) -> int:
        """How many samples are measured at once: 500, or what fits 8 MiB of inputs."""
        size = self.inputs[:1].numel() * self.inputs.element_size()
        return max(1, min(CHUNK, CHUNK_BYTES // max(1, size)))


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
    """The data set that ``config`` names; drawn or read once, glyphs then cached in ``folder``.

    Raises:
        ConfigError, DataError: the data are not there, damaged, or fewer than was asked for.
    """
    if config.dataset == "pycode":
        return DataSet(*_shares(config, lambda name, n: pycode.load_split(name, n, config.context)), pycode.CLASSES)
    if config.dataset == "tabular":
        return DataSet(*_shares(config, tabular.load_split), tabular.CLASSES)
    if config.dataset == "cifar10":
        train, validation, test = cifar10.load(Path(config.data_folder), _sizes(config))
        return DataSet(Split(*train), Split(*validation), Split(*test), cifar10.CLASSES)
    return _digits(config) if config.dataset == "digits" else _glyphs(config, folder)


def _sizes(config: RunConfig) -> tuple[int, int, int]:
    return config.train_samples, config.validation_samples, config.test_samples


def _shares(config: RunConfig, read: Callable[[str, int], tuple[Tensor, Tensor]]) -> tuple[Split, Split, Split]:
    train, validation, test = (
        Split(*read(name, size)) for name, size in zip(("train", "validation", "test"), _sizes(config), strict=True)
    )
    return train, validation, test


def _glyphs(config: RunConfig, folder: Path) -> DataSet:
    def read(name: str, samples: int) -> tuple[Tensor, Tensor]:
        images, labels = glyphs.load_split(folder, name, samples, difficulty=config.difficulty)
        return (images.float() / 255 - _GLYPH_MEAN) / _GLYPH_DEVIATION, labels

    return DataSet(*_shares(config, read), len(glyphs.CLASSES))


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
