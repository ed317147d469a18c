"""The same small budget of trials for each family; see `tasks.TUNING`. The test split is not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import common
from benchmarks.growth import arms, runs
from benchmarks.growth.tasks import StudyTask, Tuned

SEED = 1000
FACTORS = (0.5, 1.0, 2.0, 4.0)
FAMILIES = ("host", "final", "grown")


def tune(task: StudyTask, home: Path, families: tuple[str, ...] = FAMILIES) -> dict[str, Tuned]:
    """Each family's best rate, printed as they are found."""
    found: dict[str, Tuned] = {}
    for family in families:
        tried = {tuned: _trial(task, home, family, tuned) for tuned in _rates(task)}
        found[family] = min(tried, key=lambda tuned: float(tried[tuned]["validation_loss"]))
        _show(task, family, tried, found[family])
    return found


def _rates(task: StudyTask) -> Iterator[Tuned]:
    return (Tuned(task.rate * factor) for factor in FACTORS)


def _trial(task: StudyTask, home: Path, family: str, tuned: Tuned) -> dict[str, Any]:
    half = f"run.boundary_every={task.config(SEED, family).run.boundary_every // 2}"
    if family in arms.GROWING:
        config = task.config(SEED, family, half, f"tamiyo.controller={arms.CONTROLLER_OF[family]}", tuned=tuned)
        return runs.train(home, config, "grown")
    config = task.config(SEED, family, half, tuned=tuned)
    return runs.train(home, config, family, blocks=task.blocks if family == "final" else ())


def _show(task: StudyTask, family: str, tried: dict[Tuned, dict[str, Any]], best: Tuned) -> None:
    table = Table(title=f"{task.name}, {family}")
    for column in ("rate", "schedule", "validation loss", "accuracy", "FLOPs", "s", ""):
        table.add_column(column)
    for tuned, row in tried.items():
        table.add_row(
            f"{tuned.learning_rate:g}",
            tuned.schedule,
            f"{row['validation_loss']:.4f}",
            f"{row['validation_accuracy']:.4f}",
            f"{row['flops']:.3g}",
            f"{row['processor_seconds']:.1f}",
            "taken" if tuned == best else "",
        )
    common.console.print(table)
