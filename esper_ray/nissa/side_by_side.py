"""Runs side by side: their figures, where their decisions differ, and one picture of their curves.

Made from the runs' folders alone. A fork shares its first epochs with its parent, and shows them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from esper_ray.nissa.report_charts import RC, light_palette, plain, value_at
from esper_ray.nissa.report_data import ArmRun, lives, read_run
from esper_ray.reliability import atomic

_COLOURS = ("accent", "second", "fossilized", "blending", "culled", "probationary", "shadowing", "quiet")
_PANELS = (
    ("validation_accuracy", "accuracy on the validation split", "%", 100.0),
    ("validation_loss", "loss on the validation split", "nats", 1.0),
    ("parameters", "parameters", "thousand", 1e-3),
    ("flops", "compute charged to the run", "TFLOP", 1e-12),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What runs decided differently at one boundary: for each run in order its acts, in words."""

    epoch: int
    acts: tuple[str, ...]


def read(folders: Iterable[Path]) -> list[ArmRun]:
    """The runs.

    Raises:
        RunError: one of the folders is no run, or has no epoch yet.
    """
    return [read_run(folder) for folder in folders]


def figures(run: ArmRun) -> dict[str, Any]:
    """The run in one row; what its end would tell is None while it is not over."""
    last, fates = run.rows[-1], [life.fate for life in lives(run)]
    best = max(run.rows, key=lambda row: float(row["validation_accuracy"]))
    return {
        "status": run.result.get("status", "open"),
        "epochs": int(last["epoch"]),
        "validation_accuracy": float(last["validation_accuracy"]),
        "validation_loss": float(last["validation_loss"]),
        "best_accuracy": float(best["validation_accuracy"]),
        "best_epoch": int(best["epoch"]),
        "test_accuracy": run.result.get("test_accuracy"),
        "test_loss": run.result.get("test_loss"),
        "parameters": int(last["parameters"]),
        "flops": float(last["flops"]),
        "seconds": float(last["seconds"]),
        "kept": fates.count("FOSSILIZED"),
        "culled": fates.count("CULLED"),
    }


def differences(runs: Sequence[ArmRun]) -> list[Difference]:
    """The boundaries at which not all runs did the same, in order."""
    acts = [_acts(run) for run in runs]
    epochs = sorted({epoch for each in acts for epoch in each})
    rows = (Difference(epoch, tuple(each.get(epoch, "") for each in acts)) for epoch in epochs)
    return [row for row in rows if len(set(row.acts)) > 1]


def _acts(run: ArmRun) -> dict[int, str]:
    """By epoch what was decided and not refused; whoever is not Tamiyo is named by what is recorded."""
    slots = {slot["index"]: slot["name"] for slot in run.manifest.get("slots", ())}
    found: dict[int, list[str]] = {}
    for event in run.of_kind("decision"):
        for command in event["commands"]:
            if command["operation"] == "NO_OP":
                continue
            what = " ".join(
                filter(None, (command["operation"].lower(), command["blueprint"], _in(slots, command["slot"])))
            )
            refused = " (refused)" if event.get("refused") else ""
            found.setdefault(int(event["epoch"]), []).append(f"{what}, {event.get('controller', '')}{refused}")
    return {epoch: "; ".join(each) for epoch, each in found.items()}


def _in(slots: Mapping[int, str], slot: Any) -> str:
    return f"in {slots.get(slot, slot)}" if slot != "" else ""


def write_picture(runs: Sequence[ArmRun], file: Path) -> None:
    """Four panels over the epochs, a curve for each run; dots are grafts, crosses culls, dotted lines rollbacks.

    Raises:
        StorageFault: the file cannot be written.
    """
    palette = light_palette()
    colours = [palette[_COLOURS[place % len(_COLOURS)]] for place in range(len(runs))]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(14, 8.5), layout="constrained", facecolor=palette["card"])
        for place, panel in enumerate(_PANELS):
            axes = figure.add_subplot(2, 2, place + 1)
            axes.set_facecolor(palette["card"])
            _draw(axes, runs, colours, panel)
            plain(axes, palette)
            axes.set_title(panel[1], loc="left", fontsize=10, color=palette["ink"])
            if not place:
                axes.legend(frameon=False, labelcolor=palette["ink"], fontsize=8.5, handlelength=1.4)
        scratch = io.BytesIO()
        figure.savefig(scratch, dpi=110, format="png", metadata={"Software": None})
    atomic.write_bytes(file, scratch.getvalue())


def _draw(axes: Axes, runs: Sequence[ArmRun], colours: Sequence[str], panel: tuple[str, str, str, float]) -> None:
    key, _, unit, scale = panel

    for place, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        epochs, values = run.series("epoch"), [value * scale for value in run.series(key)]
        dashes = "-" if not place else (0, (4 + place, 2))
        axes.plot(
            epochs, values, color=colour, linestyle=dashes, linewidth=2.0, label=run.folder.name, zorder=3 + place
        )
        for at, mark in _marks(run):
            axes.plot([at], [value_at(epochs, values, at)], mark, color=colour, markersize=6, zorder=9)
        for turn in run.incidents:
            if turn.get("kind") == "rollback":
                axes.axvline(float(turn["to"]), color=colour, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    axes.set_xlabel("epoch  (dot: graft, cross: cull)")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _marks(run: ArmRun) -> Iterable[tuple[float, str]]:
    for life in lives(run):
        if life.grafted_at is not None:
            yield life.grafted_at, "o"
        yield from ((stay.start, "x") for stay in life.stays if stay.stage == "CULLED")
