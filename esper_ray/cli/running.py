"""Follows a run in the terminal, from its submission to the table at its end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper_ray.cli import show
from esper_ray.config import Config
from esper_ray.errors import EsperError
from esper_ray.runs import read_json
from esper_ray.runtime import Session, raise_failure

INTERRUPTED = 130
Status = dict[str, Any]


def run_to_end(
    console: Console, session: Session, config: Config, *, compare: bool = False, resume: str | None = None
) -> int:
    """Bring the system up, submit, follow, sum up; returns the exit code.

    Raises:
        EsperError: the system does not come up, or the run fails.
    """
    return follow_to_end(console, session, lambda: session.submit(config, compare=compare, resume=resume))


def follow_to_end(console: Console, session: Session, submit: Callable[[], str]) -> int:
    """Bring the system up, ask for a run, follow it, sum up; returns the exit code.

    Raises:
        EsperError: the system does not come up, or the run fails.
    """
    with console.status("starting the actors"):
        system = session.up()
    show.addresses(console, session, system)
    run_id = submit()
    console.print(f"run [bold]{run_id}[/bold]")
    status, left = follow(console, session, run_id)
    if left:
        return INTERRUPTED
    raise_failure(status)
    conclude(console, session, status)
    return 0 if status["state"] == "finished" else INTERRUPTED


def follow(console: Console, session: Session, run_id: str) -> tuple[Status, bool]:
    """Show the run until it is over. The first Ctrl-C stops it; at the second this leaves, and says so by its flag."""
    status: Status = {}
    with Interrupts() as interrupts, LiveView(console) if console.is_terminal else LineView(console) as view:
        told = 0
        for status in session.watch(run_id):
            view.update(status)
            if interrupts.count > told and not status["over"]:
                told = interrupts.count
                if told > 1:
                    session.leave()
                    console.print("Left. The run ends without this terminal: see `esper status`, then `esper down`.")
                    return status, True
                session.stop(run_id)
                console.print("Stopping with a checkpoint. Ctrl-C again leaves at once.")
    return status, False


class Interrupts:
    """Counts Ctrl-C instead of breaking off a call half-way; from the third on they break off all the same."""

    def __init__(self) -> None:
        self.count = 0
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, _: int, __: FrameType | None) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt


def conclude(console: Console, session: Session, status: Status) -> None:
    """The arms' table, how to go on, and where the report is."""
    results = [arm["result"] for arm in status["arms"] if "test_accuracy" in (arm["result"] or {})]
    if results:
        show.comparison(console, results)
    run_id = status["run_id"]
    if status["state"] == "stopped":
        console.print(f"Stopped. Continue with: esper run --resume {run_id}")
    try:
        with console.status("writing the report"):
            console.print(f"report  {session.report(run_id)}", soft_wrap=True)
    except EsperError as error:
        console.print(f"[yellow]no report:[/yellow] {error}")
    console.print(f"folder  {session.config.runs / run_id}", soft_wrap=True)
    if status["state"] == "finished":
        console.print(f"model   esper export {run_id} --out FOLDER")
    parent = (read_json(session.config.runs / run_id / "manifest.json").get("fork") or {}).get("parent")
    if parent:
        console.print(f"compare esper compare {parent} {run_id}")


class LineView:
    """For pipes and logs: a line for each epoch and each change of state."""

    def __init__(self, console: Console) -> None:
        self._console, self._printed = console, set[tuple[Any, ...]]()

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, status: Status) -> None:
        if status["message"]:
            self._once(("message", status["message"]), status["message"])
        forge = status.get("forge") or {}
        if forge_text(status):
            tenth = 10 * forge["done"] // forge["total"]
            self._once(("forge", forge["total"], tenth), forge_text(status))
        for arm in status["arms"]:
            progress = arm["progress"]
            if not progress:
                continue
            name = show.ARM_NAMES[arm["arm"]]
            if progress.get("message"):
                self._once((name, progress["message"]), f"{name}: {progress['message']}")
            if progress.get("state") == "training" and progress.get("validation_accuracy") is not None:
                key = (arm["run_id"], progress["epoch"])
                self._once(key, f"{name}: epoch {epoch_text(progress)}  {figures(progress)}  {seeds_text(progress)}")

    def _once(self, key: tuple[Any, ...], line: str) -> None:
        if key not in self._printed:
            self._printed.add(key)
            self._console.print(line.rstrip(), soft_wrap=True)


class LiveView:
    """For a terminal: one line per arm with its bar and figures, the seeds' stages, and the forge."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8, transient=False)
        self._last: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, status: Status) -> None:
        self._live.update(Group(*self._parts(status)))

    def _parts(self, status: Status) -> Iterator[RenderableType]:
        table = Table.grid(padding=(0, 2))
        for arm in status["arms"]:
            progress = arm["progress"] or {}
            if progress.get("epochs"):
                self._last[arm["run_id"]] = progress
            progress = self._last.get(arm["run_id"], {})
            table.add_row(*self._row(arm, progress))
        yield table
        active = next((arm["progress"] for arm in status["arms"] if arm["progress"]), None) or {}
        notes = (seeds_text(active), forge_text(status), str(active.get("message") or ""), status["message"])
        yield from (Text(f"  {note}", style="dim") for note in notes if note)

    def _row(self, arm: dict[str, Any], progress: dict[str, Any]) -> tuple[RenderableType, ...]:
        epochs = max(int(progress.get("epochs") or 1), 1)
        steps = int(progress.get("steps") or 0)
        done = int(progress.get("step") or 0) / steps if steps else int(progress.get("epoch") or 0) / epochs
        done = 1.0 if arm["state"] == "finished" else min(done, 1.0)
        bar = ProgressBar(total=1.0, completed=done, width=24)
        text = figures(progress) if progress else arm["state"]
        if arm["state"] == "finished" and arm["result"]:
            text = f"test accuracy {show.percent(arm['result'].get('test_accuracy'))}"
        return show.ARM_NAMES[arm["arm"]], bar, epoch_text(progress) if progress else "", text


def epoch_text(progress: dict[str, Any]) -> str:
    return f"{progress.get('epoch', 0)}/{progress.get('epochs', 0)}"


def figures(progress: dict[str, Any]) -> str:
    """Loss, accuracy on the validation split, parameters: those that are there yet."""
    parts = []
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if progress.get("validation_accuracy") is not None:
        parts.append(f"accuracy {100 * progress['validation_accuracy']:.1f} %")
    if progress.get("parameters"):
        parts.append(f"{progress['parameters']:,} parameters")
    return "  ".join(parts)


def seeds_text(progress: dict[str, Any]) -> str:
    """``seeds: 1 2 blending 0.40, 3 fossilized``; empty for an arm that does not grow."""
    if progress.get("arm") != "grown":
        return ""
    groups: dict[str, list[str]] = {}
    for seed in progress.get("seeds") or []:
        stage = str(seed["stage"]).lower()
        text = f"{stage} {seed['alpha']:.2f}" if stage == "blending" else stage
        groups.setdefault(text, []).append(str(seed["seed"]))
    parts = [f"{' '.join(numbers)} {text}" for text, numbers in groups.items()]
    return f"seeds: {', '.join(parts)}" if parts else ""


def forge_text(status: Status) -> str:
    """``forge 5/16 kernels, BP009``; empty when nothing is made."""
    forge = status.get("forge") or {}
    if not forge.get("total") or forge["done"] >= forge["total"]:
        return ""
    block = str(forge.get("current") or "").partition("[")[0]
    return f"forge {forge['done']}/{forge['total']} kernels {block}".rstrip()
