"""What the commands print: tables made with rich, from plain dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from esper_ray.config import Config, describe

if TYPE_CHECKING:
    from esper_ray.doctor import Finding
    from esper_ray.runtime import Session

_STATE_STYLE = {"up": "green", "starting": "yellow", "restarting": "yellow", "dead": "red"}
_VERDICT_STYLE = {"ok": "green", "note": "yellow", "missing": "red"}
ARM_NAMES = {"grown": "grown", "host": "host alone", "final": "final size"}


def system(console: Console, session: Session, status: dict[str, Any]) -> None:
    """Addresses, actors and runs."""
    addresses(console, session, status)
    table = made_table("actor", "state", "process", "restarts", "")
    for name, actor in status["actors"].items():
        state = f"[{_STATE_STYLE.get(actor['state'], '')}]{actor['state']}[/]"
        table.add_row(name, state, str(actor["pid"] or ""), str(actor["restarts"] or ""), actor["error"])
    console.print(table)
    for run in status["runs"]:
        console.print(f"run {run['run_id']} {run['state']} {run['message']}")
    if status.get("fault"):
        console.print(f"[red]the supervisor's control loop: {status['fault']}[/red]")


def addresses(console: Console, session: Session, status: dict[str, Any]) -> None:
    """Where to look, and which backends are used."""
    grid = Table.grid(padding=(0, 2))
    for name, value in session.places(status).items():
        grid.add_row(f"[dim]{name}[/dim]", value)
    console.print(grid)


def ended(console: Console, what: dict[str, Any]) -> None:
    """What `esper down` ended."""
    for run in what["runs"]:
        console.print(f"stopped run {run}; continue it with: esper run --resume {run}")
    console.print(f"ended {len(what['actors'])} actors{' and Ray' if what['ray'] else ''}")


def runs(console: Console, folder: Path) -> None:
    """The runs on disk."""
    from esper_ray.runs import every

    found = every(folder)
    if not found:
        console.print(f"There are no runs in {folder} yet. Start one with: esper run --fast")
        return
    table = made_table("run", "arm", "state", "epochs", "test", "parameters", "seeds", "started")
    for run in found:
        result = run.result
        table.add_row(
            run.run_id,
            origin(run.manifest),
            str(result.get("status", "open")),
            str(result.get("epochs", "")),
            percent(result.get("test_accuracy")),
            thousands(result.get("parameters")),
            _seeds(result),
            str(run.manifest.get("started_at", ""))[5:16].replace("T", " "),
        )
    console.print(table)


def origin(manifest: dict[str, Any]) -> str:
    """The arm, and for a fork where it comes from."""
    fork = manifest.get("fork")
    place = f", from {fork['parent']}@{fork['epoch']}" if fork else ""
    return f"{manifest.get('arm', '')}{place}"


def comparison(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """One row for each arm that is over; whatever it says."""
    table = made_table("arm", "test accuracy", "parameters", "compute", "time", "seeds grown / culled")
    for result in results:
        table.add_row(
            ARM_NAMES.get(str(result.get("arm")), str(result.get("arm"))),
            percent(result.get("test_accuracy")),
            thousands(result.get("parameters")),
            f"{float(result.get('flops') or 0) / 1e12:.2f} TFLOP",
            f"{float(result.get('wall_seconds') or 0):.0f} s",
            _seeds(result),
        )
    console.print(table)


def settings(console: Console, config: Config) -> None:
    """Every key, its value, its meaning."""
    table = made_table("key", "value", "meaning")
    for key, value, meaning in describe(config):
        table.add_row(key, str(value) if value != "" else "[dim](empty)[/dim]", meaning)
    console.print(table)


def findings(console: Console, found: Sequence[Finding]) -> None:
    """What the doctor saw."""
    table = made_table("", "what", "found", "remedy")
    for finding in found:
        verdict = f"[{_VERDICT_STYLE[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(verdict, finding.what, finding.found, finding.remedy)
    console.print(table)


def percent(value: Any) -> str:
    return "" if value is None else f"{100 * float(value):.2f} %"


def thousands(value: Any) -> str:
    return "" if value is None else f"{int(value):,}"


def _seeds(result: dict[str, Any]) -> str:
    return f"{result.get('fossilized', 0)} / {result.get('culled', 0)}" if result.get("arm") == "grown" else ""


def made_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "run")
    return table
