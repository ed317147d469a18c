"""Figures, tables and the plot, from the rows of the study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.growth.store import Row, Store
from benchmarks.newdata.arms import ARMS
from benchmarks.newdata.study import RATES, TUNING_SEED
from benchmarks.newdata.tasks import TASKS
from esper_ray.reliability.intervals import Interval, interval

DOCS = Path(__file__).parent.parent.parent / "docs"
BEGIN, END = "<!-- newdata: made by python -m benchmarks.newdata --report -->", "<!-- newdata: end -->"
REFERENCE = "fine-tune everything"


def value(task: str, row: Row, world: str) -> float:
    """Percent right; for text bits per byte, lower is better."""
    found = row[f"{world}_test"]
    return float(found["loss"]) / math.log(2) if task == "text" else 100.0 * float(found["accuracy"])


def by_arm(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """Rows of the study by arm and seed, the last ones where there are several; tuning runs left out."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["seed"] != TUNING_SEED:
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def gains(task: str, mine: Mapping[int, Row], other: Mapping[int, Row], world: str) -> Interval:
    """How much better than another arm, paired by seed: points, or bits saved."""
    sign = -1.0 if task == "text" else 1.0
    seeds = sorted(set(mine) & set(other))
    return interval([sign * (value(task, mine[s], world) - value(task, other[s], world)) for s in seeds])


def figures(task: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Means of every arm, and growing against fine-tuning, with intervals."""
    arms = by_arm(rows)
    found: dict[str, Any] = {}
    for name, mine in arms.items():
        key = f"{task}_{_key(name)}"
        for world in ("new", "old"):
            found[f"{key}_{world}_mean"] = interval([value(task, row, world) for row in mine.values()]).mean
    for name in (name for name in arms if name.startswith("grow")):
        for world in ("new", "old"):
            gain = gains(task, arms[name], arms[REFERENCE], world)
            key = f"{task}_{_key(name)}_over_fine_tuning_{world}"
            found |= {f"{key}_mean": gain.mean, f"{key}_ci_low": gain.low, f"{key}_ci_high": gain.high}
    return found


def _key(name: str) -> str:
    return "".join(letter for letter in name.replace(" ", "_") if letter.isalnum() or letter == "_")


def table(task: str, rows: Sequence[Row]) -> list[str]:
    """One task as a table in Markdown."""
    arms = by_arm(rows)
    unit = "bits per byte, lower is better" if task == "text" else "% right"
    seeds = len(arms.get(REFERENCE, {}))
    lines = [
        f"**{task}** ({unit}; {seeds} seeds)",
        "",
        "| arm | new data | old data | new: better than fine-tuning by | old: better than fine-tuning by "
        "| parameters added | GFLOP | rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("untouched", *ARMS):
        mine = arms.get(name, {})
        if mine:
            lines.append(_line(task, name, mine, arms.get(REFERENCE, {})))
    return [*lines, ""]


def _line(task: str, name: str, mine: Mapping[int, Row], reference: Mapping[int, Row]) -> str:
    digits = 3 if task == "text" else 1
    means = [
        f"{found.mean:.{digits}f} ± {found.high - found.mean:.{digits}f}"
        for found in (interval([value(task, row, world) for row in mine.values()]) for world in ("new", "old"))
    ]
    over = [
        f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if name != REFERENCE else ""
        for found in (gains(task, mine, reference, world) for world in ("new", "old"))
    ]
    added, flops = (interval([float(row[key]) for row in mine.values()]).mean for key in ("added", "flops"))
    rates = sorted({row["rate"] for row in mine.values()})
    rate = ", ".join(f"{rate:g}" for rate in rates if rate) or "-"
    return f"| {name} | {' | '.join([*means, *over])} | {added:,.0f} | {flops / 1e9:,.0f} | {rate} |"


def plot(found: Mapping[str, Sequence[Row]], file: Path) -> None:
    """New against old quality of each arm, with 95 % intervals in both directions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: rows for name, rows in found.items() if rows}
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.6), squeeze=False)
    for axis, (task, rows) in zip(axes[0], shown.items(), strict=True):
        arms = by_arm(rows)
        for number, name in enumerate(("untouched", *ARMS)):
            if name not in arms:
                continue
            old, new = (interval([value(task, row, world) for row in arms[name].values()]) for world in ("old", "new"))
            marker = "o" if name.startswith("grow") else "s"
            axis.errorbar(
                old.mean, new.mean, xerr=old.high - old.mean, yerr=new.high - new.mean,
                fmt=marker, color=f"C{number}", capsize=3, label=name,
            )  # fmt: skip
        what = "bits per byte" if task == "text" else "% right"
        axis.set(title=task, xlabel=f"old data, {what}", ylabel=f"new data, {what}")
        if task == "text":
            axis.invert_xaxis()
            axis.invert_yaxis()
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8, loc="lower left")
    figure.suptitle("A trained host meets new data: up and to the right is better (test splits, 95 % intervals)")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(store: Store) -> None:
    """Put the tables between the markers of docs/results.md, and the plot beside it."""
    found = {task: list(store.rows(task)) for task in TASKS}
    body = ["## A trained host meets new data", ""]
    for task, rows in found.items():
        body += table(task, rows) if rows else []
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    body += [
        f"Each arm's rate is the best of {rates} on the new data's validation split, with seed {TUNING_SEED}, "
        "which is not in the tables.",
        "",
        "![New against old quality of each arm](newdata.png)",
    ]
    common.write_section(DOCS / "results.md", BEGIN, END, "\n".join(body))
    plot(found, DOCS / "newdata.png")
