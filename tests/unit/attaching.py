"""Models as users write them, and a loop as users write it, for the tests of `attach`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import esper_ray
from esper_ray.attaching import EpochReport, Grower
from esper_ray.tasks import pycode

EAGER = (
    "run.mode=lockstep",
    "tamiyo.plateau_rate=100",
    "tamiyo.onset=0",
    "tamiyo.warmup_epochs=1",
    "tamiyo.seeds_at_once=2",
    "optimizer.seed_warmup_steps=4",
    "seeds.shadow_share=1",
    "seeds.monitor_every=5",
)
"""Grow as soon as possible, and train and watch isolated seeds in each step."""


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(F.relu(self.conv2(F.relu(self.conv1(x))))).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 10)
    )


class SmallViT(nn.Module):
    """PyTorch's own encoder layers, a class token, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat((self.token.expand(len(x), -1, -1), h), 1) + self.places
        return self.head(self.encoder(h).mean(1))


class Double(nn.Sequential):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two levels, a skip, batch normalisation; one label for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = Double(1, 6), Double(6, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.up1, self.out = Double(12, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        return self.out(self.up1(torch.cat((first, self.up(second)), 1)))


class GPTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln1(x)
        later = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).triu(1)
        x = x + self.attn(h, h, h, attn_mask=later, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class SmallGPT(nn.Module):
    """Tied weights: the head is the embedding."""

    def __init__(self, width: int = 16, context: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(context, width)
        self.h = nn.ModuleList([GPTBlock(width) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(bunch.target)[order]


def pixels() -> tuple[Tensor, Tensor]:
    """Each pixel's label: off, on, or on in the upper half."""
    images, _ = digits()
    on = (images[:, 0] > 0.4).long()
    on[:, :4] *= 2
    return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1)), on


def text() -> tuple[Tensor, Tensor]:
    return pycode.load_split("train", 1200, 16)


@dataclass
class Loop:
    """A user's loop. ``run`` is the model that is called: the attached one, or a wrapper around it.

    ``after``: our line comes after the optimizer's step.
    """

    model: nn.Module
    data: tuple[Tensor, Tensor]
    slots: Any = "auto"
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    settings: Sequence[str] = EAGER
    epochs: int = 12
    batches: int = 10
    rate: float = 3e-3
    accumulate: int = 1
    after: bool = False
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model
    attach: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate)
        self.grower: Grower = esper_ray.attach(
            self.model, self.slots, loss=self.loss, optimizer=self.optimizer, epochs=self.epochs,
            config=list(self.settings), accumulate=self.accumulate,
            **{"sample": self.data[0][:4], **self.attach},
        )  # fmt: skip
        self.run = self.wrap(self.model)
        self.generator = torch.Generator().manual_seed(0)
        self.events: list[dict[str, Any]] = []

    def epoch(self) -> EpochReport:
        inputs, targets = self.data
        for _ in range(self.batches):
            for _ in range(self.accumulate):
                chosen = torch.randint(900, (32,), generator=self.generator)
                batch, wanted = inputs[chosen], targets[chosen]
                with self.precision():
                    found = self.loss(self.run(batch), wanted) / self.accumulate
                found.backward()
            if not self.after:
                self.grower.step(batch, wanted, found)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.after:
                self.grower.step(batch, wanted, found)
        report = self.grower.epoch([(inputs[900:], targets[900:])])
        self.events += report.events
        return report

    def all(self) -> list[EpochReport]:
        return [self.epoch() for _ in range(self.epochs)]

    def until(self, stage: str) -> list[EpochReport]:
        """Go on until a seed has come to that stage, or the epochs are over."""
        reports = []
        while stage not in self.stages() and len(reports) < self.epochs:
            reports.append(self.epoch())
        return reports

    def stages(self) -> set[str]:
        return {event["to"] for event in self.events if event["kind"] == "stage"}


def sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
