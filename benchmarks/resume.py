"""Runs that are killed and resumed: do they end as if nothing had happened, bit for bit?

A small run in one process, in lockstep, dies by SIGKILL at named points and, in the long form, at random moments; then
it is resumed and compared with an undisturbed one: weights, moments, generators, rows, events, decisions, and reports
sent. See `benchmarks.kills`. The short form has 10 points, the long one all of them and 100 random moments.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress

from benchmarks import common, kills
from benchmarks.common import Bar
from esper_ray.reliability import failpoints

QUICK = (
    "step.backward", "epoch.judged", "boundary.recorded", "recorder.row", "checkpoint.tensors", "atomic.written",
    "garden.born", "journal.inserted", "tamiyo.decided", "tamiyo.report",
)  # fmt: skip


def measure(points: tuple[str, ...], moments: int) -> dict[str, Any]:
    """Do all cases, one after the other, and sum them up."""
    with (
        tempfile.TemporaryDirectory(prefix="esper-") as folder,
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=common.console) as bar,
    ):
        task = bar.add_task("killed and resumed", total=None)
        outcomes = kills.survey(
            Path(folder) / "runs", points, moments, progress=lambda done, of: bar.update(task, completed=done, total=of)
        )
        return kills.summary(outcomes)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--moments", type=int, metavar="N", help="random moments besides the named points")
    given = parser.parse_args()
    points = QUICK if given.quick else tuple(failpoints.POINTS)
    moments = given.moments if given.moments is not None else 0 if given.quick else 100
    bars = (
        Bar("kill_points", len(QUICK) if given.quick else 30, above=True, reach=True),
        Bar("identical", 1.0, above=True, reach=True),
    )
    common.run("resume", bars, lambda: measure(points, moments), given.json)


if __name__ == "__main__":
    main()
