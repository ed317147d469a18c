"""``docs/contracts.md``, made from the schema, its comments and the tables of metrics. A test keeps it current."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto

from esper_ray.contracts import budgets
from esper_ray.contracts.changes import kind_of
from esper_ray.contracts.metrics import METRICS, REPORT_METRICS, SEED_METRICS, STATE_METRICS, WireKey

DOCUMENT = Path(__file__).parents[2] / "docs" / "contracts.md"
_MESSAGE, _ENUM, _PART = 4, 5, 2
Comments = Mapping[tuple[int, ...], str]

_HEAD = f"""# What the processes say to one another

Made from `esper_ray/contracts/leyline.proto` by `esper contracts approve`; change that file, not this page.

Protobuf, `package esper.leyline.v1`. Every top-level message carries `version`, and it is 1: another one is refused.
Metrics are native maps of short keys to finite numbers; one that is not finite is refused at the sender and at the
receiver. Enums are only ever appended to, and 0 is "not said". The numbers 100 to 199 are reserved in every message.

## Sizes

A state packet, a command, a field report and a telemetry packet take at most {budgets.CONTROL_MESSAGE_BYTES} bytes. A
larger one is refused at its sender with the size of each of its fields; the state of many seeds and long telemetry
travel in several packets. An envelope takes at most {budgets.ENVELOPE_BYTES // 1024} KiB. Large data travels by digest.

## Who may speak

Every envelope is signed with HMAC-SHA-256 over its canonical bytes. The key is made on first use, in
`keys/signing` of the home folder with mode 0600, or given in `ESPER_KEYS` (`id:hex,id:hex`, the first signs). Two keys
are good at a time: `esper keys rotate` puts a new one in front of the present one, and running processes follow within
a second. What was signed with the present key stays good until the next rotation, which is why that is refused for a
day unless it is forced; kernels that were sealed before that are made again. Keys appear in no log and no error.

Commands that are handed over directly must be at most {budgets.COMMAND_FRESH_SECONDS:.0f} s old, and their nonce is
accepted once; a run remembers nonces for {budgets.NONCE_MEMORY_SECONDS / 60:.0f} minutes, also after it was killed and
resumed. What travels over the bus may be late and may come twice: there the event id makes it harmless.

| refused because | it means |
|---|---|
| `missing_signature` | nobody signed it |
| `invalid_signature` | something in it was changed, or its signer has another key of that name |
| `unknown_key` | none of the two keys signed it |
| `nonce_replayed` | it was accepted before |
| `stale` | a direct command too old, or older than what the memory of nonces still covers |
| `from_the_future` | a direct command from a clock that is ahead |
| `wrong_version` | `version` is missing or not 1 |
| `wrong_type` | it carries another payload than its type says, or than its receiver takes |
| `wrong_schema` | its sender speaks a schema that is neither ours nor one that ours only added to |

Each is counted where it happens and shown by Nissa as `esper_refused_total{{reason="..."}}`, with `malformed` and
`too_large` for bytes that are no message at all.

## Changing the schema

`esper contracts check` makes the code anew and compares; it says for each field what kind of change it is. An addition
is approved with `esper contracts approve` after its row stands in `contracts/CHANGES.md`; a breaking change (a number
used again, another type, a field removed without `reserved`) is refused. `contracts/schema.lock` holds what stands;
every process checks it before it talks, and that protobuf runs on its fast backend. Directly, processes only talk to
others of the same schema; from the bus and from journals they also take what an earlier schema left there, as long as
only additions lie between.
"""


def page(file: FileDescriptorProto) -> str:
    """The whole document for a schema that was compiled with its comments.

    Raises:
        ValueError: a message, a field or an enum has no comment.
    """
    comments = {tuple(each.path): _clean(each.leading_comments or each.trailing_comments) for each in _located(file)}
    held = {
        kind_of(message, field).removeprefix("repeated ").split()[0]
        for message in file.message_type
        for field in message.field
    }
    messages = list(enumerate(file.message_type))
    top = [(place, each) for place, each in messages if each.name not in held]
    parts = [(place, each) for place, each in messages if each.name in held]
    lines = [*_HEAD.splitlines(), "", "## Messages", ""]
    for place, message in (*top, *parts):
        lines += _message(message, place, comments)
    lines += ["## Enums", "", "| enum | values |", "|---|---|"]
    lines += [_enum(each, place, comments) for place, each in enumerate(file.enum_type)]
    lines += ["", *_metrics()]
    return "\n".join(lines) + "\n"


def _message(message: DescriptorProto, place: int, comments: Comments) -> Iterator[str]:
    yield f"### {message.name}"
    yield ""
    yield _required(comments, (_MESSAGE, place), message.name)
    yield ""
    yield "| number | field | type | meaning |"
    yield "|---|---|---|---|"
    for number, field in enumerate(message.field):
        said = _required(comments, (_MESSAGE, place, _PART, number), f"{message.name}.{field.name}")
        kind, _, choice = kind_of(message, field).partition(" in ")
        shown = f"`{kind}`, one of `{choice}`" if choice else f"`{kind}`"
        yield f"| {field.number} | `{field.name}` | {shown} | {said} |"
    yield ""


def _enum(enum: EnumDescriptorProto, place: int, comments: Comments) -> str:
    said = _required(comments, (_ENUM, place), enum.name)
    return f"| `{enum.name}`: {said} | {', '.join(f'{each.name} {each.number}' for each in enum.value)} |"


def _metrics() -> Iterator[str]:
    yield "## Keys of metrics"
    yield ""
    for title, keys in (
        ("SystemStatePacket.metrics", STATE_METRICS),
        ("SeedState.metrics", SEED_METRICS),
        ("FieldReport.metrics", REPORT_METRICS),
    ):
        yield f"`{title}`:"
        yield ""
        yield from _wire_keys(keys)
        yield ""
    yield "`MetricPoint.key`, with the name that Prometheus sees:"
    yield ""
    yield "| key | name | kind | unit | from | labels | meaning |"
    yield "|---|---|---|---|---|---|---|"
    for each in METRICS:
        cells = (f"`{each.key}`", f"`{each.name}`", each.kind, each.unit, each.emitter, ", ".join(each.labels))
        yield f"| {' | '.join(cells)} | {each.meaning} |"


def _wire_keys(keys: Iterable[WireKey]) -> Iterator[str]:
    yield "| key | unit | meaning |"
    yield "|---|---|---|"
    for each in keys:
        yield f"| `{each.key}` | {each.unit} | {each.meaning} |"


def _located(file: FileDescriptorProto) -> Iterable[FileDescriptorProto.SourceCodeInfo.Location]:  # type: ignore[name-defined]
    return (each for each in file.source_code_info.location if each.leading_comments or each.trailing_comments)


def _required(comments: Comments, path: tuple[int, ...], name: str) -> str:
    if path not in comments:
        raise ValueError(f"{name} has no comment in leyline.proto")
    return comments[path]


def _clean(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
