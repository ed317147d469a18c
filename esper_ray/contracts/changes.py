"""What differs between two forms of the schema, and whether old bytes keep their meaning.

A form is the schema as sorted lines of text, one for each message, field, reserved range and enum value: what
``schema.lock`` holds, what a person can read in a diff, and what two schemas are compared by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

Verdict = Literal["none", "additive", "breaking"]
RESERVED = "100-199"

_SCALARS = {
    FieldDescriptorProto.TYPE_DOUBLE: "double",
    FieldDescriptorProto.TYPE_FLOAT: "float",
    FieldDescriptorProto.TYPE_INT64: "int64",
    FieldDescriptorProto.TYPE_UINT64: "uint64",
    FieldDescriptorProto.TYPE_INT32: "int32",
    FieldDescriptorProto.TYPE_FIXED64: "fixed64",
    FieldDescriptorProto.TYPE_FIXED32: "fixed32",
    FieldDescriptorProto.TYPE_BOOL: "bool",
    FieldDescriptorProto.TYPE_STRING: "string",
    FieldDescriptorProto.TYPE_BYTES: "bytes",
    FieldDescriptorProto.TYPE_UINT32: "uint32",
    FieldDescriptorProto.TYPE_SFIXED32: "sfixed32",
    FieldDescriptorProto.TYPE_SFIXED64: "sfixed64",
    FieldDescriptorProto.TYPE_SINT32: "sint32",
    FieldDescriptorProto.TYPE_SINT64: "sint64",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``place`` is a message, a field (``Message.field``) or an enum value."""

    verdict: Verdict
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.place}: {self.reason}"


@dataclass(slots=True)
class _Block:
    """A message's fields or an enum's values, by number, and a message's reserved ranges."""

    entries: dict[int, tuple[str, str]] = field(default_factory=dict)
    reserved: list[range] = field(default_factory=list)

    def holds_back(self, number: int) -> bool:
        return any(number in each for each in self.reserved)


def form_of(file: FileDescriptorProto) -> tuple[str, ...]:
    """The schema's lines, sorted: ``field SeedState 5 alpha float``, ``enum RiskLevel 1 RISK_GREEN`` and so on."""
    lines = [f"package {file.package} {file.syntax or 'proto2'}"]
    lines += [f"import {name}" for name in file.dependency]
    for enum in file.enum_type:
        lines += [f"enum {enum.name} {value.number} {value.name}" for value in enum.value]
    for message in file.message_type:
        lines.append(f"message {message.name}")
        lines += [f"reserved {message.name} {each.start}-{each.end - 1}" for each in message.reserved_range]
        lines += [f"field {message.name} {each.number} {each.name} {kind_of(message, each)}" for each in message.field]
    return tuple(sorted(lines))


def compare(old: Iterable[str], new: Iterable[str]) -> list[Change]:
    """Every difference from the form ``old`` to the form ``new``, each with its verdict and the reason for it."""
    old, new = tuple(old), tuple(new)
    found = [
        Change("breaking", line, "the package, its syntax or its imports changed")
        for line in sorted(set(_headers(old)) ^ set(_headers(new)))
    ]
    for kind, compare_blocks in (("message", _compare_messages), ("enum", _compare_enums)):
        before, after = _blocks(old, kind), _blocks(new, kind)
        found += [Change("breaking", name, f"the {kind} is gone") for name in before if name not in after]
        found += [Change("additive", name, f"a new {kind}") for name in after if name not in before]
        for name in before:
            if name in after:
                found += compare_blocks(name, before[name], after[name])
    return found


def verdict_of(changes: Iterable[Change]) -> Verdict:
    """The worst of them."""
    verdicts = {change.verdict for change in changes}
    return "breaking" if "breaking" in verdicts else "additive" if "additive" in verdicts else "none"


def faults(form: Iterable[str]) -> list[Change]:
    """Where a schema breaks the house's rules, whatever it was before.

    ``version`` is field 1 of each top-level message (one that no other message holds), 100 to 199 are reserved in every
    message, nothing is imported, and 0 of each enum is its UNKNOWN or UNSPECIFIED.
    """
    form = tuple(form)
    messages, enums = _blocks(form, "message"), _blocks(form, "enum")
    held = {kind.split()[0].removeprefix("repeated ") for block in messages.values() for _, kind in _kinds(block)}
    found = [
        Change("breaking", line, "the schema imports nothing: no wrapper messages")
        for line in form
        if line.startswith("import ")
    ]
    for name, block in messages.items():
        if name not in held and block.entries.get(1) != ("version", "uint32"):
            found.append(Change("breaking", name, "field 1 of a top-level message is `uint32 version`"))
        if range(100, 200) not in block.reserved:
            found.append(Change("breaking", name, f"the numbers {RESERVED} are not reserved"))
    for name, block in enums.items():
        zero = block.entries.get(0, ("", ""))[0]
        if not zero.endswith(("_UNKNOWN", "_UNSPECIFIED")):
            found.append(Change("breaking", name, "the value 0 is not its UNKNOWN or UNSPECIFIED"))
    return found


def _compare_messages(name: str, before: _Block, after: _Block) -> list[Change]:
    found = []
    for number, (label, kind) in before.entries.items():
        place = f"{name}.{label}"
        if number not in after.entries:
            if after.holds_back(number):
                found.append(Change("additive", place, f"removed, and its number {number} is reserved"))
            else:
                found.append(Change("breaking", place, f"removed, and its number {number} is not reserved"))
            continue
        new_label, new_kind = after.entries[number]
        if new_label != label:
            found.append(Change("breaking", place, f"its number {number} was given to {new_label}"))
        elif new_kind != kind:
            found.append(Change("breaking", place, f"its type changed from {kind} to {new_kind}"))
    for number, (label, kind) in after.entries.items():
        if number in before.entries:
            continue
        if before.holds_back(number):
            found.append(Change("breaking", f"{name}.{label}", f"its number {number} was reserved"))
        else:
            found.append(Change("additive", f"{name}.{label}", f"a new field {number}, {kind}"))
    for each in before.reserved:
        if not all(after.holds_back(number) or number in after.entries for number in each):
            found.append(Change("breaking", name, f"{_text(each)} are no longer reserved"))
    found += [
        Change("additive", name, f"{_text(each)} are reserved now")
        for each in after.reserved
        if each not in before.reserved and not any(number in before.entries for number in each)
    ]
    return found


def _compare_enums(name: str, before: _Block, after: _Block) -> list[Change]:
    found = []
    for number, (label, _) in before.entries.items():
        if number not in after.entries:
            found.append(Change("breaking", f"{name}.{label}", "the value is gone"))
        elif after.entries[number][0] != label:
            given = after.entries[number][0]
            found.append(Change("breaking", f"{name}.{label}", f"its number {number} was given to {given}"))
    last = max(before.entries, default=-1)
    for number, (label, _) in after.entries.items():
        if number in before.entries:
            continue
        if number > last:
            found.append(Change("additive", f"{name}.{label}", f"a new value {number} at the end"))
        else:
            found.append(Change("breaking", f"{name}.{label}", f"the value {number} was put in before the last one"))
    return found


def _headers(form: Iterable[str]) -> list[str]:
    return [line for line in form if line.startswith(("package ", "import "))]


def _blocks(form: Iterable[str], kind: str) -> dict[str, _Block]:
    found: dict[str, _Block] = {}
    for line in form:
        word, name, *rest = line.split(" ", 4)
        if word == "message" == kind:
            found.setdefault(name, _Block())
        elif word == "enum" == kind:
            found.setdefault(name, _Block()).entries[int(rest[0])] = (rest[1], "")
        elif word == "field" and kind == "message":
            found.setdefault(name, _Block()).entries[int(rest[0])] = (rest[1], rest[2])
        elif word == "reserved" and kind == "message":
            first, last = rest[0].split("-")
            found.setdefault(name, _Block()).reserved.append(range(int(first), int(last) + 1))
    return found


def _kinds(block: _Block) -> Iterable[tuple[str, str]]:
    return ((label, kind.removeprefix("repeated ")) for label, kind in block.entries.values())


def kind_of(message: DescriptorProto, given: FieldDescriptorProto) -> str:
    """``map<string, float>``, ``repeated SeedState``, ``PauseDirective in directive``, ``float``."""
    entries: Mapping[str, DescriptorProto] = {each.name: each for each in message.nested_type if each.options.map_entry}
    short = given.type_name.rpartition(".")[2]
    if short in entries:
        key, value = entries[short].field
        return f"map<{_name(key)}, {_name(value)}>"
    text = _name(given)
    if given.label == FieldDescriptorProto.LABEL_REPEATED:
        text = f"repeated {text}"
    if given.proto3_optional:
        return f"{text} optional"
    return f"{text} in {message.oneof_decl[given.oneof_index].name}" if given.HasField("oneof_index") else text


def _name(given: FieldDescriptorProto) -> str:
    return _SCALARS.get(given.type) or given.type_name.rpartition(".")[2]


def _text(numbers: range) -> str:
    return f"{numbers.start}-{numbers.stop - 1}"
