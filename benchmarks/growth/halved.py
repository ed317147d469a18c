"""`glyphs` at half its resolution, [N, 1, 12, 12]: a quarter of the work, so that many random seeds can be paid for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from esper_ray.tasks import glyphs
from esper_ray.tasks.resnet import ResNetLite

DATA = Path("build/growth/data")
SIZES = {"train": 16_000, "validation": 1000, "test": 4000}
DIFFICULTY = 0.5
_MEAN, _DEVIATION = 0.27, 0.18


def split(name: str, samples: int) -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, 12, 12], normalised, and labels [N]."""
    DATA.mkdir(parents=True, exist_ok=True)
    images, labels = glyphs.load_split(DATA, name, samples, difficulty=DIFFICULTY)
    return (F.avg_pool2d(images.float(), 2) / 255 - _MEAN) / _DEVIATION, labels


def build(width: int) -> dict[str, Any]:
    """The task with a host of that width, for ``run.task``."""
    return {
        "model": ResNetLite(channels=1, classes=len(glyphs.CLASSES), width=width),
        "data": {name: split(name, samples) for name, samples in SIZES.items()},
        "loss": F.cross_entropy,
        "slots": dict.fromkeys(ResNetLite.slots, "conv"),
    }


width8, width12 = partial(build, 8), partial(build, 12)
