"""`glyphs` at half its resolution with a host of half the width: a sixteenth of the work, for many small trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from esper_ray.tasks import glyphs
from esper_ray.tasks.resnet import ResNetLite

DATA = Path("build/recipe/data")
MEAN, DEVIATION = 0.27, 0.18
SIZES = {"train": 16_000, "validation": 1000, "test": 500}
DIFFICULTY = 0.5
SELECTION = 4000


def split(name: str, samples: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, 12, 12], normalised, and labels [N]."""
    DATA.mkdir(parents=True, exist_ok=True)
    images, labels = glyphs.load_split(DATA, name, samples, difficulty=DIFFICULTY, seed=seed)
    return (F.avg_pool2d(images.float(), 2) / 255 - MEAN) / DEVIATION, labels


def build() -> dict[str, Any]:
    """The task, for ``run.task=benchmarks.recipe.small:build``."""
    return {
        "model": ResNetLite(channels=1, classes=len(glyphs.CLASSES), width=8),
        "data": {name: split(name, samples) for name, samples in SIZES.items()},
        "loss": F.cross_entropy,
        "slots": dict.fromkeys(ResNetLite.slots, "conv"),
        "optimizer": {"learning_rate": 1e-2},
    }
