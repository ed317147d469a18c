"""A model of one's own, trained by Tolaria: esper run --task examples.own_model:build

With checkpoints, rollback, decisions, a report, and `esper export` at the end. The function's draws are named by the
run's seed. Leave "slots" out, and places are proposed.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(2, 16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


def build() -> dict[str, Any]:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    parts = {"train": slice(0, 1100), "validation": slice(1100, 1450), "test": slice(1450, None)}
    return {
        "model": Small(),
        "data": {name: (images[part], labels[part]) for name, part in parts.items()},
        "loss": F.cross_entropy,
        "slots": {"stem": "conv", "body": "conv"},
        "optimizer": {"learning_rate": 5e-3},
    }
