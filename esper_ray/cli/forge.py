"""`esper forge`: makes the blocks for a task's slots by hand, and shows what compiling them brings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from esper_ray import cluster
from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.contracts.signing import load_keys
from esper_ray.errors import EnvironmentFault
from esper_ray.tezzeret.forge import Forge
from esper_ray.tezzeret.shift import Shift
from esper_ray.urza.catalog import Row
from esper_ray.urza.store import Store

console = Console(highlight=False)
_PAUSE_SECONDS = 0.2
_PHASES = {"eager": "building and checking", "compile": "compiling and measuring"}
State = Mapping[str, Any]
Rows = Callable[[], Iterable[Row]]


def forge(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(
            help="Slots such as conv-32x12x12, or single blocks such as BP009@conv-32x12x12; without them the slots of "
            "the configured task.",
            metavar="SLOT",
        ),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Show each block's step, eager and compiled.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file.", metavar="FILE")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="One setting; may be repeated.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Make blocks now: build and check them, then compile and measure them. What is there is not made again.

    Where a system is up its forge does it, and Ctrl-C only leaves; else it is done here, and Ctrl-C ends it. Nothing
    that is finished is lost.

    Examples:

    `esper forge --set forge.jobs=2`

    `esper forge conv-32x12x12 BP036@conv-32x12x12 --table`
    """
    loaded = configuration.load(config, settings or ())
    names = wanted or slots_of(loaded)
    with _smithy(loaded) as (start, progress, rows):
        start(names)
        last = follow(progress)
        if table:
            console.print(figures(rows(), names))
    if last["note"]:
        console.print(last["note"], soft_wrap=True)
    if last["phase"] == "failed":
        raise typer.Exit(1)


def slots_of(config: Config) -> list[str]:
    """What a run of the configured task would order."""
    from esper_ray.actors.surroundings import forge_order
    from esper_ray.tasks import build_task
    from esper_ray.tolaria.rows import pick_device

    with console.status(f"looking at the slots of {config.run.task}"):
        task = build_task(config.run, config.home / "data", pick_device(config.run.device))
    return forge_order(config, task.slots)


@contextmanager
def _smithy(config: Config) -> Iterator[tuple[Callable[[list[str]], object], Callable[[], State], Rows]]:
    """Where the work is done: how to order there, how far it is, and what is stored."""
    if cluster.locate(config) is not None:
        from esper_ray.actors import crew
        from esper_ray.runtime import connect

        with connect(config, start=False, say=console.print) as session:
            if crew.find("tezzeret", config.ray.namespace) is not None:
                yield (
                    lambda names: session.ask("tezzeret", "start_forge", names),
                    lambda: session.ask("tezzeret", "progress"),
                    lambda: session.ask("urza", "list"),
                )
                return
    store = Store(config.home / "urza")
    keys = load_keys(config.home / "keys" / "signing")
    made = Forge(store, config.home / "forge", config.forge, keys=keys, background=False)
    shift = Shift(made)
    try:
        yield shift.start, shift.progress, store.list
    finally:
        shift.stop()
        shift.wait()
        made.close()
        store.close()


def follow(progress: Callable[[], State], *, to: Console = console) -> State:
    """Show how far the forge is until it is through; gives its last state.

    Raises:
        EnvironmentFault: somebody dropped the order.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started, told = time.monotonic(), set[tuple[str, int]]()
    with Progress(*columns, console=to, disable=not to.is_terminal) as bars:
        lines = {phase: bars.add_task(text, total=None, start=False) for phase, text in _PHASES.items()}
        while True:
            state = progress()
            phase, total = state["phase"], state["total"]
            if phase in lines and total:
                text = f"{_PHASES[phase]} {_current(state)}".rstrip()
                bars.start_task(lines[phase])
                bars.update(lines[phase], total=total, completed=state["done"], description=text)
                tenth = 10 * state["done"] // total
                if not to.is_terminal and (phase, tenth) not in told:
                    to.print(f"{text}: {state['done']} of {total}", soft_wrap=True)
                told.add((phase, tenth))
            if state["ready"] and ("ready", 0) not in told:
                told.add(("ready", 0))
                to.print(f"all blocks can grow now, after {time.monotonic() - started:.1f} s")
            if phase in ("done", "failed"):
                return state
            if phase == "stopped":
                raise EnvironmentFault("The forge was stopped before it was through.", remedy="Order again.")
            time.sleep(_PAUSE_SECONDS)


def _current(state: State) -> str:
    block = str(state["current"] or "").partition("[")[0]
    return f"{block} (conservatively)" if state.get("conservative") else block


def figures(rows: Iterable[Row], names: Iterable[str]) -> Table:
    """The newest version of each block that was asked for: its step eager and compiled, and what it runs as."""
    signatures = {name.rpartition("@")[2] for name in names}
    newest = {row.key: row for row in rows if any(row.signature.startswith(each) for each in signatures)}
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("block")
    table.add_column("slot")
    for column in ("eager ms", "compiled ms", "gain", "compiling s", "faster as"):
        table.add_column(column, justify="right")
    for row in newest.values():
        eager, compiled = row.metadata.get("eager_ms"), row.metadata.get("compiled_ms")
        gain = f"{eager / compiled:.2f}" if eager and compiled else ""
        seconds = row.metadata.get("compile_seconds")
        cells = [f"{value:.2f}" if value else "" for value in (eager, compiled)]
        table.add_row(
            row.blueprint, row.signature, *cells, gain, f"{seconds:.1f}" if seconds else "", str(row.strategy)
        )
    return table
