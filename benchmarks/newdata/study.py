"""Runs of the study, each kept as a line of JSON: what the same code did with the same settings is not done again."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.growth import runs
from benchmarks.growth.runs import identity
from benchmarks.growth.store import Row, Store
from benchmarks.newdata import arms
from benchmarks.newdata.arms import ARMS, Arm
from benchmarks.newdata.tasks import TASKS, Task
from esper_ray.reliability.ids import digest

RATES = (1e-3, 3e-3, 1e-2)
"""Every arm is tuned over these, on one random seed that the study does not use, by the new data's validation split."""
TUNING_SEED = 100
EPOCHS = {"grow": 20, "grow, small": 24, "grow, host at a tenth": 24, "grow, host frozen": 28}
"""Epochs of the growing arms, for about the same FLOPs. What ``grow`` costs in a seed is what all others may spend."""


class Study:
    """One task's runs.

    Args:
        home: where data and trained hosts are kept, apart for each state of the code.
        store: the rows that are there.
    """

    def __init__(self, task: Task, home: Path, store: Store) -> None:
        self.task, self._store, self._code = task, store, code()
        self._home = home / self._code
        self._worlds = task.data(self._home)
        self._done: dict[tuple[str, int, float], Row] = {}

    def plan(self, seeds: int) -> list[tuple[str, int, float | None]]:
        """Arm, seed and rate of every run, in an order in which each finds what it needs; no rate: the tuned one."""
        tuning = [(name, TUNING_SEED, rate) for name in ARMS for rate in RATES]
        return [*tuning, *((name, seed, None) for seed in range(seeds) for name in ARMS)]

    def run(self, name: str, seed: int, rate: float | None) -> Row:
        """One run's row, from the store where the same code did it before with the same settings."""
        arm, rate = ARMS[name], rate if rate is not None else self.tuned(name)
        spend = self._of("grow", seed, "flops") if arm.settings is None else 0.0
        adapters = int(self._of(arm.like, seed, "added")) if arm.like else 0
        parts = {
            "code": self._code, "arm": asdict(arm), "seed": seed, "rate": rate, "epochs": EPOCHS.get(name),
            "flops": spend, "adapters": adapters,
        }  # fmt: skip
        known = identity(parts)
        row = self._store.find(self.task.name, known)
        if row is None:
            row = self._do(arm, seed, rate, spend, adapters) | {"identity": known, "commit": common.commit()}
            self._store.add(row)
        self._done[name, seed, rate] = row
        return row

    def tuned(self, name: str) -> float:
        """The rate whose tuning run did best on the new data's validation split."""
        rows = [row for (arm, seed, _), row in self._done.items() if (arm, seed) == (name, TUNING_SEED)]
        return float(min(rows, key=lambda row: row["new_validation"]["loss"])["rate"])

    def _do(self, arm: Arm, seed: int, rate: float, spend: float, adapters: int) -> dict[str, Any]:
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
                self.task, trained, arm, self._worlds, rate=rate, flops=spend, adapters=adapters, seed=seed,
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
        rows = [row[what] for (arm, of, _), row in self._done.items() if (arm, of) == (name, seed)]
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

    def before(self, seed: int) -> Row:
        """The host as it came, on both worlds."""
        known = identity({"code": self._code, "arm": "untouched", "seed": seed})
        row = self._store.find(self.task.name, known)
        if row is None:
            told = {"task": self.task.name, "arm": "untouched", "seed": seed, "rate": 0.0, "added": 0, "flops": 0.0}
            row = told | self._tests(self.host(seed)) | {"identity": known, "commit": common.commit()}
            self._store.add(row)
        return row


def code() -> str:
    """Digest of what decides a result: the package's part and the study's."""
    own = [(Path(__file__).parent / name).read_bytes() for name in ("arms.py", "study.py", "tasks.py")]
    return digest(runs.code(("attaching", *runs.GROWN_CODE), ()).encode() + b"".join(own))[:16]


def study(name: str, home: Path, store: Store, seeds: int, done: Callable[[int, int], None]) -> list[Row]:
    """All runs of a task, in this order; ``done(number, of)`` after each. Returns the rows of the study proper."""
    made = Study(TASKS[name], home, store)
    plan = made.plan(seeds)
    rows = []
    for number, (arm, seed, rate) in enumerate(plan, 1):
        row = made.run(arm, seed, rate)
        if seed != TUNING_SEED:
            rows.append(row)
        done(number, len(plan))
    return [*rows, *(made.before(seed) for seed in range(seeds))]
