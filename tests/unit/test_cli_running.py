"""Following a run in the terminal: what is shown, and what Ctrl-C does."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from rich.console import Console

from esper_ray.cli.running import LineView, LiveView, follow
from esper_ray.runtime import Session


def status(epoch: int, *, over: bool = False, message: str = "", forge: dict[str, Any] | None = None) -> dict[str, Any]:
    progress = {
        "arm": "grown",
        "state": "training",
        "epoch": epoch,
        "epochs": 10,
        "step": 10 * epoch,
        "steps": 100,
        "loss": 0.5,
        "validation_accuracy": 0.75,
        "parameters": 26_333,
        "seeds": [
            {"seed": 1, "blueprint": "BP009", "stage": "BLENDING", "alpha": 0.4},
            {"seed": 2, "blueprint": "BP003", "stage": "BLENDING", "alpha": 0.4},
            {"seed": 3, "blueprint": "BP003", "stage": "FOSSILIZED", "alpha": 1.0},
        ],
    }
    result = {"test_accuracy": 0.8} if over else None
    grown = {"run_id": "r1", "arm": "grown", "state": "finished" if over else "running", "result": result}
    host = {"run_id": "r1-host", "arm": "host", "state": "waiting", "result": None, "progress": None}
    arms = [grown | {"progress": None if over else progress}, host]
    return {"run_id": "r1", "over": over, "message": message, "forge": forge, "arms": arms}


class FakeSession:
    """Gives the statuses one after the other, and does something before each."""

    def __init__(self, statuses: list[dict[str, Any]], before: dict[int, Callable[[], None]]) -> None:
        self.statuses, self.before = statuses, before
        self.calls: list[str] = []

    def watch(self, run_id: str) -> Iterator[dict[str, Any]]:
        for number, item in enumerate(self.statuses):
            self.before.get(number, lambda: None)()
            yield item

    def stop(self, run_id: str) -> None:
        self.calls.append(f"stop {run_id}")

    def leave(self) -> None:
        self.calls.append("leave")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def followed(session: FakeSession) -> tuple[dict[str, Any], bool, str]:
    console = Console(file=io.StringIO(), width=100)
    last, left = follow(console, cast(Session, session), "r1")
    return last, left, cast(io.StringIO, console.file).getvalue()


def test_a_log_gets_one_line_for_each_epoch() -> None:
    session = FakeSession([status(1), status(1), status(2), status(2, over=True)], {})

    last, left, text = followed(session)

    assert last["over"]
    assert not left
    lines = [line for line in text.splitlines() if "epoch" in line]
    assert len(lines) == 2
    assert lines[0].startswith("grown: epoch 1/10  loss 0.500  accuracy 75.0 %  26,333 parameters")
    assert "seeds: 1 2 blending 0.40, 3 fossilized" in lines[0]


def test_a_log_gets_a_tenth_of_the_forges_steps() -> None:
    view = LineView(Console(file=(text := io.StringIO()), width=100))
    for done in range(50):
        view.update(status(1, forge={"done": done, "total": 50, "current": "BP001"}))

    assert text.getvalue().count("forge") == 10


def test_a_terminal_shows_the_arms_with_bars_seeds_and_the_forge() -> None:
    console = Console(file=(text := io.StringIO()), width=100, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view.update(status(3, message="resumed 1 times", forge={"done": 5, "total": 16, "current": "BP009"}))

    shown = text.getvalue()
    for words in ("grown", "host alone", "3/10", "waiting", "seeds: 1 2 blending", "forge 5/16", "resumed 1 times"):
        assert words in shown


def test_one_interrupt_stops_the_run_and_waits_for_its_end() -> None:
    session = FakeSession([status(1), status(2), status(2, over=True)], {1: interrupt})

    last, left, text = followed(session)

    assert session.calls == ["stop r1"]
    assert (last["over"], left) == (True, False)
    assert "Stopping with a checkpoint" in text


def test_a_second_interrupt_leaves_at_once_and_says_so() -> None:
    session = FakeSession([status(1), status(2), status(3), status(4)], {1: interrupt, 2: interrupt})

    _, left, text = followed(session)

    assert session.calls == ["stop r1", "leave"]
    assert left
    assert "ends without this terminal" in text


def test_a_third_interrupt_breaks_off_whatever_hangs() -> None:
    session = FakeSession([status(1)], {0: lambda: [interrupt() for _ in range(3)] and None})
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        followed(session)

    assert signal.getsignal(signal.SIGINT) is before
