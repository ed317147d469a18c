"""What the study trains. Everything here was fixed before the study's runs; what was tuned says how in `TUNING`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.tolaria.trainer import Block

Metric = Literal["points", "bits"]

COMMON = ("run.mode=lockstep", "run.device=cpu", "run.threads=1", "tamiyo.record=false", "tamiyo.controller=heuristic")
TUNING = (
    "Eight trials for each of host, final and grown, runs of half the steps, judged by the loss on the validation "
    "split: half, once, twice and four times the default peak rate with one random seed, then the two best of these "
    "with two more, all with warm-up-stable-decay. What else grows has the rate of grown."
)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A family's peak learning rate and schedule."""

    learning_rate: float
    schedule: str = "wsd"

    @property
    def settings(self) -> tuple[str, ...]:
        return f"optimizer.learning_rate={self.learning_rate:g}", f"optimizer.schedule={self.schedule}"


@dataclass(frozen=True, slots=True)
class StudyTask:
    """One host on one data set.

    Attributes:
        blocks: what makes the host the final-size model: the strongest block that is offered in each slot.
        metric: "points" of accuracy, or "bits" of the test loss (per byte, or per sample), of which fewer are better.
        margin: how much worse than the final-size model a grown one may be at most and count as not worse, in the
            metric's unit; and no more than a quarter of what the final-size model lacks at 0.6 F.
        tuned: by family; other families have that of grown, and before there are any `rate`.
        seeds: random seeds of the headline arms.
    """

    name: str
    settings: tuple[str, ...]
    blocks: tuple[Block, ...]
    metric: Metric
    margin: float
    rate: float = 0.01
    tuned: Mapping[str, Tuned] = field(default_factory=dict)
    seeds: int = 3

    def config(self, seed: int, family: str, *more: str, tuned: Tuned | None = None) -> Config:
        """The configuration of a run of that family."""
        chosen = tuned or self.tuned.get(family) or self.tuned.get("grown") or Tuned(self.rate)
        return configuration.load(None, [*COMMON, *self.settings, *chosen.settings, f"run.seed={seed}", *more])


def _everywhere(blueprint: str, slots: int) -> tuple[Block, ...]:
    return tuple(Block(slot, blueprint, {}) for slot in range(slots))


def _task(name: str, *settings: str, blocks: tuple[Block, ...], metric: Metric, **more: Any) -> StudyTask:
    width = int(name.rpartition("-")[2])
    tuned = _TUNED.get(name.partition("-")[0], {})
    return StudyTask(name, (f"run.host_width={width}", *settings), blocks, metric, tuned=tuned, **more)


_PICTURES = _everywhere("BP009", 3)
_GLYPHS = ("run.epochs=16", "run.boundary_every=32")
_LONG = ("run.epochs=32", "run.boundary_every=64")
_DIGITS = ("run.dataset=digits", "run.epochs=16", "run.boundary_every=32")
_PYCODE = (
    "run.task=transformer-lite", "run.dataset=pycode", "run.batch_size=32", "run.context=32", "run.epochs=16",
    "run.boundary_every=32", "run.validation_samples=300", "run.test_samples=2000",
)  # fmt: skip
_TABULAR = (
    "run.task=mlp-lite", "run.dataset=tabular", "run.batch_size=128", "run.epochs=16", "run.boundary_every=100",
    "run.validation_samples=1000", "run.test_samples=8000",
)  # fmt: skip


def _rates(**found: float) -> Mapping[str, Tuned]:
    return {family: Tuned(rate) for family, rate in found.items()}


_TUNED = {
    "glyphs": _rates(host=0.02, final=0.01, grown=0.02),
}
"""By data set: found with its first host size, and used with both."""


def _tasks() -> Iterator[StudyTask]:
    yield _task(
        "glyphs-8",
        "run.task=benchmarks.growth.halved:width8",
        *_GLYPHS,
        blocks=_PICTURES,
        metric="points",
        margin=1.0,
        seeds=10,
    )
    yield _task(
        "glyphs-long-8",
        "run.task=benchmarks.growth.halved:width8",
        *_LONG,
        blocks=_PICTURES,
        metric="points",
        margin=0.3,
        seeds=5,
    )
    yield _task("digits-4", *_DIGITS, blocks=_PICTURES, metric="bits", margin=0.02)
    yield _task("pycode-8", *_PYCODE, blocks=_everywhere("BP027", 2), metric="bits", margin=0.02)
    yield _task("tabular-4", *_TABULAR, blocks=_everywhere("BP032", 2), metric="points", margin=1.0)
    yield _task(
        "glyphs-12",
        "run.task=benchmarks.growth.halved:width12",
        *_GLYPHS,
        blocks=_PICTURES,
        metric="points",
        margin=1.0,
    )
    yield _task("digits-8", *_DIGITS, blocks=_PICTURES, metric="bits", margin=0.02)
    yield _task("pycode-16", *_PYCODE, blocks=_everywhere("BP027", 2), metric="bits", margin=0.02)
    yield _task("tabular-8", *_TABULAR, blocks=_everywhere("BP032", 2), metric="points", margin=1.0)
    if folder := os.environ.get("ESPER_CIFAR10"):
        found = ("run.dataset=cifar10", f"run.data_folder={folder}", "run.train_samples=45000", *_GLYPHS)
        yield _task("cifar10-16", *found, blocks=_PICTURES, metric="points", margin=1.0)


TASKS: Mapping[str, StudyTask] = {task.name: task for task in _tasks()}
"""By name: the data and the host's width. CIFAR-10 is there where ESPER_CIFAR10 names its folder."""
