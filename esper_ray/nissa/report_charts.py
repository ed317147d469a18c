"""The report's charts, drawn once with matplotlib: as a PNG, and as SVG whose colours are the page's own variables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any, BinaryIO, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from esper_ray.contracts.budgets import BOUNDARY_MS, BOUNDARY_PARTS
from esper_ray.nissa.report_data import ArmRun, Life

Palette = Mapping[str, str]
Draw = Callable[[Axes, Palette], None]

_STYLE = Path(__file__).parent / "web" / "page.css"
_ARM_COLOURS = {"grown": "accent", "host": "second", "final": "quiet"}
_LABELLED_WIDTH = 0.09
_LIVES = "the seeds' lives: number · blueprint · slot"
RC: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 9.0, "axes.linewidth": 0.8, "font.family": "DejaVu Sans"}


def light_palette() -> dict[str, str]:
    """The light colours of Nissa's page, by the names of its variables."""
    first_block = _STYLE.read_text().split("}", 1)[0]
    return dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", first_block))


def svg(draw: Draw, *, width: float, height: float, name: str) -> str:
    """A chart as inline SVG: each colour is a variable of the page, so that it follows light and dark."""
    stand_ins = {key: f"#0f{number:04x}" for number, key in enumerate(light_palette())}
    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes, stand_ins)
        plain(axes, stand_ins)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for key, stand_in in stand_ins.items():
        text = text.replace(stand_in, f"var(--{key})")
    return re.sub(r'(<svg[^>]*?) width="[^"]+"|(<svg[^>]*?) height="[^"]+"', r"\1\2", text)


def png(run: ArmRun, others: Sequence[ArmRun], seeds: Sequence[Life], title: str, sink: BinaryIO) -> None:
    """All charts on one sheet."""
    palette = light_palette()
    arms = [run, *others]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(14, 10), layout="constrained", facecolor=palette["card"])
        grid = figure.add_gridspec(3, 6, height_ratios=[1.25, 0.5 + 0.17 * max(len(seeds), 2), 0.9])
        figure.suptitle(fill(title, 130), x=0.01, ha="left", fontsize=13, color=palette["ink"])
        for place, heading, draw in (
            (grid[0, 0:3], "accuracy on the validation split, by epoch", accuracy(arms, seeds)),
            (grid[0, 3:6], "accuracy, by compute", by_compute(arms)),
            (grid[1, 0:6], _LIVES, timeline(seeds, run)),
            (grid[2, 0:2], "loss", losses(arms)),
            (grid[2, 2:4], f"boundary, ms (budget {BOUNDARY_MS.limit:g})", boundary(run)),
            (grid[2, 4:6], "parameters", parameters(arms)),
        ):
            axes = figure.add_subplot(place)
            axes.set_facecolor(palette["card"])
            draw(axes, palette)
            plain(axes, palette)
            axes.set_title(heading, loc="left", fontsize=10, color=palette["ink"])
            if heading == _LIVES:
                _stage_key(axes, palette, seeds)
        figure.savefig(sink, dpi=110, format="png", metadata={"Software": None})


def accuracy(arms: Sequence[ArmRun], seeds: Sequence[Life]) -> Draw:
    """Validation accuracy of each arm by epoch; a dashed line and a dot for each graft."""

    def draw(axes: Axes, palette: Palette) -> None:
        for arm in arms:
            values = [100 * value for value in arm.series("validation_accuracy")]
            _curve(axes, palette, arm, arm.series("epoch"), values)
        grown = arms[0]
        epochs, values = grown.series("epoch"), [100 * value for value in grown.series("validation_accuracy")]
        for at, group in _grafts(seeds).items():
            axes.axvline(at, color=palette["blending"], linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
            axes.plot([at], [value_at(epochs, values, at)], "o", color=palette["blending"], markersize=6, zorder=5)
            axes.annotate(
                f"graft {', '.join(str(life.seed) for life in group)}",
                (at, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                color=palette["blending"],
                fontsize=8,
            )
        _turns(axes, palette, grown)
        axes.set_xlabel("epoch")
        axes.set_ylabel("%")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, palette)

    return draw


def _turns(axes: Axes, palette: Palette, run: ArmRun) -> None:
    """A red line where the run was put back to, and from how far."""
    for turn in run.incidents:
        if turn.get("kind") == "rollback":
            axes.axvline(float(turn["to"]), color=palette["bad"], linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(
                f"back from {turn['from_epoch']}",
                (float(turn["to"]), 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(4, -8),
                textcoords="offset points",
                color=palette["bad"],
                fontsize=8,
            )


def by_compute(arms: Sequence[ArmRun]) -> Draw:
    """The same accuracy against floating-point operations: the comparison at equal cost."""

    def draw(axes: Axes, palette: Palette) -> None:
        for arm in arms:
            values = [100 * value for value in arm.series("validation_accuracy")]
            _curve(axes, palette, arm, [value / 1e12 for value in arm.series("flops")], values)
        axes.set_xlabel("TFLOP charged to the run")
        axes.set_ylabel("%")
        _legend(axes, palette)

    return draw


def losses(arms: Sequence[ArmRun]) -> Draw:
    """Validation loss as a line, training loss dotted."""

    def draw(axes: Axes, palette: Palette) -> None:
        for arm in arms:
            colour = palette[_ARM_COLOURS.get(arm.arm, "quiet")]
            _curve(axes, palette, arm, arm.series("epoch"), arm.series("validation_loss"))
            axes.plot(arm.series("epoch"), arm.series("training_loss"), ":", color=colour, linewidth=1.1)
        axes.set_xlabel("epoch  (dotted: training split)")
        axes.set_ylabel("nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def parameters(arms: Sequence[ArmRun]) -> Draw:
    """Parameters of host and live seeds by epoch."""

    def draw(axes: Axes, palette: Palette) -> None:
        for arm in arms:
            _curve(axes, palette, arm, arm.series("epoch"), [value / 1e3 for value in arm.series("parameters")])
        axes.set_xlabel("epoch")
        axes.set_ylabel("thousand")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def compute(arms: Sequence[ArmRun]) -> Draw:
    """Floating-point operations charged to each run by epoch."""

    def draw(axes: Axes, palette: Palette) -> None:
        for arm in arms:
            _curve(axes, palette, arm, arm.series("epoch"), [value / 1e12 for value in arm.series("flops")])
        axes.set_xlabel("epoch")
        axes.set_ylabel("TFLOP")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def timeline(seeds: Sequence[Life], run: ArmRun) -> Draw:
    """A bar for each stage of each seed; the diamond is the graft."""

    def draw(axes: Axes, palette: Palette) -> None:
        last = float(run.rows[-1]["epoch"])
        for row, life in enumerate(seeds):
            for stay in life.stays:
                length = max(stay.end - stay.start, 0.0)
                colour = palette.get(stay.stage.lower(), palette["germinated"])
                axes.barh(row, length, left=stay.start, height=0.62, color=colour, linewidth=0)
                if length > _LABELLED_WIDTH * last:
                    axes.text(stay.start + 0.06, row, stay.stage.lower(), va="center", fontsize=7.5, color="#ffffff")
            if life.grafted_at is not None:
                axes.plot([life.grafted_at], [row], "D", color=palette["ink"], markersize=4.5, zorder=5)
        axes.set_yticks(range(len(seeds)), [life.name for life in seeds])
        axes.set_ylim(max(len(seeds), 1) - 0.4, -0.6)
        axes.set_xlim(0, last)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not seeds:
            axes.text(0.5, 0.5, "no seed was born in this run", ha="center", transform=axes.transAxes)
            axes.set_yticks([])

    return draw


def boundary(run: ArmRun) -> Draw:
    """The parts of each boundary stacked, against the budget of the whole."""

    def draw(axes: Axes, palette: Palette) -> None:
        epochs = run.series("epoch")
        floor = [0.0] * len(epochs)
        for part in BOUNDARY_PARTS:
            values = [float(row["boundary"][part.key]) for row in run.rows]
            axes.bar(epochs, values, bottom=floor, width=0.8, color=palette[part.key], label=part.key, linewidth=0)
            floor = [below + value for below, value in zip(floor, values, strict=True)]
        axes.axhline(BOUNDARY_MS.limit, color=palette["bad"], linewidth=1.2, linestyle=(0, (5, 4)))
        missed = [float(row["epoch"]) for row in run.rows if row.get("missed")]
        axes.plot(missed, [BOUNDARY_MS.limit] * len(missed), "x", color=palette["bad"], markersize=6)
        axes.set_ylim(0, max(BOUNDARY_MS.limit, *floor) * 1.25)
        axes.set_xlabel("epoch")
        axes.set_ylabel("ms")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, palette, columns=4, place="upper left")

    return draw


def _curve(axes: Axes, palette: Palette, arm: ArmRun, x: Sequence[float], y: Sequence[float]) -> None:
    colour = palette[_ARM_COLOURS.get(arm.arm, "quiet")]
    width = 2.2 if arm.arm == "grown" else 1.6
    axes.plot(x, y, color=colour, linewidth=width, label=arm.name, zorder=3 if arm.arm == "grown" else 2)


def _grafts(seeds: Sequence[Life]) -> dict[float, list[Life]]:
    found: dict[float, list[Life]] = {}
    for life in seeds:
        if life.grafted_at is not None:
            found.setdefault(life.grafted_at, []).append(life)
    return found


def value_at(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Linear interpolation, flat beyond the ends."""
    pairs = list(zip(x, y, strict=True))
    for (x0, y0), (x1, y1) in pairwise(pairs):
        if x0 <= at <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return pairs[0][1] if at < pairs[0][0] else pairs[-1][1]


def _legend(axes: Axes, palette: Palette, *, columns: int = 1, place: Literal["best", "upper left"] = "best") -> None:
    axes.legend(frameon=False, labelcolor=palette["ink"], fontsize=8.5, ncols=columns, handlelength=1.4, loc=place)


def _stage_key(axes: Axes, palette: Palette, seeds: Sequence[Life]) -> None:
    """What the colours of the bars mean; the page has its own key."""
    met = dict.fromkeys(stay.stage.lower() for life in seeds for stay in life.stays if stay.end > stay.start)
    axes.legend(
        handles=[Patch(color=palette.get(stage, palette["germinated"]), label=stage) for stage in met],
        frameon=False,
        labelcolor=palette["ink"],
        fontsize=8.5,
        ncols=max(len(met), 1),
        handlelength=1.0,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
    )


def plain(axes: Axes, palette: Palette) -> None:
    """No box, quiet ticks, a light grid."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette["line"])
    axes.tick_params(colors=palette["quiet"], length=0, labelsize=8.5)
    axes.xaxis.label.set_color(palette["quiet"])
    axes.yaxis.label.set_color(palette["quiet"])
    axes.grid(True, color=palette["line"], linewidth=0.7)
    axes.set_axisbelow(True)
