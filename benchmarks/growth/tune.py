"""The same small budget of trials for each family; see `tasks.TUNING`. The test split is not looked at."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import common
from benchmarks.growth import arms, runs
from benchmarks.growth.tasks import StudyTask, Tuned

SEEDS = (1000, 1001, 1002)
"""All rates are tried with the first one, the two best with the others as well."""
_SHOWN = ("validation_loss", "validation_accuracy", "flops", "processor_seconds")
FACTORS = (0.5, 1.0, 2.0, 4.0)
FAMILIES = ("host", "final", "grown")


def tune(task: StudyTask, home: Path, families: tuple[str, ...] = FAMILIES) -> dict[str, Tuned]:
    """Each family's best rate, printed as they are found."""
    found: dict[str, Tuned] = {}
    for family in families:
        tried = {tuned: [_trial(task, home, family, tuned, SEEDS[0])] for tuned in _rates(task)}
        for tuned in sorted(tried, key=lambda each: _loss(tried[each]))[:2]:
            tried[tuned] += [_trial(task, home, family, tuned, seed) for seed in SEEDS[1:]]
        complete = [tuned for tuned, rows in tried.items() if len(rows) == len(SEEDS)]
        found[family] = min(complete, key=lambda each: _loss(tried[each]))
        _show(task, family, tried, found[family])
    return found


def _loss(rows: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(float(row["validation_loss"]) for row in rows)


def _rates(task: StudyTask) -> Iterator[Tuned]:
    return (Tuned(task.rate * factor) for factor in FACTORS)


def _trial(task: StudyTask, home: Path, family: str, tuned: Tuned, seed: int) -> dict[str, Any]:
    half = f"run.boundary_every={task.config(seed, family).run.boundary_every // 2}"
    if family in arms.GROWING:
        config = task.config(seed, family, half, f"tamiyo.controller={arms.CONTROLLER_OF[family]}", tuned=tuned)
        return runs.train(home, config, "grown")
    config = task.config(seed, family, half, tuned=tuned)
    return runs.train(home, config, family, blocks=task.blocks if family == "final" else ())


def _show(task: StudyTask, family: str, tried: Mapping[Tuned, Sequence[Mapping[str, Any]]], best: Tuned) -> None:
    table = Table(title=f"{task.name}, {family}")
    for column in ("rate", "runs", "validation loss", "accuracy", "FLOPs", "s", ""):
        table.add_column(column)
    for tuned, rows in tried.items():
        mean = {key: statistics.fmean(float(row[key]) for row in rows) for key in _SHOWN}
        table.add_row(
            f"{tuned.learning_rate:g}",
            str(len(rows)),
            f"{mean['validation_loss']:.4f}",
            f"{mean['validation_accuracy']:.4f}",
            f"{mean['flops']:.3g}",
            f"{mean['processor_seconds']:.1f}",
            "taken" if tuned == best else "",
        )
    common.console.print(table)
