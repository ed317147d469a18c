"""The study's command line; see the package."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import Progress

import benchmarks.growth
from benchmarks import common
from benchmarks.common import Bar
from benchmarks.growth import arms, bars, figures, report, study, tune
from benchmarks.growth.store import COMMITTED, Store
from benchmarks.growth.tasks import TASKS
from esper_ray.errors import ConfigError

HEADLINE_TASK = "glyphs-8"
QUICK_SEEDS, OTHER_SEEDS = 5, 3
LIMITS = (
    Bar("gain_points_mean", 0.0, above=True),
    Bar("gain_points_ci_low", 0.0, above=True),
    Bar("flops_to_match_ratio", 0.6),
    Bar("equal_flops_points_mean", 0.0, above=True),
    Bar("equal_flops_points_ci_low", 0.0, above=True),
    *(Bar(f"bar_{bar}_tasks", least, reach=True) for bar, (_, _, least) in bars.BARS.items()),
)


def units(given: argparse.Namespace) -> list[study.Unit]:
    """(task, random seed, arms) in the order in which they are worth having."""
    if given.quick:
        return [(HEADLINE_TASK, seed, _wanted(given, arms.QUICK)) for seed in range(given.seeds or QUICK_SEEDS)]
    headline = _wanted(given, [arm.name for arm in arms.HEADLINE])
    rest = _wanted(given, [arm.name for arm in (*arms.CURVES, *arms.OTHERS)])
    names = given.tasks.split(",") if given.tasks else list(TASKS)
    found = [(name, seed, headline) for name in names for seed in range(given.seeds or TASKS[name].seeds)]
    found += [(name, seed, rest) for name in names for seed in range(min(given.seeds or OTHER_SEEDS, OTHER_SEEDS))]
    return [unit for unit in found if unit[2]]


def _wanted(given: argparse.Namespace, names: Sequence[str]) -> tuple[str, ...]:
    chosen = given.arms.split(",") if given.arms else names
    unknown = sorted(set(chosen) - arms.ARMS.keys())
    if unknown:
        raise ConfigError(f"There is no arm {unknown[0]}.", remedy=f"Choose from {', '.join(arms.ARMS)}.")
    return tuple(name for name in chosen if name in names or given.quick)


def run(given: argparse.Namespace, home: Path, results: Path) -> dict[str, Any]:
    """All units, a few at a time, and the figures."""
    planned = units(given)
    with Progress(console=common.console) as progress:
        bar = progress.add_task(f"{len(planned)} units", total=len(planned))
        if given.parallel == 1:
            for name, seed, wanted in planned:
                tell = lambda text: progress.update(bar, description=text)  # noqa: E731
                study.work(TASKS[name], home, Store(results), wanted, seed, tell)
                progress.advance(bar)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(given.parallel, mp_context=context) as pool:
                for done in pool.map(study.work_unit, planned, [home] * len(planned), [results] * len(planned)):
                    progress.update(bar, advance=1, description=f"{done[0]}, seed {done[1]}")
    return figures_of(Store(results))


def figures_of(store: Store) -> dict[str, Any]:
    """The figures of `benchmarks.md`'s row: the headline task's, and on how many tasks each bar holds."""
    results = {name: store.latest(name) for name in store.tasks() if name in TASKS}
    found: dict[str, Any] = {"tasks": len(results)}
    task, by_arm = TASKS[HEADLINE_TASK], results.get(HEADLINE_TASK, {})
    if "final" in by_arm:
        found |= {f"{arm}_points_mean": figures.summary(task, by_arm, arm).quality.mean for arm in by_arm}
        found |= {f"{arm}_cost": figures.summary(task, by_arm, arm).cost for arm in by_arm}
        for key, other in (("gain_points", "host"), ("equal_flops_points", "final=grown")):
            gain = figures.paired(task, by_arm, "grown", other)
            if gain is not None:
                found |= {f"{key}_mean": gain.mean, f"{key}_ci_low": gain.low, f"{key}_ci_high": gain.high}
        ratio = figures.flops_to_match(task, by_arm)
        found["flops_to_match_ratio"] = float("inf") if ratio is None else ratio
    judged = bars.table(results)
    if len(bars.judged(results)) == len(bars.DATA):
        found |= {f"bar_{bar}_tasks": sum(bool(each.holds) for each in row.values()) for bar, row in judged.items()}
    found["tables"] = {name: list(store.rows(name)) for name in results}
    return found


def main() -> None:
    parser = common.parser(benchmarks.growth.__doc__)
    parser.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--arms", metavar="A,B", help=f"of {', '.join(arms.ARMS)}")
    parser.add_argument("--seeds", type=int, metavar="N", help="random seeds (what each task says; 5 with --quick)")
    parser.add_argument("--home", type=Path, default=Path("build/growth"), metavar="DIR", help="where runs are kept")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where results are kept, one file a task")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="processes, of one thread each")
    parser.add_argument("--tune", metavar="TASK", help="find each family's learning rate and schedule")
    parser.add_argument("--families", metavar="A,B", help="of --tune; all of them without it")
    parser.add_argument("--report", action="store_true", help="write docs/results.md and the plots, run nothing")
    given = parser.parse_args()
    home = given.home.resolve()
    if given.tune:
        families = tuple(given.families.split(",")) if given.families else tune.FAMILIES
        import torch

        torch.set_num_threads(1)
        common.console.print(tune.tune(TASKS[given.tune], home, families))
        return
    results = given.results or (home / "results" if given.quick else COMMITTED)
    if given.report:
        report.write(Store(results))
        return
    common.run("growth", LIMITS, lambda: run(given, home, results), given.json)


if __name__ == "__main__":
    main()
