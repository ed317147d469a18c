"""`esper forge` makes blocks without a system, shows how far it is, and says what compiling brings."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from esper_ray import cluster, runtime
from esper_ray.actors import crew
from esper_ray.cli import app
from esper_ray.cli import forge as command
from esper_ray.config import ForgeConfig
from esper_ray.errors import EnvironmentFault
from esper_ray.tezzeret.shift import Progress
from esper_ray.tezzeret.strategies import STRATEGIES
from esper_ray.urza.store import Store


def states(*each: Progress):
    left = iter(each)
    return lambda: asdict(next(left))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(command, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "locate", lambda config: None)


def test_it_makes_what_was_ordered_once_and_stores_it(tmp_path: Path) -> None:
    arguments = ["forge", "BP001@conv-4x3x3", "--set", f"home={tmp_path}", "--set", "forge.compile=never", "--table"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "building and checking BP001: 1 of 1" in first.output
    assert "all blocks can grow now" in first.output
    assert "The kernels stay eager: forge.compile is never." in first.output
    store = Store(tmp_path / "urza")
    (row,) = store.list()
    store.close()
    assert row.blueprint == "BP001"
    assert CliRunner().invoke(app, arguments).exit_code == 0
    store = Store(tmp_path / "urza")
    assert store.list() == [row]
    store.close()


def test_progress_is_told_in_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    last = command.follow(
        states(
            Progress("eager", 0, 4, ""),
            Progress("eager", 1, 4, "BP002[]@conv-8x6x6-float32-cpu"),
            Progress("eager", 1, 4, "BP003[]@conv-8x6x6-float32-cpu"),
            Progress("compile", 2, 4, "BP003[]@conv-8x6x6-float32-cpu", ready=True, conservative=True),
            Progress("done", 4, 4, ready=True, note="2 of 4 kernels run compiled."),
        ),
        to=Console(file=out, width=120),
    )
    assert last["note"] == "2 of 4 kernels run compiled."
    told = out.getvalue().splitlines()
    assert told[:3] == [
        "building and checking: 0 of 4",
        "building and checking BP002: 1 of 4",
        "compiling and measuring BP003 (conservatively): 2 of 4",
    ]
    assert told[3].startswith("all blocks can grow now, after")


def test_an_order_that_somebody_dropped_is_an_error() -> None:
    with pytest.raises(EnvironmentFault, match="stopped before it was through"):
        command.follow(states(Progress("stopped")), to=Console(file=io.StringIO()))


def test_the_forge_has_a_setting_for_each_strategy() -> None:
    assert [ForgeConfig(strategy=name).strategy for name in STRATEGIES] == list(STRATEGIES)  # type: ignore[arg-type]


class System:
    """A session to a system whose forge is through with what it is given."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def ask(self, *call: object) -> object:
        self.asked.append(call)
        if call[:2] == ("tezzeret", "progress"):
            return asdict(Progress("done", 1, 1, ready=True, note="1 of 1 kernels run compiled."))
        return []


def test_where_a_system_is_up_its_forge_is_given_the_order(tmp_path: Path, monkeypatch) -> None:
    system = System()
    monkeypatch.setattr(cluster, "locate", lambda config: "127.0.0.1:1")
    monkeypatch.setattr(runtime, "connect", lambda config, **_: system)
    monkeypatch.setattr(crew, "find", lambda name, namespace: object())
    run = CliRunner().invoke(app, ["forge", "BP002@conv-4x3x3", "--table", "--set", f"home={tmp_path}"])
    assert run.exit_code == 0, run.output
    assert system.asked == [
        ("tezzeret", "start_forge", ["BP002@conv-4x3x3"]),
        ("tezzeret", "progress"),
        ("urza", "list"),
    ]
    assert "1 of 1 kernels run compiled." in run.output
    assert not (tmp_path / "urza").exists()
