"""Runs of the study, each kept as a line of JSON: what is there is not done again."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.newdata import arms
from benchmarks.newdata.arms import ARMS, Arm
from benchmarks.newdata.tasks import TASKS, Task

RATES = (1e-3, 3e-3, 1e-2)
"""Every arm is tuned over these, on one random seed that the study does not use, by the new data's validation split."""
TUNING_SEED = 100
EPOCHS = {"grow": 20, "grow, small": 24, "grow, host at a tenth": 24, "grow, host frozen": 28}
"""Epochs of the growing arms, for about the same FLOPs. What ``grow`` costs in a seed is what all others may spend."""
Rows = list[dict[str, Any]]


class Ledger:
    """A file of rows, one for each run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: Rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row[key] == value for key, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


class Study:
    """One task's runs.

    Args:
        home: where data and trained hosts are kept.
        ledger: the rows that are there.
    """

    def __init__(self, task: Task, home: Path, ledger: Ledger) -> None:
        self.task, self._home, self._ledger = task, home, ledger
        self._worlds = task.data(home)

    def plan(self, seeds: int) -> list[tuple[str, int, float | None]]:
        """Arm, seed and rate of every run, in an order in which each finds what it needs; no rate: the tuned one."""
        tuning = [(name, TUNING_SEED, rate) for name in ARMS for rate in RATES]
        return [*tuning, *((name, seed, None) for seed in range(seeds) for name in ARMS)]

    def run(self, name: str, seed: int, rate: float | None) -> dict[str, Any]:
        """One run's row, from the ledger where it was done before."""
        rate = rate if rate is not None else self.tuned(name)
        found = self._ledger.find(arm=name, seed=seed, rate=rate)
        return found or self._ledger.add(self._do(ARMS[name], seed, rate))

    def tuned(self, name: str) -> float:
        """The rate whose tuning run did best on the new data's validation split."""
        rows = [row for row in self._ledger.rows if row["arm"] == name and row["seed"] == TUNING_SEED]
        return float(min(rows, key=lambda row: row["new_validation"]["loss"])["rate"])

    def _do(self, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
        torch.set_num_threads(1)
        trained, start = self.host(seed), time.perf_counter()
        more: dict[str, Any] = {}
        if arm.settings is not None:
            torch.manual_seed(seed)
            model = copy.deepcopy(trained)
            grown = arms.grow(self.task, model, arm, self._worlds, rate=rate, epochs=EPOCHS[arm.name], seed=seed)
            added, flops = grown.parameters, grown.flops
            more = {"kept": grown.kept, "culled": grown.culled}
        else:
            model, added, flops = arms.without_growing(
                self.task, trained, arm, self._worlds, rate=rate, flops=self._of("grow", seed, "flops"),
                adapters=int(self._of(arm.like, seed, "added")) if arm.like else 0, seed=seed,
            )  # fmt: skip
        worlds = self._worlds
        return {
            "task": self.task.name,
            "arm": arm.name,
            "seed": seed,
            "rate": rate,
            "new_validation": arms.quality(model, worlds["new"]["validation"]),
            "old_validation": arms.quality(model, worlds["old"]["validation"]),
            # The test splits are of the study proper; a tuning run never reads them.
            **({} if seed == TUNING_SEED else self._tests(model)),
            "added": added,
            "flops": flops,
            "seconds": time.perf_counter() - start,
            **more,
        }

    def _tests(self, model: torch.nn.Module) -> dict[str, Any]:
        return {f"{world}_test": arms.quality(model, self._worlds[world]["test"]) for world in ("new", "old")}

    def _of(self, name: str, seed: int, what: str) -> float:
        """What another arm of the same seed came to; of several rates the median."""
        rows = [row[what] for row in self._ledger.rows if row["arm"] == name and row["seed"] == seed]
        return float(statistics.median(rows))

    def host(self, seed: int) -> torch.nn.Module:
        """The host of that seed, trained once and kept."""
        file = self._home / f"{self.task.name}-host-{seed}.pt"
        model = self.task.host()
        if not file.exists():
            model = arms.host(self.task, self._worlds, seed)
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model

    def before(self, seed: int) -> dict[str, Any]:
        """The host as it came, on both worlds."""
        found = self._ledger.find(arm="untouched", seed=seed)
        if found is not None:
            return found
        row = {"task": self.task.name, "arm": "untouched", "seed": seed, "rate": 0.0, "added": 0, "flops": 0.0}
        return self._ledger.add(row | self._tests(self.host(seed)))


def study(name: str, home: Path, results: Path, seeds: int, done: Callable[[int, int], None]) -> Rows:
    """All runs of a task; ``done(number, of)`` after each."""
    ledger = Ledger(results / f"{name}.jsonl")
    made = Study(TASKS[name], home, ledger)
    plan = made.plan(seeds)
    for number, (arm, seed, rate) in enumerate(plan, 1):
        made.run(arm, seed, rate)
        done(number, len(plan))
    for seed in range(seeds):
        made.before(seed)
    return ledger.rows


def of_study(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Without the tuning runs."""
    return [dict(row) for row in rows if row["seed"] != TUNING_SEED]
