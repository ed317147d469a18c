"""Orders to the run in training: grow here, cull there, go back to an earlier epoch, wait, go on."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from esper_ray import config as configuration
from esper_ray.contracts.enums import CommandType, SeedOperation
from esper_ray.contracts.messages import AdaptationCommand, PauseDirective, RollbackDirective
from esper_ray.errors import RunError
from esper_ray.reliability.ids import derive_seed
from esper_ray.tolaria import by_hand
from esper_ray.tolaria.by_hand import Wish

if TYPE_CHECKING:
    from esper_ray.runtime import Session

console = Console(highlight=False)
_PATIENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.3
_NOT_YET = "Not taken up yet: the run looks for orders between two steps. After a minute it is void."
_AT_WORK = ("training", "paused")

OneRun = Annotated[str | None, typer.Argument(help="A run; else the one in training.", metavar="[RUN]")]
Run = Annotated[str | None, typer.Option("--run", help="Which run; else the one in training.", metavar="RUN")]
Slot = Annotated[str, typer.Argument(help="A slot of the model, by name or index.", metavar="SLOT")]
Why = Annotated[str, typer.Option(help="Kept with it.", metavar="TEXT")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the boundary that carries it out.")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]


def grow(
    slot: Slot,
    blueprint: Annotated[str, typer.Argument(help="Which block, by number or name.", metavar="BLUEPRINT")],
    run: Run = None,
    why: Why = "",
    wait: Wait = True,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Let a block grow in a slot of the run in training, from its next boundary on.

    It takes the way of every seed: gates, limits, the course of its stages. It is recorded as your decision.

    Example: `esper grow stage2 BP009 --why "the middle of the model is too weak"`
    """
    _decide(Wish(SeedOperation.GERMINATE, slot, blueprint), run, why, config, settings, wait=wait)


def cull(
    slot: Slot,
    run: Run = None,
    why: Why = "",
    wait: Wait = True,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Take the seed out of a slot of the run in training, at its next boundary.

    Example: `esper cull stage2`
    """
    _decide(Wish(SeedOperation.CULL, slot), run, why, config, settings, wait=wait)


def rollback(
    run_id: OneRun = None,
    to: Annotated[
        int | None, typer.Option(help="Back to the end of this epoch; else to the last one.", metavar="EPOCH")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="From the checkpoint on disk, whatever is in memory.")] = False,
    why: Why = "",
    config: File = None,
    settings: Settings = None,
) -> None:
    """Put the run in training back to an earlier epoch; it goes on from there on a new branch.

    Everything that was grafted, culled or fossilised since is undone. What was undone stays in `undone.jsonl`.

    Example: `esper rollback --to 7 --why "the seed of epoch 8 was a mistake"`
    """
    annotations = {"how": "full" if full else "fast"} | ({"why": why[:60]} if why else {})
    if to is None:
        annotations["to"] = "last"
    with _session(config, settings) as session:
        run_id = _run_in_training(session, run_id)
        before = _progress(session, run_id).get("branch", 0)
        order = _command(run_id, CommandType.ROLLBACK, annotations=annotations, rollback=RollbackDirective(to or 0))
        session.order(run_id, order)
        after = _until(session, run_id, lambda progress: progress.get("branch", 0) > before)
        if after is None:
            console.print("Not followed yet. If the run refused it, the reason is among its events in mission control.")
            raise typer.Exit(1)
        console.print(f"{run_id} is back at epoch {after['epoch']}, on branch {after['branch']}.")


def pause(run_id: OneRun = None, config: File = None, settings: Settings = None) -> None:
    """Let the run in training wait before its next step, until `esper resume`."""
    _pause(run_id, config, settings, paused=True)


def resume(run_id: OneRun = None, config: File = None, settings: Settings = None) -> None:
    """Let a paused run go on. One that was stopped is taken up with `esper run --resume RUN`."""
    _pause(run_id, config, settings, paused=False)


def _pause(run_id: str | None, config: Path | None, settings: list[str] | None, *, paused: bool) -> None:
    with _session(config, settings) as session:
        run_id = _run_in_training(session, run_id)
        session.order(run_id, _command(run_id, CommandType.PAUSE, pause=PauseDirective(paused)))
        wanted = "paused" if paused else "training"
        after = _until(session, run_id, lambda progress: progress.get("state") == wanted)
        console.print(f"{run_id} {'waits' if paused else 'goes on'}." if after else _NOT_YET)
        if after is None:
            raise typer.Exit(1)


def _decide(
    wish: Wish, run: str | None, why: str, config: Path | None, settings: list[str] | None, *, wait: bool
) -> None:
    from esper_ray.runs import find

    with _session(config, settings) as session:
        run_id = _run_in_training(session, run)
        manifest = find(session.config.runs, run_id).manifest
        order = by_hand.command(
            wish,
            by_hand.slots_of(manifest),
            run=run_id,
            author=author(),
            now_ns=time.time_ns(),
            approved=manifest["config"]["seeds"]["approved"],
            why=why,
        )
        session.order(run_id, order)
        told = _outcome(session, run_id, order, wait=wait)
    if told is None:
        console.print(_NOT_YET)
        raise typer.Exit(1)
    if told["state"] == "refused":
        raise RunError(f"{run_id} refused it.", why=f"{told['why'][:1].upper()}{told['why'][1:]}.".replace("..", "."))
    if told["state"] == "waiting":
        console.print(f"{run_id} does it at the end of epoch {told['epoch'] + 1}.")
        return
    console.print(f"{run_id} did it at the end of epoch {told['epoch']}; its page and its report show what follows.")


def _outcome(session: Session, run_id: str, order: AdaptationCommand, *, wait: bool) -> dict[str, Any] | None:
    """What became of a decision; waits for its boundary where that is wanted, and it was taken up."""

    def told(progress: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = progress.get("orders", {}).get(str(order.command_id), {})
        return found

    taken = _until(session, run_id, told)
    if taken is None:
        return None
    found = told(taken)
    if not wait or found["state"] != "waiting":
        return found
    console.print(f"{run_id} does it at the end of epoch {found['epoch'] + 1}; waiting. Ctrl-C leaves it to the run.")
    while found["state"] == "waiting":
        progress = _progress(session, run_id)
        if progress.get("state") not in _AT_WORK:
            raise RunError(f"{run_id} ended before that boundary.", why="It was stopped, or has failed.")
        found = told(progress) or found
        time.sleep(_PAUSE_SECONDS)
    return found


def author() -> str:
    """Who gives orders, as they are recorded."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "operator"


def _session(config: Path | None, settings: list[str] | None) -> Session:
    from esper_ray.runtime import connect

    return connect(configuration.load(config, settings or ()), start=False)


def _command(run_id: str, kind: CommandType, **parts: Any) -> AdaptationCommand:
    now = time.time_ns()
    return AdaptationCommand(derive_seed(run_id, "order", now), kind, run_id, 0, now, author(), **parts)


def _run_in_training(session: Session, run_id: str | None) -> str:
    """The run that was named, or the one that is trained now.

    Raises:
        RunError: none was named, and none is trained.
    """
    if run_id is not None:
        return run_id
    progress: dict[str, Any] = session.ask("tolaria", "progress")
    if progress.get("state") not in _AT_WORK:
        raise RunError(
            "No run is being trained now.",
            why="Only a run in training follows orders.",
            remedy="See `esper status`; a run that was stopped goes on with `esper run --resume RUN`.",
        )
    return str(progress["run_id"])


def _progress(session: Session, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = session.ask("tolaria", "progress")
    return found if found.get("run_id") == run_id else {}


def _until(session: Session, run_id: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < give_up:
        progress = _progress(session, run_id)
        if holds(progress):
            return progress
        time.sleep(_PAUSE_SECONDS)
    return None


COMMANDS = (grow, cull, rollback, pause, resume)
