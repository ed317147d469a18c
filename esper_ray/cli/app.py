"""The commands: each parses its options, opens a session where it needs one, and prints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import esper_ray
from esper_ray import config as configuration
from esper_ray.cli import orders, show
from esper_ray.cli.alerts import app as alerts_app
from esper_ray.cli.blueprints import app as blueprints_app
from esper_ray.cli.bus import app as bus_app
from esper_ray.cli.contracts import app as contracts_app
from esper_ray.cli.contracts import keys_app
from esper_ray.cli.forge import forge
from esper_ray.cli.policy import app as policy_app
from esper_ray.cli.urza import app as urza_app
from esper_ray.config import Config
from esper_ray.errors import ConfigError, RunError
from esper_ray.simic.job import app as simic_app

app = typer.Typer(
    name="esper",
    help="A PyTorch model that grows while it trains, on Ray.",
    epilog="Begin with `esper doctor`, then `esper run --fast --compare`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
settings_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
app.add_typer(settings_app, name="config")
app.add_typer(policy_app, name="policy")
app.add_typer(bus_app, name="bus")
app.add_typer(contracts_app, name="contracts")
app.add_typer(keys_app, name="keys")
app.add_typer(blueprints_app, name="blueprints")
app.add_typer(simic_app, name="simic")
app.add_typer(urza_app, name="urza")
app.add_typer(alerts_app, name="alerts")
console = Console(highlight=False)
_OF_THE_RUN = ("run", "optimizer", "seeds", "tamiyo", "emergency")

File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="One setting, such as run.epochs=20; may be repeated.", metavar="KEY=VALUE"),
]
RunId = Annotated[str, typer.Argument(help="A run's id, as `esper runs` shows it.", metavar="RUN")]


def _version(asked: bool) -> None:
    if asked:
        console.print(esper_ray.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
) -> None:
    pass


def _load(file: Path | None, settings: list[str] | None) -> Config:
    return configuration.load(file, settings or ())


@app.command()
def up(config: File = None, settings: Settings = None) -> None:
    """Start the system: Ray if none runs, and all actors.

    It stays up until `esper down`. Runs start faster then, and a run goes on when its terminal is closed.

    Example: `esper up --set nissa.port=0`
    """
    from esper_ray.runtime import connect

    with connect(_load(config, settings), say=_say) as session:
        status = session.up()
        session.leave()
        show.system(console, session, status)


@app.command()
def down(config: File = None, settings: Settings = None) -> None:
    """Stop the active run with a checkpoint, end all actors, and end Ray where `esper` started it."""
    from esper_ray import cluster
    from esper_ray.runtime import connect

    loaded = _load(config, settings)
    if cluster.locate(loaded) is None:
        cluster.stop(loaded)
        console.print("Nothing is up.")
        return
    with connect(loaded, start=False, say=_say) as session:
        show.ended(console, session.down())


@app.command()
def status(
    config: File = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the actors, the bus, and the runs that are active or waiting."""
    from esper_ray.runtime import connect

    with connect(_load(config, settings), start=False, say=_say) as session:
        found = session.status()
        if as_json:
            console.print_json(json.dumps(found))
        else:
            show.system(console, session, found)


@app.command()
def run(
    config: File = None,
    settings: Settings = None,
    task: Annotated[
        str | None,
        typer.Option(help="What to train: a task, or your own function as package.module:function.", metavar="TASK"),
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Continue this run where it ended.", metavar="RUN")] = None,
    fork: Annotated[
        str | None, typer.Option(help="A new run that goes on from this boundary of another.", metavar="RUN@EPOCH")
    ] = None,
    decide: Annotated[
        list[str] | None,
        typer.Option(help="With --fork: what to decide there instead; may be repeated.", metavar="DECISION"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the controls too: the host alone, and the final size from scratch.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Less data and fewer epochs: about a minute.")] = False,
    live: Annotated[
        bool | None,
        typer.Option("--live/--lockstep", help="Against the clock, or reproducible bit for bit.", show_default="live"),
    ] = None,
) -> None:
    """Train a model that grows, and watch it.

    Ctrl-C stops the run with a checkpoint; a second Ctrl-C leaves at once. Ray and the actors are started if they are
    not up. Where this had to start Ray, all of it ends with the run; in a cluster that was there already, the actors
    stay up until `esper down`.

    Examples:

    `esper run --fast --compare`

    `esper run --set run.dataset=digits --set run.epochs=40`

    `esper run --task examples.own_model:build`

    `esper run --resume glyphs-3fa9c2`

    `esper run --fork glyphs-3fa9c2@7 --decide "grow stage2 BP009"`
    """
    from esper_ray.cli.running import run_to_end
    from esper_ray.runtime import connect

    if fork is not None:
        other = fast or compare or live is not None or task is not None or resume is not None
        raise typer.Exit(_run_fork(config, settings or [], fork, decide or [], other=other))
    if decide:
        raise ConfigError("--decide needs --fork.", remedy="In a run that trains, decide with `esper grow`.")

    if task is not None:
        settings = [*(settings or []), f"run.task={task}"]
    loaded = with_flags(config, settings, fast=fast, live=live)
    if resume is not None:
        may_resume(loaded, resume, settings or [], flags=fast or compare or live is not None)
    with connect(loaded, say=_say) as session:
        raise typer.Exit(run_to_end(console, session, loaded, compare=compare, resume=resume))


def _run_fork(file: Path | None, settings: list[str], place: str, decide: list[str], *, other: bool) -> int:
    from esper_ray.cli.running import follow_to_end
    from esper_ray.runs import check_fork, fork_at
    from esper_ray.runtime import connect

    if other:
        raise ConfigError(
            "--fork goes with --decide and --set alone.", why="The new run keeps its parent's configuration."
        )
    loaded = _load(file, [setting for setting in settings if setting.startswith(("home=", "ray.", "nissa.", "bus."))])
    own = [setting for setting in settings if not setting.startswith(("home=", "ray.", "nissa.", "bus."))]
    fork = fork_at(loaded.runs, place, decide, orders.author())
    check_fork(loaded.runs, fork, own)
    with connect(loaded, say=_say) as session:
        return follow_to_end(console, session, lambda: session.fork(fork, own))


def may_resume(config: Config, run_id: str, settings: list[str], *, flags: bool) -> None:
    """A resumed run keeps its configuration; refuse what it would silently ignore, before anything is started.

    Raises:
        EsperError: no such run, it is finished, or a setting of the run was given.
    """
    from esper_ray.runs import find

    if find(config.runs, run_id).result.get("status") == "finished":
        raise RunError(f"{run_id} is finished.", remedy=f"See it with `esper report {run_id}`.")
    for setting in settings:
        if setting.split(".")[0] in _OF_THE_RUN:
            raise ConfigError(f"{setting} cannot be set with --resume.", why="A resumed run keeps its configuration.")
    if flags:
        raise ConfigError("--fast, --compare and --live cannot be used with --resume.", why="It keeps what it had.")


def with_flags(file: Path | None, settings: list[str] | None, *, fast: bool, live: bool | None) -> Config:
    """Flags beat the file, and what was set by hand beats the flags."""
    from esper_ray.runtime import PRESETS

    flags = list(PRESETS["fast" if fast else "default"])
    if live is not None:
        flags.append(f"run.mode={'live' if live else 'lockstep'}")
    return configuration.load(file, [*flags, *(settings or ())])


@app.command()
def slots(
    task: Annotated[str, typer.Argument(help="A task, or your function as package.module:function.", metavar="TASK")],
    config: File = None,
    settings: Settings = None,
) -> None:
    """Show where seeds could grow in a task's model, and why there: what `slots="auto"` takes.

    Example: `esper slots examples.own_model:build`
    """
    from esper_ray.attaching import as_table
    from esper_ray.tasks import proposals

    loaded = _load(config, [*(settings or []), f"run.task={task}"])
    console.print(as_table(proposals(loaded.run, loaded.home / "data")), soft_wrap=True, markup=False)


@app.command()
def runs(config: File = None, settings: Settings = None) -> None:
    """List the runs of this home folder, the newest first."""
    show.runs(console, _load(config, settings).runs)


@app.command()
def compare(
    run_ids: Annotated[list[str], typer.Argument(help="Two runs or more.", metavar="RUN RUN ...")],
    out: Annotated[Path | None, typer.Option(help="Where the picture goes.", metavar="FILE.png")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Show runs side by side: figures, what was decided otherwise, and a picture of their curves.

    Example: `esper compare glyphs-3fa9c2 glyphs-77b0e1`
    """
    from esper_ray.cli import comparing

    comparing.compare(console, _load(config, settings).runs, run_ids, out)


@app.command()
def report(run_id: RunId, config: File = None, settings: Settings = None) -> None:
    """Write a run's report anew: a page and a picture in its folder."""
    from esper_ray.runs import report as write

    console.print(write(_load(config, settings).runs, run_id))


@app.command()
def profile(
    run_id: RunId,
    epoch: Annotated[int, typer.Option(help="Which epoch; the next one if not given.", min=0)] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for it, and print its table.")] = False,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Profile an epoch of a run that trains, with its boundary: a table, and a trace for Perfetto.

    Example: `esper profile glyphs-3fa9c2 --epoch 12 --wait`
    """
    from esper_ray import runs as folders

    folder = _load(config, settings).runs
    number = folders.ask_for_profile(folder, run_id, epoch)
    while (found := folders.profile_of(folder, run_id, number)) is None and wait:
        if folders.find(folder, run_id).result:
            raise RunError(f"{run_id} ended without that profile.", remedy=f"Its log may say why; epoch {number}.")
        time.sleep(0.5)
    if found is None:
        console.print(f"epoch {number} will be profiled; see it with: esper profile {run_id} --epoch {number}")
        return
    table, trace = found
    print(table)
    console.print(f"trace for ui.perfetto.dev: {trace}")


@app.command()
def export(
    run_id: RunId,
    out: Annotated[Path | None, typer.Option(help="Copy the model to this folder.", metavar="FOLDER")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Hand out a finished run's model: plain PyTorch loads it, with nothing of ours, and predicts the same.

    Example: `esper export glyphs-3fa9c2 --out my-model`
    """
    from esper_ray.runs import MODEL_CARD, read_json
    from esper_ray.runs import export as hand_out

    folder = hand_out(_load(config, settings).runs, run_id, out)
    console.print(f"model   {folder}", soft_wrap=True)
    console.print(f"load it {read_json(folder / MODEL_CARD).get('load', '')}", soft_wrap=True, markup=False)


@app.command()
def doctor(config: File = None, settings: Settings = None) -> None:
    """Check this machine: versions, compiler, Redis, ports, memory, disk; say what is missing and how to get it."""
    from esper_ray.doctor import examine

    findings = examine(_load(config, settings))
    show.findings(console, findings)
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(1)


app.command()(forge)
for order in orders.COMMANDS:
    app.command()(order)


@settings_app.command("show")
def show_settings(config: File = None, settings: Settings = None) -> None:
    """Print every key with its value and its meaning."""
    show.settings(console, _load(config, settings))


@settings_app.command("check")
def check_settings(file: Annotated[Path, typer.Argument(help="A YAML file.", metavar="FILE")]) -> None:
    """Say whether a file is a valid configuration."""
    from esper_ray.actors.resources import table

    table(configuration.load(file))
    console.print(f"{file} is valid.")


def _say(line: str) -> None:
    style = "yellow" if line.startswith("warning") else "dim"
    console.print(line, style=style, soft_wrap=True)


__all__ = ["app", "with_flags"]
