"""A trained host meets new data, and training anew is not on offer. Is growing what one should do then?

Arms, at equal FLOPs and paired by random seed: fine-tune everything, adapters (LoRA) of the size of what grew, the last
layer alone, and growing (blocks of up to 20,000 parameters; small ones; the host at a tenth of the rate, or frozen);
for reference, training anew on old and new data. None but the last one sees old data. Quality on the new data and on
the old is told for the test splits, which are read once.

    python -m benchmarks.newdata --quick --json F     one task, 2 seeds: about 15 minutes on one core
    python -m benchmarks.newdata --json F             three tasks, 5 seeds; goes on where it was interrupted
    python -m benchmarks.newdata --report             tables and plot from the runs that are there
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks import common
from benchmarks.growth.store import Store
from benchmarks.newdata import report
from benchmarks.newdata.study import study
from benchmarks.newdata.tasks import TASKS

RESULTS = Path(__file__).parent.parent / "results" / "newdata"


def measure(names: list[str], home: Path, store: Store, seeds: int) -> dict[str, Any]:
    """All tasks; the figures of `report.figures`."""
    found: dict[str, Any] = {"seeds": seeds}
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=common.console) as progress:
        for name in names:
            task = progress.add_task(name, total=None)
            rows = study(name, home, store, seeds, _show(progress, task))
            found |= report.figures(name, rows)
    return found


def _show(progress: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda number, of: progress.update(task, completed=number, total=of)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, metavar="N", help="random seeds of each arm (5; 2 with --quick)")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this one; may be repeated")
    parser.add_argument("--home", type=Path, default=Path("build/newdata"), metavar="DIR", help="data and hosts")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the runs' rows are kept")
    parser.add_argument(
        "--report", action="store_true", help="write docs/results.md's section and the plot, run nothing"
    )
    given = parser.parse_args()
    if given.report:
        report.write(Store(given.results))
        return
    os.environ.setdefault("ESPER_HOME", str(given.home / "home"))
    names = given.task or (["fonts"] if given.quick else list(TASKS))
    seeds = given.seeds or (2 if given.quick else 5)
    common.run("newdata", (), lambda: measure(names, given.home, Store(given.results), seeds), given.json)


if __name__ == "__main__":
    main()
