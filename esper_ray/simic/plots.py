"""A training's learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_FEW = 30
_BLUE, _ORANGE, _GREY = "#2563eb", "#d97706", "#6b7280"


def learning_curve(file: Path, title: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Draw the returns while acting and of the greedy evaluations above, entropy and value loss below.

    Args:
        rows: as in ``curve.jsonl``.
    """
    figure = Figure(figsize=(8.0, 5.6), dpi=140, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    # A line through a few points is short, and through one it is nothing.
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.0} if len(rows) < _FEW else {}
    acted = [(row["steps"], row["mean_return"]) for row in rows if row["mean_return"] is not None]
    if acted:
        above.plot(*zip(*acted, strict=True), color=_BLUE, linewidth=1.6, label="last 100 episodes, acting", **dots)
    tested = [(row["steps"], row["evaluation"]["mean"]) for row in rows if row["evaluation"]]
    if tested:
        above.plot(
            *zip(*tested, strict=True),
            color=_ORANGE,
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            label="greedy evaluation",
        )
    above.set_title(title, loc="left", fontsize=10)
    above.set_ylabel("mean return")
    if acted or tested:
        above.legend(frameon=False, fontsize=8, loc="best")
    else:
        above.text(0.5, 0.5, "no episode has ended yet", transform=above.transAxes, ha="center", color=_GREY)
    entropy = [(row["steps"], row["metrics"]["entropy"]) for row in rows if "entropy" in row["metrics"]]
    if entropy:
        below.plot(*zip(*entropy, strict=True), color=_GREY, linewidth=1.2, **dots)
    below.set_ylabel("entropy (nats)")
    below.set_xlabel("environment steps")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
    return file
