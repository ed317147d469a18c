"""The schema cannot drift: what is checked in is what was approved, and a breaking change is seen and refused."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.internal import api_implementation
from typer.testing import CliRunner

from esper_ray.cli.app import app
from esper_ray.contracts import check, schema
from esper_ray.contracts.changes import compare
from esper_ray.contracts.enums import BusMessageType
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.schema import Lock
from esper_ray.contracts.signing import Signer, Verifier
from esper_ray.errors import EnvironmentFault, WrongSchema

ROOT = Path(__file__).parents[2]
KEYS = KeyRing((("k1", b"1" * 32),))

# What is changed in the text of leyline.proto, the verdict, and the place and the reason that the report must name.
MUTANTS: dict[str, tuple[tuple[tuple[str, str], ...], str, str, str]] = {
    "a comment": ((("// Where a seed is in its life.", "// Where it is."),), "none", "", ""),
    "a new field": (
        (("  uint32 branch = 14;", "  uint32 lanes = 15;\n  uint32 branch = 14;"),),
        "additive",
        "SystemStatePacket.lanes",
        "a new field 15, uint32",
    ),
    "a new message": (
        (
            (
                "message GateEvent {",
                "message Toast {\n  uint32 version = 1;\n  reserved 100 to 199;\n}\nmessage GateEvent {",
            ),
        ),
        "additive",
        "Toast",
        "a new message",
    ),
    "a new enum value": (
        (("  RISK_CRITICAL = 5;", "  RISK_CRITICAL = 5;\n  RISK_BEYOND = 6;"),),
        "additive",
        "RiskLevel.RISK_BEYOND",
        "at the end",
    ),
    "a field removed and reserved": (
        (("  float risk = 10;", "  reserved 10;\n  //"),),
        "additive",
        "SeedState.risk",
        "removed, and its number 10 is reserved",
    ),
    "a field removed": ((("  float risk = 10;", "  //"),), "breaking", "SeedState.risk", "is not reserved"),
    "another type": (
        (("  uint32 age_epochs = 9;", "  float age_epochs = 9;"),),
        "breaking",
        "SeedState.age_epochs",
        "from uint32 to float",
    ),
    "one becomes many": (
        (("  HardwareContext hardware = 10;", "  repeated HardwareContext hardware = 10;"),),
        "breaking",
        "SystemStatePacket.hardware",
        "from HardwareContext to repeated HardwareContext",
    ),
    "another kind of map": (
        (("  map<string, float> evidence = 10;", "  map<string, double> evidence = 10;"),),
        "breaking",
        "GateEvent.evidence",
        "from map<string, float> to map<string, double>",
    ),
    "a number used again": (
        (("  uint32 depth = 8;", "  uint32 colour = 8;"),),
        "breaking",
        "SeedState.depth",
        "its number 8 was given to colour",
    ),
    "a field renumbered": (
        (("  string reason = 11;", "  string reason = 12;"),),
        "breaking",
        "GateEvent.reason",
        "its number 11 is not reserved",
    ),
    "out of its oneof": (
        (
            ("    PauseDirective pause = 15;", "    //"),
            ("  uint32 branch = 18;", "  PauseDirective pause = 15;\n  uint32 branch = 18;"),
        ),
        "breaking",
        "AdaptationCommand.pause",
        "from PauseDirective in directive to PauseDirective",
    ),
    "an enum value removed": (
        (("  GATE_G5_RESET = 6;", "  //"),),
        "breaking",
        "SeedLifecycleGate.GATE_G5_RESET",
        "the value is gone",
    ),
    "an enum value renamed": (
        (("LEVEL_ERROR = 3", "LEVEL_FAULT = 3"),),
        "breaking",
        "TelemetryLevel.LEVEL_ERROR",
        "its number 3 was given to LEVEL_FAULT",
    ),
    "a number of the reserved hundred": (
        (
            ("  RiskLevel level = 2;", "  string colour = 150;\n  RiskLevel level = 2;"),
            ("  string reason = 4;  // which signal, which threshold\n  reserved 100 to 199;", "  string reason = 4;"),
        ),
        "breaking",
        "RiskAssessment.colour",
        "its number 150 was reserved",
    ),
    "a message without a version": (
        (
            (
                "message GateEvent {",
                "message Toast {\n  uint32 width = 1;\n  reserved 100 to 199;\n}\nmessage GateEvent {",
            ),
        ),
        "breaking",
        "Toast",
        "uint32 version",
    ),
    "another package": (
        (("package esper.leyline.v1;", "package esper.leyline.v2;"),),
        "breaking",
        "package esper.leyline.v2 proto3",
        "the package",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("leyline.proto", "schema.lock", "CHANGES.md", *check.GENERATED):
        shutil.copy(check.HERE / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def own_tags() -> Iterator[None]:
    yield
    schema.schema_tag.cache_clear()
    schema.readable_tags.cache_clear()


def mutate(folder: Path, *replacements: tuple[str, str]) -> None:
    text = (folder / "leyline.proto").read_text()
    for before, after in replacements:
        text = text.replace(before, after)
    (folder / "leyline.proto").write_text(text)


def test_what_is_checked_in_is_made_from_the_approved_schema() -> None:
    report = check.check(document=ROOT / "docs" / "contracts.md")

    assert (report.changes, report.stale, report.owed) == ((), (), ())
    assert report.digest == schema.schema_digest()
    assert Lock.parse(schema.LOCK.read_text()).text() == schema.LOCK.read_text()


@pytest.mark.parametrize("name", MUTANTS)
def test_each_kind_of_change_is_told_from_the_others_with_its_reason(name: str, folder: Path) -> None:
    replacements, verdict, place, reason = MUTANTS[name]
    mutate(folder, *replacements)

    report = check.check(folder, document=None)

    assert report.verdict == verdict, report.changes
    if place:
        named = [each for each in report.changes if each.place == place and each.verdict == verdict]
        assert [each for each in named if reason in each.reason], report.changes
    else:
        assert report.good


def test_an_additive_change_is_approved_once_its_entry_is_there_and_the_earlier_schema_stays_readable(
    folder: Path,
) -> None:
    before = Lock.parse((folder / "schema.lock").read_text())
    mutate(folder, *MUTANTS["a new field"][0])
    with pytest.raises(WrongSchema, match="no entry"):
        check.approve(folder, document=None)
    digest = check.check(folder, document=None).digest
    with (folder / "CHANGES.md").open("a") as changes:
        changes.write(f"| {digest[:12]} | lanes | more of them | the team | 2 |\n")

    check.approve(folder, document=None)

    assert check.check(folder, document=None).good
    after = Lock.parse((folder / "schema.lock").read_text())
    assert after.digest == digest
    assert after.accepts == (*before.accepts, before.digest)
    check.approve(folder, document=None)
    assert Lock.parse((folder / "schema.lock").read_text()) == after, "approved twice is approved once"


@pytest.mark.parametrize("row", ["| {} | lanes | why | the team |", "| {} | lanes | | the team | 2 |", "no row: {}"])
def test_an_entry_without_all_of_its_parts_is_none(row: str, folder: Path) -> None:
    mutate(folder, *MUTANTS["a new field"][0])
    digest = check.check(folder, document=None).digest
    with (folder / "CHANGES.md").open("a") as changes:
        changes.write(row.format(digest[:12]) + "\n")

    with pytest.raises(WrongSchema, match="no entry"):
        check.approve(folder, document=None)


def test_a_breaking_change_is_never_approved(folder: Path) -> None:
    mutate(folder, *MUTANTS["another type"][0])
    before = (folder / "schema.lock").read_text()

    with pytest.raises(WrongSchema, match="age_epochs"):
        check.approve(folder, document=None)
    assert (folder / "schema.lock").read_text() == before


def test_generated_code_that_was_touched_by_hand_is_found(folder: Path) -> None:
    with (folder / "leyline_pb2.py").open("a") as code:
        code.write("# by hand\n")

    assert check.check(folder, document=None).stale == ("leyline_pb2.py",)


def test_a_file_that_is_no_schema_is_refused_with_the_line(folder: Path) -> None:
    mutate(folder, ("uint32 branch = 14;", "uint32 branch = ;"))

    with pytest.raises(WrongSchema, match=r"leyline.proto:\d+"):
        check.check(folder, document=None)


def test_the_command_says_what_changed_and_leaves_with_one(folder: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["contracts", "check", "--folder", str(folder)])
    mutate(folder, *MUTANTS["another type"][0])
    bad = runner.invoke(app, ["contracts", "check", "--folder", str(folder)])

    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "breaking: SeedState.age_epochs: its type changed from uint32 to float" in bad.stdout


def test_a_schema_is_compared_with_itself_without_a_difference_whatever_the_order_of_its_lines() -> None:
    form = Lock.parse(schema.LOCK.read_text()).form

    assert compare(form, tuple(reversed(form))) == []


def test_no_process_talks_with_an_unapproved_schema_or_the_slow_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.speak.cache_clear()
    monkeypatch.setattr(api_implementation, "Type", lambda: "python")
    for make in (lambda: Signer(KEYS, "tolaria"), lambda: Verifier(KEYS)):
        with pytest.raises(EnvironmentFault, match="its python backend"):
            make()
    monkeypatch.undo()
    lock = tmp_path / "schema.lock"
    lock.write_text("0" * 64)
    monkeypatch.setattr(schema, "LOCK", lock)
    with pytest.raises(WrongSchema, match="approved"):
        Signer(KEYS, "tolaria")


def test_what_an_earlier_schema_left_behind_is_read_from_the_bus_but_not_taken_directly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_tags: None
) -> None:
    data = Signer(KEYS, "tamiyo").seal(b"payload", BusMessageType.FIELD_REPORT, payload_type="FieldReport")
    lock = Lock.parse(schema.LOCK.read_text())
    newer = tmp_path / "schema.lock"
    newer.write_text(Lock("f" * 64, (*lock.accepts, lock.digest), lock.form).text())
    monkeypatch.setattr(schema, "LOCK", newer)
    monkeypatch.setattr(schema, "schema_digest", lambda: "f" * 64)
    schema.schema_tag.cache_clear()
    schema.readable_tags.cache_clear()

    assert Verifier(KEYS).open(data).payload == b"payload"
    with pytest.raises(WrongSchema):
        Verifier(KEYS).open_direct(data)


def test_generated_code_is_imported_nowhere_but_in_contracts() -> None:
    for file in (ROOT / "esper_ray").rglob("*.py"):
        if file.parent == check.HERE:
            continue
        names = [
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (getattr(node, "module", None) or "", *(alias.name for alias in node.names))
        ]
        assert not [name for name in names if "leyline_pb2" in name or name.startswith("google.protobuf")], file
