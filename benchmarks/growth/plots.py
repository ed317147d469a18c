"""The study's plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.growth import figures
from benchmarks.growth.figures import ByArm
from benchmarks.growth.tasks import TASKS

COLOURS = {"host": "#7a7a7a", "final": "#1f6fb4", "grown": "#d1495b"}
WORDS = {"host": "host alone", "final": "final size from scratch", "grown": "grown"}
OTHERS = {
    "random=grown": "v",
    "periodic=grown": "^",
    "gradmax=grown": "s",
    "net2net=grown": "D",
    "asha=grown": "P",
    "grid=grown": "X",
}
COLUMNS = 4


def frontiers(results: Mapping[str, ByArm], file: Path) -> None:
    """Quality over cost as a share of F, a panel for each task; bars are 95 % intervals over random seeds."""
    names = list(results)
    rows = -(-len(names) // COLUMNS) or 1
    columns = min(COLUMNS, max(1, len(names)))
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        _panel(axis, name, results[name])
    axes.flat[0].legend(fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, name: str, by_arm: ByArm) -> None:
    task = TASKS[name]
    sign = 1.0 if task.metric == "points" else -1.0
    for family, colour in COLOURS.items():
        same = [arm for arm in by_arm if arm in (family, f"{family}=grown") or arm.startswith(f"{family}@")]
        found = [figures.summary(task, by_arm, arm) for arm in same]
        found.sort(key=lambda item: item.cost)
        if not found:
            continue
        errors = [item.quality.high - item.quality.mean if item.quality.count > 1 else 0.0 for item in found]
        axis.errorbar(
            [item.cost for item in found],
            [sign * item.quality.mean for item in found],
            errors,
            marker="o",
            ms=4,
            lw=1.4,
            capsize=2,
            color=colour,
            label=WORDS[family],
        )
    for arm, marker in OTHERS.items():
        if arm in by_arm:
            item = figures.summary(task, by_arm, arm)
            label = arm.partition("=")[0]
            axis.plot(item.cost, sign * item.quality.mean, marker, ms=5, color="#3a3a3a", alpha=0.7, label=label)
    axis.set_title(name)
    axis.set_xlabel("cost of the run, F")
    axis.set_ylabel("test accuracy, %" if sign > 0 else "test loss, bits")
    axis.grid(alpha=0.3)


def differences(results: Mapping[str, ByArm], compared: Sequence[tuple[str, str, str]], file: Path) -> None:
    """Paired differences with 95 % intervals, a panel for each task; right of zero growing is better."""
    names = list(results)
    columns = min(COLUMNS, max(1, len(names)))
    rows = -(-len(names) // columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns + 2.4, 3.9 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        task = TASKS[name]
        for place, (one, other, _) in enumerate(compared):
            found = figures.paired(task, results[name], one, other)
            if found is None:
                continue
            if found.count > 1:
                axis.plot([found.low, found.high], [place, place], color="#d1495b", lw=2)
            axis.plot(found.mean, place, "o", ms=4, color="#d1495b")
        axis.axvline(0.0, color="#3a3a3a", lw=0.8)
        axis.set_yticks(range(len(compared)), [words for _, _, words in compared], fontsize=8)
        axis.set_title(f"{name}, {'points' if task.metric == 'points' else 'bits'}", fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    axes.flat[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
