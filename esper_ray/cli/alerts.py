"""`esper alerts`: the alerts, as Prometheus takes them. No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from esper_ray import config as configuration
from esper_ray.nissa.alerts import alert_rules, prometheus_rules
from esper_ray.reliability import atomic

app = typer.Typer(help="The alerts, for a Prometheus of your own.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to write them, alerts.yml say.", metavar="FILE")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")] = None,
) -> None:
    """Write the alerts as a file of Prometheus rules, with the thresholds of these settings.

    Name the file under `rule_files` in prometheus.yml; `promtool check rules FILE` checks it.
    """
    rules = alert_rules(configuration.load(config, settings or ()).nissa)
    atomic.write_text(file, prometheus_rules(rules))
    console.print(f"{len(rules)} alerts in {file}")
