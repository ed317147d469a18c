"""`esper compare`: runs side by side in the terminal, and their curves in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from esper_ray.cli.show import made_table, origin, percent, thousands
from esper_ray.errors import RunError
from esper_ray.runs import find

if TYPE_CHECKING:
    from esper_ray.nissa.report_data import ArmRun

PICTURE = "compare.png"


def compare(console: Console, runs: Path, run_ids: Sequence[str], out: Path | None) -> None:
    """Print the figures and the decisions that differ, and write the picture: by default beside the last run's report.

    Raises:
        RunError: less than two runs were named, one does not exist, or has no epoch yet.
    """
    if len(set(run_ids)) < 2:
        raise RunError("It takes two runs to compare.", remedy="`esper runs` lists them.")
    from esper_ray.nissa import side_by_side

    found = side_by_side.read(find(runs, run_id).path for run_id in dict.fromkeys(run_ids))
    names = [run.folder.name for run in found]
    console.print(_figures(found, [side_by_side.figures(run) for run in found]))
    different = side_by_side.differences(found)
    if different:
        table = made_table("epoch", *names)
        for row in different:
            table.add_row(str(row.epoch), *(text or "[dim]no change[/dim]" for text in row.acts))
        console.print(table)
    else:
        console.print("Their decisions are the same.")
    file = out or found[-1].folder / PICTURE
    side_by_side.write_picture(found, file)
    console.print(f"picture {file}", soft_wrap=True)


def _figures(runs: Sequence[ArmRun], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = made_table("", *(run.folder.name for run in runs))
    table.add_row("what", *(origin(run.manifest) for run in runs))
    table.add_row("state", *(f"{row['status']}, {row['epochs']} epochs" for row in rows))
    table.add_row("test accuracy", *(percent(row["test_accuracy"]) for row in rows))
    table.add_row("test loss", *("" if row["test_loss"] is None else f"{row['test_loss']:.4f}" for row in rows))
    table.add_row("validation accuracy", *(percent(row["validation_accuracy"]) for row in rows))
    table.add_row("its best", *(f"{percent(row['best_accuracy'])}, epoch {row['best_epoch']}" for row in rows))
    table.add_row("validation loss", *(f"{row['validation_loss']:.4f}" for row in rows))
    table.add_row("parameters", *(thousands(row["parameters"]) for row in rows))
    table.add_row("compute", *(f"{row['flops'] / 1e12:.3f} TFLOP" for row in rows))
    table.add_row("time", *(f"{row['seconds']:.0f} s" for row in rows))
    table.add_row("seeds kept / culled", *(f"{row['kept']} / {row['culled']}" for row in rows))
    return table
