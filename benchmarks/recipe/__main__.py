"""Ablations of growing: which settings make it pay, at equal FLOPs.

    python -m benchmarks.recipe --task small --only when,birth       what is missing of these tables
    python -m benchmarks.recipe --report                             the tables and plots of docs/method.md

Each run is compared with the final size trained from scratch for as many FLOPs with the same random seed, read off a
frontier of runs that are each decayed to their own end. Everything is judged on the validation split. A run that is in
benchmarks/results/recipe already is not done again.
"""

from __future__ import annotations

import argparse

from rich.progress import Progress

from benchmarks import common
from benchmarks.recipe import plots, report, runs
from benchmarks.recipe.trials import SEEDS, TABLES, TASKS, trials


def main() -> None:
    options: argparse.ArgumentParser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--task", choices=list(TASKS), default="small")
    options.add_argument("--only", default="", metavar="TABLES", help=f"of {', '.join(TABLES)}; all without it")
    options.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N", help="random seeds, from 100 on")
    options.add_argument("--report", action="store_true", help="write tables and plots from what is there, run nothing")
    given = options.parse_args()
    if given.report:
        report.write()
        plots.write()
        return
    names = given.only.split(",") if given.only else list(TABLES)
    kinds = {trial.name: trial for name in names for trial in trials(name, given.task)}
    wanted = [(trial, SEEDS[0] + k) for k in range(given.seeds) for trial in kinds.values()]
    there = runs.done(given.task)
    missing = [(trial, seed) for trial, seed in wanted if (trial.name, seed) not in there]
    with Progress(console=common.console) as progress:
        for trial, seed in progress.track(missing, description=f"{len(missing)} runs"):
            runs.keep(given.task, runs.run(given.task, trial, seed))


if __name__ == "__main__":
    main()
