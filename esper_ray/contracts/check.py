"""`esper contracts check` and `approve`: is what is checked in what ``leyline.proto`` says, and may it be so?

For people who change the schema. It needs protoc, which comes with the package grpcio-tools.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool

from esper_ray.contracts import reference
from esper_ray.contracts.changes import Change, Verdict, compare, faults, form_of, verdict_of
from esper_ray.contracts.schema import Lock, digest_of
from esper_ray.errors import EnvironmentFault, WrongSchema
from esper_ray.reliability import atomic

HERE = Path(__file__).parent
PROTO = "leyline.proto"
GENERATED = ("leyline_pb2.py", "leyline_pb2.pyi")
_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class Compiled:
    """What protoc made of a schema.

    Attributes:
        file: the descriptor with the comments of its source.
        generated: the Python code by file name.
    """

    file: descriptor_pb2.FileDescriptorProto
    digest: str
    form: tuple[str, ...]
    generated: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found.

    Attributes:
        stale: what was not made from this schema; `approve` makes it anew.
        owed: what a person has still to write.
    """

    digest: str
    changes: tuple[Change, ...]
    stale: tuple[str, ...]
    owed: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.changes)

    @property
    def good(self) -> bool:
        return self.verdict == "none" and not self.stale and not self.owed


def compiled(proto: Path) -> Compiled:
    """Run protoc over a schema.

    Raises:
        EnvironmentFault: grpcio-tools is not installed.
        WrongSchema: protoc refuses the file.
    """
    if importlib.util.find_spec("grpc_tools") is None:
        raise EnvironmentFault(
            "There is no protoc here.",
            why="The schema's Python code is made by it.",
            remedy="Install it with: pip install grpcio-tools",
        )
    with tempfile.TemporaryDirectory(prefix="esper-") as made:
        out = Path(made)
        command = [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{proto.parent}", f"--python_out={out}", f"--pyi_out={out}",
            "--include_source_info", f"--descriptor_set_out={out / 'set'}", proto.name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WrongSchema(
                f"protoc refuses {proto.name}.", why=done.stderr.strip(), remedy="Mend the file, then check again."
            )
        file = descriptor_pb2.FileDescriptorSet.FromString((out / "set").read_bytes()).file[0]
        generated = {path.name: path.read_bytes() for path in out.glob("*_pb2.py*")}
    return Compiled(file, digest_of(_canonical(file)), form_of(file), generated)


def check(folder: Path = HERE, document: Path | None = reference.DOCUMENT) -> Report:
    """Compare the schema in ``folder`` with what was approved, with the generated code and with its document.

    Args:
        document: the page made from it; None where there is none, as in an installed package.

    Raises:
        EsperError: there is no protoc, or it refuses the file.
    """
    made = compiled(folder / PROTO)
    lock = Lock.parse((folder / "schema.lock").read_text())
    changes = [*compare(lock.form, made.form), *faults(made.form)]
    stale = [name for name in GENERATED if (folder / name).read_bytes() != made.generated[name]]
    if lock.digest != made.digest:
        stale.append("schema.lock")
    if document is not None and document.read_text() != reference.page(made.file):
        stale.append(document.name)
    owed = [] if has_entry(folder, made.digest) else [f"a row in CHANGES.md that begins with `| {made.digest[:12]} |`"]
    return Report(made.digest, tuple(changes), tuple(stale), tuple(owed))


def approve(folder: Path = HERE, document: Path | None = reference.DOCUMENT) -> Report:
    """Make the generated code, the lock and the document anew; returns what the check had found.

    Raises:
        WrongSchema: the change is breaking, or has no entry in CHANGES.md.
    """
    report = check(folder, document)
    if report.verdict == "breaking":
        broken = "; ".join(f"{each.place}: {each.reason}" for each in report.changes if each.verdict == "breaking")
        raise WrongSchema(
            "A breaking change of the schema is not approved.",
            why=f"{broken}.",
            remedy="Add a new field or message instead, and reserve the numbers of what is no longer used.",
        )
    if report.owed:
        raise WrongSchema(
            f"The schema {report.digest[:12]} has no entry in CHANGES.md.",
            why="Each change of the schema says what it is, why, who approved it and what it costs.",
            remedy=f"Add {report.owed[0]}, then approve again.",
        )
    made = compiled(folder / PROTO)
    for name, data in made.generated.items():
        atomic.write_bytes(folder / name, data)
    lock = Lock.parse((folder / "schema.lock").read_text())
    earlier = lock.accepts if lock.digest == made.digest else (*lock.accepts, lock.digest)
    atomic.write_text(folder / "schema.lock", Lock(made.digest, earlier, made.form).text())
    if document is not None:
        atomic.write_text(document, reference.page(made.file))
    return report


def has_entry(folder: Path, digest: str) -> bool:
    """Whether CHANGES.md has a whole row for that schema: what, why, who approved it, what it costs."""
    for line in (folder / "CHANGES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == digest[:12] and len(cells) == _COLUMNS and all(cells):
            return True
    return False


def _canonical(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """The descriptor as a process that has loaded the generated code sees it."""
    bare = descriptor_pb2.FileDescriptorProto()
    bare.CopyFrom(file)
    bare.ClearField("source_code_info")
    for message in bare.message_type:
        for each in (message, *message.nested_type):
            for field in each.field:
                field.ClearField("json_name")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(bare.SerializeToString())
    found = descriptor_pb2.FileDescriptorProto()
    pool.FindFileByName(file.name).CopyToProto(found)
    return found
