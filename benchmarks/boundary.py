"""The boundary's budget, on the real path: a real run in the live mode, Tolaria and Tamiyo in their own Ray actors.

A small host trains between two boundaries, with everything else of the system up; the times are those that the run
itself wrote down. The short form has 1,010 boundaries with four steps between them, the long one 5,000 with twelve.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress

from benchmarks import common
from benchmarks.common import Bar, percentile
from esper_ray import config as configuration
from esper_ray.contracts.budgets import APPLY_MS, ASSEMBLY_MS, BOUNDARY_MS, DECIDE_MS, GUARD_MS
from esper_ray.runtime import connect

PARTS = (ASSEMBLY_MS, DECIDE_MS, APPLY_MS, GUARD_MS)
BARS = (
    Bar("boundary_p99_ms", BOUNDARY_MS.limit),
    *(Bar(f"{part.key}_p99_ms", part.limit) for part in PARTS),
)


def measure(boundaries: int, steps: int) -> dict[str, Any]:
    """Run with so many steps from boundary to boundary, and read what the run measured."""
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        config = configuration.load(
            None,
            [
                f"home={home}", "run.dataset=digits", "run.mode=live", f"run.epochs={boundaries}",
                f"run.boundary_every={steps}", "run.host_width=8", "ray.namespace=benchmark", "nissa.port=0",
                "forge.compile=never",
            ],
        )  # fmt: skip
        with connect(config, say=common.console.print) as session:
            session.up()
            run = session.submit(config)
            with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=common.console) as bar:
                task = bar.add_task("boundaries", total=boundaries)
                session.wait(run, on_status=lambda status: bar.update(task, completed=_done(status, boundaries)))
        rows = [json.loads(line) for line in (Path(home) / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    totals = [row["boundary"]["total"] for row in rows]
    figures: dict[str, Any] = {
        "boundaries": len(rows),
        "boundary_p50_ms": percentile(totals, 50),
        "boundary_p99_ms": percentile(totals, 99),
    }
    for part in PARTS:
        values = [row["boundary"][part.key] for row in rows]
        figures[f"{part.key}_p50_ms"] = percentile(values, 50)
        figures[f"{part.key}_p99_ms"] = percentile(values, 99)
    figures["missed_deadlines"] = sum(row["missed"] for row in rows)
    return figures


def _done(status: dict[str, Any], boundaries: int) -> int:
    progress = status["arms"][0]["progress"] or {}
    return boundaries if status["over"] else int(progress.get("epoch", 0))


def main() -> None:
    given = common.parser(__doc__).parse_args()
    common.run("boundary", BARS, lambda: measure(*((1010, 4) if given.quick else (5000, 12))), given.json)


if __name__ == "__main__":
    main()
