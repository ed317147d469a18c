"""`esper contracts`: the schema of the messages and whether it may change so. `esper keys`: who may speak. No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from esper_ray import config as configuration
from esper_ray.contracts import check as contracts
from esper_ray.contracts.keys import KeyRing, load_keys, rotate_keys
from esper_ray.contracts.reference import DOCUMENT

app = typer.Typer(help="The messages' schema: check it, approve a change.", no_args_is_help=True)
keys_app = typer.Typer(help="The keys that sign messages.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)

Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="Another folder with leyline.proto, schema.lock and CHANGES.md.", metavar="FOLDER"),
]
File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]


@app.command()
def check(folder: Folder = None) -> None:
    """Make the code anew from leyline.proto and compare it with what was approved; exit code 1 when they differ.

    Says of each difference whether it is additive or breaking, and why.
    """
    report = contracts.check(folder or contracts.HERE, _document(folder))
    _show(report)
    if not report.good:
        if report.verdict != "breaking":
            console.print("Approve it with: esper contracts approve")
        raise typer.Exit(1)


@app.command()
def approve(folder: Folder = None) -> None:
    """Approve an additive change: writes the generated code, schema.lock and docs/contracts.md anew.

    Its row in CHANGES.md comes first. A breaking change is refused.
    """
    _show(contracts.approve(folder or contracts.HERE, _document(folder)))
    console.print("approved")


@keys_app.command("list")
def list_keys(config: File = None, settings: Settings = None) -> None:
    """Show which keys are valid, by their names; the first one signs."""
    _names(load_keys(_file(config, settings)))


@keys_app.command()
def rotate(
    config: File = None,
    settings: Settings = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also within a day of the last rotation: drops what was signed before that.")
    ] = False,
) -> None:
    """Sign with a new key from now on; the present one stays valid until the next rotation.

    Nothing is restarted: running processes of this home folder follow within a second, and no message is lost.
    """
    _names(rotate_keys(_file(config, settings), force=force))


def _document(folder: Path | None) -> Path | None:
    return DOCUMENT if folder is None and DOCUMENT.exists() else None


def _file(config: Path | None, settings: list[str] | None) -> Path:
    return configuration.load(config, settings or ()).home / "keys" / "signing"


def _show(report: contracts.Report) -> None:
    console.print(
        f"schema {report.digest[:12]}: {report.verdict} {'' if report.verdict == 'none' else 'change'}".strip()
    )
    for change in report.changes:
        console.print(f"  {change}", markup=False)
    for name in report.stale:
        console.print(f"  {name} was not made from this schema")
    for what in report.owed:
        console.print(f"  missing: {what}", markup=False)


def _names(keys: KeyRing) -> None:
    for (key_id, _), what in zip(keys.keys, ("signs and verifies", "verifies"), strict=False):
        console.print(f"{key_id}  {what}")
