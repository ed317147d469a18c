"""A model that grows while it trains, beside two that do not.

    python examples/demo.py             # grown, host alone, and the final size from scratch: some minutes
    python examples/demo.py --fast      # the same path in about a minute

It attaches to a running Ray cluster, or starts one on this machine and ends it afterwards. Runs are in lockstep, so the
same command gives the same curves; with --live the training waits for nobody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from esper_ray.cli import fail
from esper_ray.cli.app import with_flags
from esper_ray.cli.running import run_to_end
from esper_ray.errors import EsperError
from esper_ray.runtime import connect

console = Console(highlight=False)


def demo(
    compare: Annotated[bool, typer.Option(help="Train the two controls too.")] = True,
    fast: Annotated[bool, typer.Option("--fast", help="Less data and fewer epochs.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Against the clock instead of in lockstep.")] = False,
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, such as run.seed=1.")] = None,
) -> None:
    """Show a model that grows while it trains."""
    loaded = with_flags(config, settings, fast=fast, live=live)
    with connect(loaded, say=lambda line: console.print(line, style="dim", soft_wrap=True)) as session:
        code = run_to_end(console, session, loaded, compare=compare)
    raise typer.Exit(code)


if __name__ == "__main__":
    try:
        typer.run(demo)
    except EsperError as error:
        fail(error)
