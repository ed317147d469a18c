"""`esper policy`: which policies there are, validating one, promoting it, going back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from esper_ray import config as configuration
from esper_ray.config import Config
from esper_ray.contracts.enums import BusMessageType
from esper_ray.errors import EsperError
from esper_ray.oona.bus import publisher_where_up
from esper_ray.simic import registry
from esper_ray.simic.job import SENDER

if TYPE_CHECKING:
    from esper_ray.contracts.messages import PolicyUpdate
    from esper_ray.oona.publisher import BusPublisher
    from esper_ray.simic.validation import Gate, Verdict

app = typer.Typer(help="Policies for Tamiyo: list, validate, promote, roll back.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)
_ANSWER_SECONDS = 10.0

File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]
PolicyId = Annotated[str, typer.Argument(help="A policy's id, or its beginning.", metavar="POLICY")]


def _load(file: Path | None, settings: list[str] | None) -> Config:
    return configuration.load(file, settings or ())


@app.command("list")
def list_policies(config: File = None, settings: Settings = None) -> None:
    """List the policies of this home folder, the newest first; the star decides."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("", "policy", "from", "learned by", "made", "validation"):
        table.add_column(column, no_wrap=column in ("policy", "from"))
    for row in registry.rows(_load(config, settings).home):
        learned = f"{row.summary.get('algo', '')} {row.summary.get('steps', row.summary.get('decisions', ''))}"
        table.add_row(
            "*" if row.promoted else "",
            row.policy_id,
            row.parent_id,
            learned,
            row.created_at[5:16].replace("T", " "),
            verdict_text(row.validation),
        )
    console.print(table if table.row_count else "There are no policies yet. Learn one: esper simic train")


@app.command()
def show(policy: PolicyId, config: File = None, settings: Settings = None) -> None:
    """Print where a policy comes from, and what validating it found."""
    row = registry.find(_load(config, settings).home, policy)
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("policy", row.policy_id),
        ("from", row.parent_id or "random weights"),
        ("made", row.created_at),
        ("digest", row.digest),
        ("decides", "yes" if row.promoted else "no"),
        ("validation", verdict_text(row.validation)),
        *((f"  {gate['name']}", gate_text(gate)) for gate in row.validation.get("gates", ())),
        *((name, str(value)) for name, value in row.summary.items()),
    ):
        grid.add_row(f"[dim]{name}[/dim]", value)
    console.print(grid)


@app.command()
def validate(
    policy: PolicyId,
    episodes: Annotated[int, typer.Option(min=5, help="Paired episodes on held-out tasks.")] = 30,
    margin: Annotated[
        float, typer.Option(min=0, help="How much worse than who decides now it may be, at the interval's low end.")
    ] = 0.01,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Put a policy through the gates that it must pass before it can be promoted.

    It must load, be legal and finite on ordinary and absurd inputs, be fast, and not worse on held-out tasks than who
    decides now, by more than the margin.
    """
    import torch

    from esper_ray.simic import validation

    torch.set_num_threads(1)
    loaded = _load(config, settings)
    with console.status("validating") as status:
        verdict = validation.validate(
            loaded,
            policy,
            count=episodes,
            margin=margin,
            on_gate=lambda gate: console.print(f"{gate.name:8} {gate_text(_plain(gate))}"),
            on_episode=lambda done, of: status.update(f"episode {done} of {of}, against {verdict_incumbent(loaded)}"),
        )
    with publisher_where_up(loaded, SENDER) as publisher:
        if publisher is not None:
            _tell(publisher, verdict)
    console.print(f"{verdict.policy_id} {'passed' if verdict.passed else 'did not pass'}")
    if not verdict.passed:
        raise typer.Exit(1)
    console.print(f"next     esper policy promote {verdict.policy_id}")


def verdict_incumbent(config: Config) -> str:
    from esper_ray.simic.validation import incumbent_of

    return incumbent_of(config.home)


def _plain(gate: Gate) -> dict[str, Any]:
    return {"name": gate.name, "passed": gate.passed, "figures": gate.figures, "reason": gate.reason}


def _tell(publisher: BusPublisher, verdict: Verdict) -> None:
    """Nissa hears of it, and the alert of a failed validation follows from it."""
    from esper_ray.contracts.messages import MetricPoint
    from esper_ray.contracts.telemetry import event, publish_telemetry

    word = "passed" if verdict.passed else "failed"
    names = {"difference": "difference", "difference_low": "low", "difference_high": "high"}
    figures = {told: verdict.figures[name] for name, told in names.items() if name in verdict.figures}
    told = event("policy.validated", {"policy": verdict.policy_id, "verdict": word, **figures})
    publish_telemetry(publisher, "simic", "", 0, [MetricPoint("pv", 1.0, {"verdict": word})], [told])


@app.command()
def promote(policy: PolicyId, config: File = None, settings: Settings = None) -> None:
    """Let a validated policy decide, from the next boundary of every run whose tamiyo.controller is auto."""
    loaded = _load(config, settings)
    _change(loaded, lambda publish: registry.promote(loaded.home, policy, publish))


@app.command()
def rollback(config: File = None, settings: Settings = None) -> None:
    """Go back to who decided before the promoted policy did: another policy, or the heuristic."""
    loaded = _load(config, settings)
    _change(loaded, lambda publish: registry.rollback(loaded.home, publish))


def _change(config: Config, make: Callable[[registry.Publish | None], PolicyUpdate]) -> None:
    with publisher_where_up(config, SENDER) as publisher:
        if publisher is None:
            update = make(None)
            console.print(f"{update.policy_id} decides from the next `esper up` on")
            return
        update = make(lambda kind, data: _send(publisher, kind, data))
    console.print(f"{update.policy_id} is promoted")
    console.print(_answer(config, update.policy_id))


def _send(publisher: BusPublisher, kind: BusMessageType, data: bytes) -> None:
    publisher.publish(kind, data)


def _answer(config: Config, policy_id: str) -> str:
    """What Tamiyo says of it, once she has heard."""
    from esper_ray.runtime import connect

    give_up = time.monotonic() + _ANSWER_SECONDS
    try:
        with connect(config, start=False) as session:
            while time.monotonic() < give_up:
                seat = session.ask("tamiyo", "policy")
                if seat["waits"] == policy_id:
                    return "Tamiyo has checked it; it decides from the next boundary on"
                if seat["decides"] == policy_id:
                    return "Tamiyo decides with it"
                if seat["refused"]:
                    return f"Tamiyo refused it and stays with {seat['decides']}: {seat['refused']}"
                time.sleep(0.2)
    except EsperError as fault:
        return f"Tamiyo could not be asked whether she has it: {fault}"
    return "Tamiyo has not answered yet; see `esper status`"


def verdict_text(validation: dict[str, Any]) -> str:
    """``passed, +0.0123 (+0.0010 to +0.0236) against heuristic``."""
    if not validation:
        return "not validated"
    word = "passed" if validation["passed"] else "failed"
    figures = validation.get("figures", {})
    if "difference" not in figures:
        return word
    low, high = figures["difference_low"], figures["difference_high"]
    return f"{word}, {figures['difference']:+.4f} ({low:+.4f} to {high:+.4f}) against {validation['incumbent']}"


def gate_text(gate: dict[str, Any]) -> str:
    """A gate's verdict with its figures, and why it was not passed."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in gate["figures"].items())
    text = f"[green]passed[/green] {figures}" if gate["passed"] else f"[red]failed[/red] {figures}"
    return f"{text}: {gate['reason']}" if gate["reason"] else text
