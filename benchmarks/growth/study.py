"""Who runs what, in which order: one random seed of one task at a time, each arm after those that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.growth import arms, peers, runs, search
from benchmarks.growth.arms import Arm
from benchmarks.growth.store import Row, Store
from benchmarks.growth.tasks import TASKS, StudyTask
from esper_ray.config import Config

Unit = tuple[str, int, tuple[str, ...]]
TRIALS = 4
CLOSE = 0.97
"""A growing run's cost is near enough to its budget from this share of it on; above it never."""
_KEPT = (
    "flops", "steps", "parameters", "host_parameters", "born", "fossilized", "culled", "graft_steps", "graft_slots",
    "graft_ms", "cull_reasons", "processor_seconds", "wall_seconds", "peak_mb", "boundary_every",
    "isolation_violations", "searched",
)  # fmt: skip
_ROUNDED = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")


class Bench:
    """The runs of one task.

    Args:
        home: where runs are done.
        store: where results are kept; what is there is not done again.
    """

    def __init__(self, task: StudyTask, home: Path, store: Store) -> None:
        self.task, self.home, self.store = task, home, store
        self.commit = common.commit()

    def identity(self, arm: Arm, seed: int) -> str:
        """The code that decides this result, its settings, and the results that its budget comes from."""
        grows = arm.family in (*arms.GROWING, *arms.SEARCHES)
        own = {
            "gradmax": ("peers.py",),
            "net2net": ("peers.py",),
            "gromo": ("peers.py", "gromo_peer.py"),
            "asha": ("search.py",),
            "grid": ("search.py",),
        }
        study = (*runs.STUDY_CODE, *own.get(arm.family, ()))
        return runs.identity(
            {
                "code": runs.code(runs.GROWN_CODE if grows else runs.SCRATCH_CODE, study),
                "settings": runs.settings_of(self._config(arm, seed), grows=grows),
                "family": arm.family,
                "share": arm.share,
                "blocks": [str(block) for block in self.task.blocks],
                "needs": [self.identity(arms.ARMS[name], seed) for name in arms.needs(arm)],
            }
        )

    def result(self, name: str, seed: int) -> Row:
        """The row of that arm: from the store, or run now with all that it depends on."""
        arm = arms.ARMS[name]
        identity = self.identity(arm, seed)
        row = self.store.find(self.task.name, identity)
        if row is None:
            found = self._run(arm, seed)
            row = {"task": self.task.name, "arm": name, "seed": seed, "identity": identity, "commit": self.commit}
            row |= {key: round(found[key], 5) for key in _ROUNDED}
            row |= {key: _short(found[key]) for key in _KEPT if key in found}
            row |= {"trials": found.get("trials", 1)}
            self.store.add(row)
        return row

    def _config(self, arm: Arm, seed: int, *more: str) -> Config:
        if arm.family in arms.GROWING:
            more = (f"tamiyo.controller={arms.CONTROLLER_OF[arm.family]}", *more)
        return self.task.config(seed, arm.family, *more)

    def _run(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        costs = {name: float(self.result(name, seed)["flops"]) for name in arms.needs(arm)}
        budget = costs[arm.like] if arm.like else arm.share * costs["final"] if arm.share is not None else None
        config = self._config(arm, seed)
        if arm.family in ("host", "final"):
            blocks = self.task.blocks if arm.family == "final" else ()
            return runs.train(self.home, config, arm.family, blocks=blocks, flops=budget)
        if arm.family in arms.GROWING:
            if budget is None:
                return runs.train(self.home, config, "grown")
            return self._within(budget, arm, seed, costs.get(arm.family))
        assert budget is not None
        if arm.family in arms.PEERS:
            return peers.train(self.home, self.task, config, arm.family, self.result("grown", seed), budget)
        return search.run(self.home, self.task, seed, arm.family, budget)

    def _within(self, budget: float, arm: Arm, seed: int, known: float | None) -> dict[str, Any]:
        """The growing run whose cost is nearest to the budget of those tried, and within it.

        The number of boundaries stays and their distance changes, so that what is decided by boundaries stays alike.

        Raises:
            ValueError: none of the trials was within the budget.
        """
        every = self.task.config(seed, arm.family).run.boundary_every
        if known:
            every = max(1, int(every * 0.985 * budget / known))
        tried: dict[int, dict[str, Any]] = {}
        for _ in range(TRIALS):
            row = runs.train(self.home, self._config(arm, seed, f"run.boundary_every={every}"), "grown")
            tried[every] = row
            if CLOSE * budget <= row["flops"] <= budget:
                break
            guess = _guess(tried, 0.985 * budget)
            if guess in tried:
                break
            every = guess
        within = [row for row in tried.values() if row["flops"] <= budget]
        if not within:
            raise ValueError(f"{self.task.name}, {arm.name}, seed {seed}: no trial was within {budget:.3g} FLOPs")
        return {**max(within, key=lambda row: float(row["flops"])), "trials": len(tried)}


def _guess(tried: Mapping[int, Mapping[str, Any]], budget: float) -> int:
    """The distance of boundaries whose cost should be ``budget``: proportional at first, then along a straight line."""
    points = sorted((every, float(row["flops"])) for every, row in tried.items())
    near = sorted(points, key=lambda point: abs(point[1] - budget))[:2]
    every, cost = near[0]
    if len(near) == 1 or near[0][1] == near[1][1]:
        return max(1, int(every * budget / cost))
    slope = (near[1][1] - cost) / (near[1][0] - every)
    if slope <= 0.0:
        return max(1, int(every * budget / cost))
    return max(1, int(every + (budget - cost) / slope))


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def work(
    task: StudyTask, home: Path, store: Store, names: Sequence[str], seed: int, tell: Callable[[str], None]
) -> None:
    """All those arms of one random seed, one after the other."""
    import torch

    torch.set_num_threads(1)
    bench = Bench(task, home, store)
    for name in names:
        tell(f"{task.name}, seed {seed}: {name}")
        bench.result(name, seed)


def work_unit(unit: Unit, home: Path, results: Path) -> Unit:
    """One unit in a process of its own. It is here because a new process cannot import what is in ``__main__``."""
    name, seed, wanted = unit
    work(TASKS[name], home, Store(results), wanted, seed, lambda _: None)
    return unit
