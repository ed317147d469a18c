"""Orders to the run in training: go back to an earlier epoch, wait, go on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from esper_ray import config as configuration
from esper_ray.contracts.enums import CommandType
from esper_ray.contracts.messages import AdaptationCommand, PauseDirective, RollbackDirective
from esper_ray.reliability.ids import derive_seed

if TYPE_CHECKING:
    from esper_ray.runtime import Session

console = Console(highlight=False)
_PATIENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.3

RunId = Annotated[str, typer.Argument(help="A run that is being trained.", metavar="RUN")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]


def rollback(
    run_id: RunId,
    to: Annotated[
        int | None, typer.Option(help="Back to the end of this epoch; else to the last one.", metavar="EPOCH")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="From the checkpoint on disk, whatever is in memory.")] = False,
    why: Annotated[str, typer.Option(help="Kept with it.", metavar="TEXT")] = "",
    config: File = None,
    settings: Settings = None,
) -> None:
    """Put the run in training back to an earlier epoch; it goes on from there on a new branch.

    Everything that was grafted, culled or fossilised since is undone. What was undone stays in `undone.jsonl`.

    Example: `esper rollback glyphs-3fa9c2 --to 7 --why "the seed of epoch 8 was a mistake"`
    """
    annotations = {"how": "full" if full else "fast"} | ({"why": why[:60]} if why else {})
    if to is None:
        annotations["to"] = "last"
    with _session(config, settings) as session:
        before = _progress(session, run_id).get("branch", 0)
        order = _command(run_id, CommandType.ROLLBACK, annotations=annotations, rollback=RollbackDirective(to or 0))
        session.order(run_id, order)
        after = _until(session, run_id, lambda progress: progress.get("branch", 0) > before)
        if after is None:
            console.print("Not followed yet. If the run refused it, the reason is among its events in mission control.")
            raise typer.Exit(1)
        console.print(f"{run_id} is back at epoch {after['epoch']}, on branch {after['branch']}.")


def pause(run_id: RunId, config: File = None, settings: Settings = None) -> None:
    """Let the run in training wait before its next step, until `esper proceed`."""
    _pause(run_id, config, settings, paused=True)


def proceed(run_id: RunId, config: File = None, settings: Settings = None) -> None:
    """Let a paused run go on."""
    _pause(run_id, config, settings, paused=False)


def _pause(run_id: str, config: Path | None, settings: list[str] | None, *, paused: bool) -> None:
    with _session(config, settings) as session:
        session.order(run_id, _command(run_id, CommandType.PAUSE, pause=PauseDirective(paused)))
        wanted = "paused" if paused else "training"
        after = _until(session, run_id, lambda progress: progress.get("state") == wanted)
        console.print(f"{run_id} {'waits' if paused else 'goes on'}." if after else "Not followed yet.")


def _session(config: Path | None, settings: list[str] | None) -> Session:
    from esper_ray.runtime import connect

    return connect(configuration.load(config, settings or ()), start=False)


def _command(run_id: str, kind: CommandType, **parts: Any) -> AdaptationCommand:
    now = time.time_ns()
    return AdaptationCommand(
        derive_seed(run_id, "order", now), kind, run_id, 0, now, os.environ.get("USER", "operator"), **parts
    )


def _progress(session: Session, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = session.ask("tolaria", "progress")
    return found if found.get("run_id") == run_id else {}


def _until(session: Session, run_id: str, holds: Any) -> dict[str, Any] | None:
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < give_up:
        progress = _progress(session, run_id)
        if holds(progress):
            return progress
        time.sleep(_PAUSE_SECONDS)
    return None


COMMANDS = (rollback, pause, proceed)
