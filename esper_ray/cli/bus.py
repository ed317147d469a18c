"""`esper bus`: how the bus does, and what to do with messages that nobody could use. Needs its Redis, and no Ray."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from esper_ray import config as configuration
from esper_ray.contracts import codec
from esper_ray.errors import ConfigError, ContractError
from esper_ray.oona.bus import connect_transport
from esper_ray.oona.redis_transport import RedisTransport
from esper_ray.oona.streams import STREAMS
from esper_ray.oona.transport import DeadLetter
from esper_ray.reliability.clock import SYSTEM_CLOCK

app = typer.Typer(help="The bus: its streams, and the dead letters.", no_args_is_help=True)
letters_app = typer.Typer(help="Messages that nobody could use: list, replay, drop.", no_args_is_help=True)
app.add_typer(letters_app, name="dead-letters")
console = Console(highlight=False, soft_wrap=True)
_PAGE = 500

File = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with settings.", metavar="FILE")]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting.", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Names = Annotated[
    list[str] | None, typer.Argument(help="Dead letters as `list` names them: STREAM/ID.", metavar="LETTER...")
]
Everything = Annotated[bool, typer.Option("--all", help="All of them, or all that --stream and --reason leave.")]
Stream = Annotated[str, typer.Option(help=f"Only of this stream: {', '.join(STREAMS)}.", metavar="STREAM")]
Reason = Annotated[str, typer.Option(help="Only with a reason that begins so.", metavar="TEXT")]


@dataclass(frozen=True, slots=True)
class _Named:
    stream: str
    letter: DeadLetter

    @property
    def name(self) -> str:
        return f"{self.stream}/{self.letter.id}"


@app.command()
def status(config: File = None, settings: Settings = None, as_json: Json = False) -> None:
    """Show each stream: what is owed to whom, since when, and how many dead letters there are."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("stream", "owed", "in work, by group (oldest)", "dead letters"):
        table.add_column(column, justify="right" if column in ("owed", "dead letters") else "left")
    with _bus(config, settings) as bus:
        for stream in STREAMS:
            state = bus.state(stream)
            if as_json:
                groups = {
                    name: {"pending": g.pending, "oldest_s": g.oldest_seconds} for name, g in state.groups.items()
                }
                _line({"stream": stream, "owed": state.depth, "groups": groups, "dead_letters": state.dead})
            work = ", ".join(f"{name} {g.pending} ({g.oldest_seconds:.0f} s)" for name, g in state.groups.items())
            table.add_row(stream, str(state.depth), work or "nobody reads it", str(state.dead))
    if not as_json:
        console.print(table)


@letters_app.command("list")
def list_letters(
    stream: Stream = "", reason: Reason = "", config: File = None, settings: Settings = None, as_json: Json = False
) -> None:
    """List the dead letters, the oldest first, with the reason of each."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("letter", "what", "from", "age", "reader", "tries", "reason"):
        table.add_column(column, no_wrap=column == "letter")
    with _bus(config, settings) as bus:
        for found in _letters(bus, stream, reason):
            told = _describe(found)
            if as_json:
                _line(told)
            else:
                table.add_row(
                    *(str(told[name]) for name in ("letter", "type", "source", "age", "group", "deliveries", "reason"))
                )
    if not as_json:
        console.print(table if table.row_count else "There are no dead letters.")


@letters_app.command()
def replay(
    letters: Names = None,
    everything: Everything = False,
    stream: Stream = "",
    reason: Reason = "",
    config: File = None,
    settings: Settings = None,
) -> None:
    """Put dead letters back into their streams, in order, once what kept them from being read is mended.

    All readers get them again; those that had their effect already leave it at that.

    Example: `esper bus dead-letters replay --all --reason handler_failed`
    """
    with _bus(config, settings) as bus:
        chosen = _chosen(bus, letters, everything, stream, reason)
        done = sum(bus.revive(name, id) for name, id in chosen)
    console.print(f"{done} of {len(chosen)} put back")


@letters_app.command()
def drop(
    letters: Names = None,
    everything: Everything = False,
    stream: Stream = "",
    reason: Reason = "",
    config: File = None,
    settings: Settings = None,
) -> None:
    """Remove dead letters for good.

    Example: `esper bus dead-letters drop --all --reason malformed`
    """
    with _bus(config, settings) as bus:
        chosen = _chosen(bus, letters, everything, stream, reason)
        done = sum(bus.drop_dead(name, id) for name, id in chosen)
    console.print(f"{done} of {len(chosen)} removed")


@contextlib.contextmanager
def _bus(file: Path | None, settings: list[str] | None) -> Iterator[RedisTransport]:
    with contextlib.closing(connect_transport(configuration.load(file, settings or ()))) as transport:
        yield transport


def _letters(bus: RedisTransport, stream: str, reason: str) -> Iterator[_Named]:
    if stream and stream not in STREAMS:
        raise ConfigError(f"There is no stream {stream}.", remedy=f"The streams are {', '.join(STREAMS)}.")
    for name in (stream,) if stream else STREAMS:
        after = ""
        while page := bus.dead_letters(name, count=_PAGE, after=after):
            after = page[-1].id
            yield from (_Named(name, letter) for letter in page if letter.reason.startswith(reason))


def _chosen(
    bus: RedisTransport, letters: list[str] | None, everything: bool, stream: str, reason: str
) -> list[tuple[str, str]]:
    """As (stream, id).

    Raises:
        ConfigError: neither letters nor --all, both, or a name that is none.
    """
    if bool(letters) == everything:
        raise ConfigError(
            "Which dead letters?", remedy="Name them as `esper bus dead-letters list` does, or give --all."
        )
    if everything:
        return [(found.stream, found.letter.id) for found in _letters(bus, stream, reason)]
    pairs = [(name, id) for name, _, id in (letter.partition("/") for letter in letters or ())]
    for name, id in pairs:
        if name not in STREAMS or not all(part.isdecimal() for part in id.split("-")):
            raise ConfigError(
                f"{name}/{id} names no dead letter.",
                why="A name is STREAM/ID, such as oona.normal/1700000000000-0.",
                remedy="See `esper bus dead-letters list`.",
            )
    return pairs


def _describe(found: _Named) -> dict[str, Any]:
    letter = found.letter
    told: dict[str, Any] = {
        "letter": found.name,
        "type": "unreadable",
        "source": "",
        "age": "",
        "group": letter.group,
        "deliveries": letter.deliveries,
        "reason": letter.reason,
        "bytes": len(letter.data),
    }
    with contextlib.suppress(ContractError):
        envelope = codec.decode_envelope(letter.data)
        age = (SYSTEM_CLOCK.now_ns() - envelope.created_at_ns) / 1e9
        told |= {"type": envelope.type.name.lower(), "source": envelope.source, "age": f"{age:.0f} s"}
    return told


def _line(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))
