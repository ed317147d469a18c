"""The pictures of docs/method.md: the frontier with the grown runs on it, and one run's seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.recipe import report, runs
from benchmarks.recipe.report import Rows, of
from benchmarks.recipe.trials import REFERENCE, WHEN

DOCS = Path(__file__).parents[2] / "docs"
COLOURS = {
    "TRAINING": "#9ecae1",
    "BLENDING": "#6baed6",
    "SHADOWING": "#3182bd",
    "PROBATIONARY": "#08519c",
    "FOSSILIZED": "#31a354",
}


def write() -> None:
    """Draw what there are results for."""
    rows = runs.done("small")
    frontier(rows, DOCS / "method-frontier.png")
    if of(rows, REFERENCE.name):
        life(rows, REFERENCE.name, DOCS / "method-life.png")


def frontier(rows: Rows, file: Path) -> None:
    """Validation loss over FLOPs: scratch by length, grown by when it grew; each point is a mean over random seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=120)
    names = report.frontier_names("small")
    whole = statistics.fmean(row["flops"] for row in of(rows, names[-1]).values())
    _points(axes, rows, names, whole, "final size from scratch, by length", "o-", "#555555")
    _points(axes, rows, [trial.name for trial in WHEN], whole, "grown in 16 epochs, by when", "s-", "#31a354")
    axes.set_xlabel("FLOPs of the run, as a share of F")
    axes.set_ylabel("validation loss, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def _points(axes: Axes, rows: Rows, names: Sequence[str], whole: float, label: str, style: str, colour: str) -> None:
    found = [list(of(rows, name).values()) for name in names]
    costs = [statistics.fmean(row["flops"] for row in each) / whole for each in found if each]
    losses = [statistics.fmean(row["loss"] for row in each) for each in found if each]
    axes.plot(costs, losses, style, color=colour, label=label, markersize=10 if style == "*" else 5)


def life(rows: Rows, name: str, file: Path) -> None:
    """One run: its loss beside the final size's over FLOPs, the stages of its seeds, and their gradients."""
    grown = min(of(rows, name).values(), key=lambda row: row["seed"])
    scratch = rows[report.frontier_names("small")[-1], grown["seed"]]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(6.4, 7.2), dpi=120, height_ratios=(3, 1.4, 2))
    for row, label, colour in ((grown, "grown", "#31a354"), (scratch, "final size from scratch", "#555555")):
        top.plot(
            [1e-12 * point[0] for point in row["curve"]],
            [point[1] for point in row["curve"]],
            color=colour,
            label=label,
        )
    top.set_xlabel("TFLOP spent")
    top.set_ylabel("validation loss, nats")
    top.set_yscale("log")
    top.legend()
    ratios = defaultdict(list)
    for moments in grown["seeds"]:
        for epoch, seed, stage, _, _, ratio in moments:
            # What a boundary leaves is what the next epoch is; a block that was asked for is grafted at its first step.
            during = "TRAINING" if stage == "GERMINATED" else stage
            middle.barh(seed, 1, left=epoch, color=COLOURS.get(during, "#de2d26"), edgecolor="white")
            if ratio is not None:
                ratios[seed].append((epoch, ratio))
    epochs = len(grown["curve"])
    middle.set(xlim=(0, epochs), yticks=sorted({m[1] for moments in grown["seeds"] for m in moments}), ylabel="seed")
    middle.legend(
        handles=[Patch(color=colour, label=stage.lower()) for stage, colour in COLOURS.items()],
        fontsize=7, loc="center left",
    )  # fmt: skip
    for seed, points in sorted(ratios.items()):
        bottom.plot([p[0] for p in points], [p[1] for p in points], "o-", label=f"seed {seed}")
    bottom.axhline(1.0, color="#999999", linewidth=0.8)
    bottom.set(xlim=(0, epochs), yscale="log", xlabel="epoch", ylabel="gradient, seed over model")
    bottom.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
