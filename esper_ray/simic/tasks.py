"""The short tasks of Simic's episodes: small hosts on small pictures, some of which gain by growing and some do not.

A task is drawn from a grid. Whole regions of it are held out: every task with a host of width 6, a difficulty of 0.3
or 0.55 (between those that are trained on) or of 0.85 (beyond them) is for evaluation only, never drawn for training.

Pictures are `glyphs` at half their size, [1, 12, 12], of a few classes that the task's seed names, or the 8 x 8
`digits`. An episode reads no test split: it has none.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_ray.config import Config, build
from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import data
from esper_ray.tasks.data import DataSet, Split

SplitName = Literal["train", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "held_out")

TRAIN_WIDTHS, HELD_OUT_WIDTHS = (4, 5, 8), (6,)
TRAIN_DIFFICULTIES, HELD_OUT_DIFFICULTIES = (0.2, 0.4, 0.7), (0.3, 0.55, 0.85)
CLASSES = (6, 12, 24)
TRAIN_SAMPLES = (256, 800)
EPOCHS = (10, 12, 14)
STEPS = (8, 12)
LEARNING_RATES = (5e-3, 1e-2, 2e-2)
DIGITS_SHARE = 0.15

BATCH = 32
MEASURED_STEPS = 3
"""The host's cost is measured in its third step, and everything else is told as a ratio to it."""
VALIDATION_SAMPLES = 320
MAX_PARAMETERS = 30_000
"""The limit of a model: the largest hosts have no room for the strongest block in every slot."""
_POOL = {"train": 4000, "validation": 2000}
_TEST_POOL = 32


@dataclass(frozen=True, slots=True)
class ShortTask:
    """One task, and with its seed one run.

    Attributes:
        difficulty: of glyphs; digits come as they are.
        classes: how many of the data set's classes it has.
        width: channels of the host's first stage.
        steps: in each of the ``epochs``, of 32 samples.
        seed: names the classes, the samples and all random draws of the run.

    Raises:
        ValueError: the data set is unknown, or too few classes, samples, epochs or steps.
    """

    dataset: Literal["glyphs", "digits"]
    difficulty: float
    classes: int
    width: int
    train_samples: int
    epochs: int
    steps: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.dataset not in ("glyphs", "digits"):
            raise ValueError(f"there is no data set {self.dataset!r}")
        least = {"classes": 2, "train_samples": BATCH, "epochs": 2, "steps": MEASURED_STEPS, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}, below {bound}")

    @property
    def held_out(self) -> bool:
        """Whether it lies in a region that is never trained on."""
        hard = self.dataset == "glyphs" and self.difficulty not in TRAIN_DIFFICULTIES
        return hard or self.width not in TRAIN_WIDTHS

    def config(self) -> Config:
        """The configuration of its run: lockstep, on one processor, with seeds that warm up within an epoch."""
        return build(
            {
                "run": {
                    "dataset": self.dataset,
                    "difficulty": self.difficulty,
                    "seed": self.seed,
                    "mode": "lockstep",
                    "device": "cpu",
                    "epochs": self.epochs,
                    "boundary_every": self.steps,
                    "batch_size": BATCH,
                    "host_width": self.width,
                    "train_samples": self.train_samples,
                    "validation_samples": VALIDATION_SAMPLES,
                    "max_parameters": MAX_PARAMETERS,
                },
                "optimizer": {"learning_rate": self.learning_rate, "seed_warmup_steps": self.steps},
            }
        )

    def data(self, folder: Path) -> DataSet:
        """Its pictures, from pools that are drawn once and cached in ``folder`` and in this process."""
        generator = torch.Generator().manual_seed(derive_seed("short task", self.seed))
        pool = _pool(folder, self.dataset, self.difficulty if self.dataset == "glyphs" else 0.0)
        chosen = torch.randperm(pool.classes, generator=generator)[: self.classes]
        empty = Split(pool.train.inputs[:0], pool.train.targets[:0])
        return DataSet(
            train=_take(pool.train, chosen, self.train_samples, generator),
            validation=_take(pool.validation, chosen, VALIDATION_SAMPLES, generator),
            test=empty,
            classes=self.classes,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values, for logs and `info`."""
        return asdict(self)


def sample_task(seed: int, *, split: SplitName = "train") -> ShortTask:
    """The task that ``seed`` names, of the part that is trained on or of the part held out.

    Raises:
        ValueError: there is no such part.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is none of {SPLITS}")
    draw = random.Random(derive_seed("short task", split, seed))
    digits = draw.random() < DIGITS_SHARE
    difficulty, width = draw.choice(_regions(split, digits=digits))
    return ShortTask(
        dataset="digits" if digits else "glyphs",
        difficulty=difficulty,
        classes=10 if digits else draw.choice(CLASSES),
        width=width,
        train_samples=draw.choice(TRAIN_SAMPLES),
        epochs=draw.choice(EPOCHS),
        steps=draw.choice(STEPS),
        learning_rate=draw.choice(LEARNING_RATES),
        seed=draw.randrange(2**31),
    )


def _regions(split: SplitName, *, digits: bool) -> list[tuple[float, int]]:
    """(difficulty, width) of each cell of the grid that belongs to ``split``."""
    difficulties = (0.0,) if digits else TRAIN_DIFFICULTIES + HELD_OUT_DIFFICULTIES
    cells = itertools.product(difficulties, TRAIN_WIDTHS + HELD_OUT_WIDTHS)

    def trained_on(difficulty: float, width: int) -> bool:
        return width in TRAIN_WIDTHS and (digits or difficulty in TRAIN_DIFFICULTIES)

    return [cell for cell in cells if trained_on(*cell) == (split == "train")]


@lru_cache(maxsize=8)
def _pool(folder: Path, dataset: str, difficulty: float) -> DataSet:
    """All that there is of a data set at that difficulty, pictures at the size the episodes use."""
    run = build(
        {
            "run": {
                "dataset": dataset,
                "difficulty": difficulty,
                "train_samples": _POOL["train"],
                "validation_samples": _POOL["validation"],
                "test_samples": _TEST_POOL,
            }
        }
    ).run
    whole = data.load(run, folder)
    if dataset == "digits":
        return whole
    return DataSet(_halved(whole.train), _halved(whole.validation), whole.test, whole.classes)


def _halved(split: Split) -> Split:
    """[N, 1, 2H, 2W] -> [N, 1, H, W] by averaging."""
    return Split(F.avg_pool2d(split.inputs, 2), split.targets)


def _take(split: Split, chosen: Tensor, count: int, generator: torch.Generator) -> Split:
    """At most ``count`` samples of the ``chosen`` classes, which are numbered anew from 0."""
    number = torch.full((int(split.targets.max()) + 1,), -1)
    number[chosen] = torch.arange(len(chosen))
    there = torch.nonzero(number[split.targets] >= 0).flatten()
    there = there[torch.randperm(len(there), generator=generator)[:count]]
    return Split(split.inputs[there], number[split.targets[there]])
