"""Tables from the results: means with 95 % intervals, and paired differences at equal FLOPs."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.recipe import runs
from benchmarks.recipe.runs import Row
from benchmarks.recipe.trials import ROWS
from benchmarks.recipe.trials import frontier as lengths
from esper_ray.reliability.intervals import Interval, interval

HEAD = (
    "| | runs | FLOPs | accuracy, % | loss | loss less that of scratch at equal FLOPs "
    "| points of accuracy more than it | that loss against the first row's |"
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "method.md"
Rows = Mapping[tuple[str, int], Row]


def of(rows: Rows, name: str) -> dict[int, Row]:
    """The runs of that name by random seed."""
    return {seed: row for (each, seed), row in rows.items() if each == name}


def frontier(rows: Rows, names: Sequence[str], seed: int, flops: float, key: str) -> float:
    """What the final size reaches from scratch for so many FLOPs with that random seed.

    Linear between the two nearest lengths in the logarithm of the FLOPs; NaN outside of what was run.
    """
    points = sorted((rows[name, seed]["flops"], rows[name, seed][key]) for name in names if (name, seed) in rows)
    if not points or not points[0][0] <= flops <= points[-1][0]:
        return math.nan
    costs, values = zip(*points, strict=True)
    return float(np.interp(math.log(flops), np.log(costs), values))


def against(rows: Rows, names: Sequence[str], name: str, key: str) -> Interval | None:
    """Paired difference of ``name`` to the frontier at each run's own cost; None where a run lies outside of it."""
    found = list(distances(rows, names, name, key).values())
    return interval(found) if found and not any(map(math.isnan, found)) else None


def distances(rows: Rows, names: Sequence[str], name: str, key: str) -> dict[int, float]:
    """By random seed what a run reached less what the frontier has at its cost; NaN where it has nothing there."""
    runs = sorted(of(rows, name).items())
    return {seed: row[key] - frontier(rows, names, seed, row["flops"], key) for seed, row in runs}


def beside(rows: Rows, names: Sequence[str], name: str, first: str) -> Interval | None:
    """The distance of ``name`` to the frontier less that of ``first``, paired by random seed; None without a pair."""
    mine, other = distances(rows, names, name, "loss"), distances(rows, names, first, "loss")
    found = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
    return interval(found) if found and not any(map(math.isnan, found)) else None


def table(rows: Rows, names: Sequence[str], shown: Sequence[str], full: str) -> str:
    """A Markdown table: cost, loss and accuracy of each name, and its distance to the frontier.

    Args:
        names: the runs that make up the frontier.
        full: the name whose cost is F.
    """
    whole = statistics.fmean(row["flops"] for row in of(rows, full).values())
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    for name in shown:
        runs = list(of(rows, name).values())
        if not runs:
            continue
        cost = statistics.fmean(row["flops"] for row in runs) / whole
        scratch = name in names
        cells = [
            name,
            str(len(runs)),
            f"{cost:.2f} F",
            _mean([100 * row["accuracy"] for row in runs], 2),
            _mean([row["loss"] for row in runs], 3),
            "" if scratch else _range(against(rows, names, name, "loss"), 1.0, 3),
            "" if scratch else _range(against(rows, names, name, "accuracy"), 100.0, 2),
            "" if name in (shown[0], *names) else _range(beside(rows, names, name, shown[0]), 1.0, 3),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int) -> str:
    found = interval(values)
    half = f" ± {found.high - found.mean:.{digits}f}" if found.count > 1 else ""
    return f"{found.mean:.{digits}f}{half}"


def _range(found: Interval | None, factor: float, digits: int) -> str:
    if found is None:
        return "not on the frontier"
    mean, low, high = (factor * value for value in (found.mean, found.low, found.high))
    if found.count < 2:
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0.0 or high < 0.0 else text


def frontier_names(task: str) -> list[str]:
    """The runs that make up a task's frontier; the last one costs F."""
    return [trial.name for trial in lengths(task)]


def write() -> None:
    """Put every table into its place in the document: between ``<!-- table NAME TASK -->`` and ``<!-- end -->``."""
    text = DOCUMENT.read_text()
    for name, task in re.findall(r"<!-- table (\w+) (\w+) -->", text):
        names = frontier_names(task)
        shown = names if name == "frontier" else [trial.name for trial in ROWS[name]]
        made = table(runs.done(task), names, shown, names[-1])
        place = re.compile(rf"(<!-- table {name} {task} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)  # type: ignore[misc]
    DOCUMENT.write_text(text)
