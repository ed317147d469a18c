"""`esper urza`: which kernels are stored, whether they are whole, and having damaged ones made again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper_ray import cluster
from esper_ray import config as configuration
from esper_ray.cli.blueprints import parse_slot
from esper_ray.contracts.enums import BlueprintTier
from esper_ray.errors import ConfigError
from esper_ray.urza.catalog import STAGES, Row
from esper_ray.urza.checks import Finding
from esper_ray.urza.store import Store

app = typer.Typer(help="The store of blocks: list, verify, heal.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)
_TIERS = {tier.name.lower(): tier for tier in BlueprintTier if tier is not BlueprintTier.UNSPECIFIED}
Ask = Callable[..., Any]

File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.command("list")
def list_kernels(
    blueprint: Annotated[str, typer.Option(help="Only of this blueprint, such as BP009.", metavar="BP")] = "",
    slot: Annotated[str, typer.Option(help="Only for slots of this shape, such as 32x12x12.", metavar="SHAPE")] = "",
    tier: Annotated[str, typer.Option(help=f"Only of this tier: {', '.join(_TIERS)}.", metavar="TIER")] = "",
    family: Annotated[str, typer.Option(help="Only of this family, such as convolution.", metavar="NAME")] = "",
    stage: Annotated[str, typer.Option(help=f"Only in this stage: {', '.join(STAGES)}.", metavar="STAGE")] = "",
    digest: Annotated[str, typer.Option(help="Only the artifact with this digest.", metavar="SHA256")] = "",
    config: File = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """List what is stored, every version, by name.

    Example: `esper urza list --slot 32x12x12 --stage measured`
    """
    signature = str(parse_slot(slot)) if slot else ""
    chosen = _TIERS.get(tier, BlueprintTier.UNSPECIFIED)
    if tier and not chosen:
        raise ConfigError(f"There is no tier {tier}.", remedy=f"The tiers are {', '.join(_TIERS)}.")
    if stage and stage not in STAGES:
        raise ConfigError(f"There is no stage {stage}.", remedy=f"The stages are {', '.join(STAGES)}.")
    with _urza(config, settings) as (ask, _):
        rows: Sequence[Row] = ask("list", blueprint, signature, int(chosen), family, stage, digest)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("kernel", "v", "tier", "family", "stage", "runs", "KB", "digest"):
        justify: Literal["left", "right"] = "right" if column in ("v", "KB") else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "kernel")
    for row in rows:
        if as_json:
            _line(asdict(row) | {"tier": row.tier.name.lower()})
        said = (row.tier.name.lower(), row.family, row.stage, row.strategy, f"{row.size / 1e3:.0f}", row.digest[:12])
        table.add_row(escape(row.key), str(row.version), *said)
    if not as_json:
        console.print(table if rows else "Nothing is stored that this asks for.")


@app.command()
def verify(
    heal: Annotated[bool, typer.Option("--heal", help="Remove what is damaged, and have it made again.")] = False,
    config: File = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Read every artifact, and say by name what is damaged, swapped, gone or not in the catalogue.

    Leaves with status 1 while something cannot be served. With a system up, --heal waits for its forge; without one
    the next run's forge makes what was removed.
    """
    with _urza(config, settings) as (ask, follow):
        recovered: Sequence[Finding] = ask("recovered_findings")
        report = ask("verify")
        _say(recovered, "withdrawn when the store was opened", as_json=as_json)
        _say(report.findings, "found", as_json=as_json)
        gone: Sequence[Finding] = ask("heal", report.findings) if heal and report.findings else ()
        remade = heal and any(each.blueprint for each in (*gone, *recovered))
        if remade and follow is not None:
            follow()
        if gone:
            report = ask("verify")
    said = {"sound": report.sound, "findings": len(report.findings), "removed": len(gone)}
    if as_json:
        _line(said)
    else:
        console.print(f"{report.sound} artifacts are whole, {len(report.findings)} findings.")
        if gone:
            console.print(f"{len(gone)} removed.")
        if remade and follow is None:
            console.print("The forge makes them again at the start of the next run, or now with `esper forge`.")
    if not report.holds:
        raise typer.Exit(1)


@app.command()
def stats(config: File = None, settings: Settings = None, as_json: Json = False) -> None:
    """Show how much is stored, and in a running system what each tier has served since Urza started."""
    with _urza(config, settings) as (ask, _):
        found: dict[str, float | str] = ask("stats")
    if as_json:
        _line(found)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,.0f}" if isinstance(value, int | float) else value)
    console.print(table)


@app.command()
def withdrawn(config: File = None, settings: Settings = None, as_json: Json = False) -> None:
    """List the versions that were withdrawn, with the reason of each, the newest first."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("kernel", "v", "when", "why"):
        table.add_column(column, no_wrap=column != "why")
    with _urza(config, settings) as (ask, _):
        found = ask("withdrawals")
    for each in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.withdrawn_ns / 1e9))
        if as_json:
            _line(asdict(each))
        table.add_row(escape(each.key), str(each.version), when, escape(each.why))
    if not as_json:
        console.print(table if found else "Nothing was withdrawn.")


@contextmanager
def _urza(file: Path | None, settings: list[str] | None) -> Iterator[tuple[Ask, Callable[[], object] | None]]:
    """How to ask Urza, where a system is up its actor; and how to wait for that system's forge."""
    loaded = configuration.load(file, settings or ())
    if cluster.locate(loaded) is not None:
        from esper_ray.actors import crew
        from esper_ray.cli.forge import follow
        from esper_ray.runtime import connect

        with connect(loaded, start=False, say=console.print) as session:
            if crew.find("urza", loaded.ray.namespace) is not None:
                yield (
                    lambda method, *arguments: session.ask("urza", method, *arguments),
                    lambda: follow(lambda: session.ask("tezzeret", "progress")),
                )
                return
    store = Store(loaded.home / "urza")
    try:
        yield lambda method, *arguments: getattr(store, method)(*arguments), None
    finally:
        store.close()


def _say(findings: Sequence[Finding], how: str, *, as_json: bool) -> None:
    for each in findings:
        if as_json:
            _line(asdict(each) | {"how": how})
        else:
            console.print(f"{how}: {each.kind}, {each.kernel}\n  {each.path}\n  {each.why}", markup=False)


def _line(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))
